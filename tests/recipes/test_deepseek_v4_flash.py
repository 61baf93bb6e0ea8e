"""The paper's recipe: what it says, and its path from dumps to served weights at small size."""

import pickle
from importlib.resources import files

import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from cli import app
from data_gen.core.key_bytes import encode_keys
from indexer_train.formats.flashmemory import read_checkpoint
from indexer_train.losses import LOSSES
from recipes import load_recipe

SERVED, TRAINED = [10, 12, 20], [6, 8, 10, 12, 14, 16, 18, 20]


def test_it_states_the_papers_settings():
    recipe = load_recipe("deepseek-v4-flash")
    assert recipe.trace.layers == TRAINED and recipe.trace.window == 64 and recipe.trace.oracle == "indexer"
    assert (recipe.indexer.heads, recipe.indexer.rank, recipe.indexer.join) == (128, 2048, "max")
    assert recipe.train.loss == "focal" and recipe.train.golden == 3
    assert LOSSES["focal"].options_type(**recipe.train.loss_options).gamma == 2
    candidates = recipe.train.candidates
    assert (candidates.kind, candidates.negatives, candidates.positives, candidates.common_weight) == (
        "sampled", 3, 512, 0.5
    )  # fmt: skip
    assert recipe.trace.chunking.tokens == 4


def test_its_header_names_the_layers_that_are_served():
    header = files("recipes").joinpath("deepseek-v4-flash.yaml").read_text().split("backbone:")[0]
    assert f"export --indexer run/indexer --layers {','.join(map(str, SERVED))}" in header
    assert f"{', '.join(map(str, SERVED))} are transformer layers {', '.join(str(2 * n + 2) for n in SERVED)}" in header
    assert set(SERVED) <= set(TRAINED)


def dump(path, seed, tokens=40, chunks=100):
    """A dump whose hidden states foretell which chunks are golden: they hold those chunks' keys."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(chunks, 128, generator=generator)
    golden = torch.randint(0, chunks - 12, (tokens,), generator=generator)
    hidden = torch.zeros(tokens, 4096)
    hidden[:, :128] = keys[golden]
    tensors = {
        "label_indices": golden.int(),
        "label_scores": torch.full((tokens,), 5, dtype=torch.int32),
        "label_pointers": torch.arange(tokens + 1, dtype=torch.int32),
    }
    for layer in TRAINED:
        tensors[f"hidden_layer_{layer}"] = hidden.bfloat16()
        tensors[f"compk_layer_{layer}"] = encode_keys(keys)
        tensors[f"positions_layer_{layer}"] = torch.arange(4 * chunks - tokens, 4 * chunks)
    path.write_bytes(pickle.dumps(tensors, protocol=4))


def run(*command):
    result = CliRunner().invoke(app, [str(part) for part in command], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_dumps_to_served_weights(tmp_path):
    dumps, weights = tmp_path / "dumps", tmp_path / "weights"
    dumps.mkdir()
    weights.mkdir()
    for number in range(6):
        dump(dumps / f"doc_{number:05d}.pkl", seed=number)
    for layer in TRAINED:  # the native indexer, as the release extracts it
        shapes = {"wq_a": (4, 4096), "q_norm": (4,), "indexer.wq_b": (256, 4), "indexer.weights_proj": (2, 4096)}
        tensors = {f"{name}.weight": torch.full(shape, 0.01) for name, shape in shapes.items()}
        save_file(tensors, weights / f"layer_{2 * layer + 2:02d}.safetensors")
    settings = load_recipe("deepseek-v4-flash").model_dump(mode="json")
    settings["indexer"] |= {"heads": 4, "rank": 6}
    settings["trace"]["chunking"]["recent"] = 8
    settings["trace"] |= {"window": 8, "text_rows": 8}
    settings["train"] |= {"epochs": 2, "windows_per_document": 16, "validation_every": 3, "eval_epochs": 1}
    settings["train"]["init"] = str(weights)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    traces, indexer, served = tmp_path / "traces", tmp_path / "run" / "indexer", tmp_path / "served.pt"
    run("import", recipe, "--dumps", dumps, "--out", traces)
    run("train", recipe, "--traces", traces, "--out", tmp_path / "run")
    assert "verified" in run("verify", "--traces", traces, "--indexer", indexer)
    output = run(
        "export", "--indexer", indexer, "--layers", "10,12,20", "--format", "flashmemory-joint", "--out", served
    )
    assert "logit offset" in output and "thresholds were calibrated on layers" in output
    weights = read_checkpoint(served).layers
    assert sorted(weights) == SERVED
    assert {(part.heads, part.rank, part.hidden, part.width) for part in weights.values()} == {(4, 6, 4096, 128)}
    again = tmp_path / "again"
    run("convert", served, "--out", again, "--traces", traces)
    assert "verified" in run("verify", "--traces", traces, "--indexer", again)
    run("evaluate", recipe, "--indexer", again, "--traces", traces, "--out", tmp_path / "results")
    served.unlink()  # it holds a RoPE table of 268 MB
