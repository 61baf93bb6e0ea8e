"""Shared settings and models of the suite."""

import contextlib
import copy
import io
import os
import re
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import pytest
import torch
import yaml
from hypothesis import settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import cli
from benchmarks.tiny_models import tiny
from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone
from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.load import load_backbone, resolve
from data_gen.config import BackboneConfig, TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.generate import generate
from data_gen.traces.store import TraceStore
from data_gen.traces.types import BackboneInfo, DocumentMeta, Manifest, RawTrace, Span, SparseAttention
from indexer_train.config import IndexerConfig
from indexer_train.formats.native import initialise
from indexer_train.model import IndexerSpec, MemoryIndexer
from recipes import Recipe
from recipes.pocket.config import load_config
from recipes.pocket.evaluate import documents_of
from recipes.pocket.tasks import PocketDocument

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # sharp attention: there is something to learn and to get wrong
}


TINY_V4 = {
    "vocab_size": 128,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "index_n_heads": 16,  # with fewer, exact zeros of the ReLU tie
    "index_head_dim": 16,
    "index_topk": 12,
    "sliding_window": 16,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "num_hidden_layers": 7,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
    "mlp_layer_types": ["moe"] * 7,
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128},
    "initializer_range": 0.3,
}


def needs_pinned(distribution: str) -> None:
    """Skip a test of words that are a distribution's own, where another version than the pinned one is installed."""
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text()
    (pinned,) = re.findall(rf"^{distribution}==(\S+)$", constraints, re.MULTILINE)
    if (installed := version(distribution)) != pinned:
        pytest.skip(f"the page is of {distribution} {pinned}; {installed} may say other things")


TINY_OF = {"deepseek_v4": "deepseek_v4", "dsa": "deepseek_v32", "dense": "llama"}
"""Attention family -> the tiny model that stands for it."""


def tiny_model(family: str):
    """A random model of a kind, fp32, the same on every call."""
    if family == "deepseek_v32":
        return tiny(family)
    torch.manual_seed(0)
    if family == "deepseek_v4":
        return DeepseekV4ForCausalLM(DeepseekV4Config(**copy.deepcopy(TINY_V4))).eval()  # the config edits what it gets
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=3)).eval()
    if family == "yarn":
        rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
        return LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=3, rope_parameters=rope)).eval()
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**TINY, num_hidden_layers=3)).eval()
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**TINY, num_hidden_layers=4, layer_types=kinds, sliding_window=24)
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(params=["llama", "yarn", "qwen3", "gemma3"])
def model(request):
    """One tiny random model of every family."""
    return tiny_model(request.param)


@dataclass(frozen=True)
class Pocket:
    """The trained pocket DeepSeek-V4 in fp32 on the CPU, and its language. folder: its checkpoint."""

    backbone: DeepseekV4Backbone
    tokenizer: PreTrainedTokenizerBase
    folder: Path

    def documents(self, task: str, length: int, count: int) -> list[PocketDocument]:
        """The first `count` test documents of a task; the longest has `length` tokens."""
        return documents_of(load_config(self.folder.with_name("config.yaml")), task, length, count)

    def tokens(self, document: PocketDocument) -> list[int]:
        """Prompt and answer."""
        return self.tokenizer(f"{document.prompt} {document.answer}").input_ids


@pytest.fixture(scope="session")
def pocket():
    """Trained weights, for the tests that need truth; read only."""
    path = "package:recipes/pocket_v4/model"
    model, tokenizer = load_backbone(BackboneConfig(path=path))
    return Pocket(DeepseekV4Backbone(model.cpu()), tokenizer, Path(resolve(path)))


@pytest.fixture(scope="session")
def pocket_traces(pocket, tmp_path_factory):
    """The last 64 tokens, question and answer among them, of two documents of 1,000 tokens."""
    trace = TraceConfig(chunking=Chunking(tokens=4, sink=0, recent=1), layers=[0, 1, 2], window=16, text_rows=64)
    plan = {number: (f"d{number}", "") for number in range(2)}
    manifest = Manifest(backbone=pocket.backbone.info, trace=trace, documents={}, plan=plan, versions={})
    store = TraceStore.create(tmp_path_factory.mktemp("pocket") / "traces", manifest)
    for index, document in enumerate(pocket.documents("multi_key", 1000, 2)):
        tokens = pocket.tokens(document)
        raw = pocket.backbone.trace(tokens, torch.arange(len(tokens) - 64, len(tokens)), trace)
        span = Span(first=0, last=64, serve=0, tail=False)
        store.write(index, DocumentMeta(name=f"d{index}", task="text", length=len(tokens), spans=[span]), raw)
    return store


@pytest.fixture(scope="session")
def pocket_indexer(pocket, pocket_traces):
    """The pocket's own trained indexers as a memory indexer, in the release's shape rules."""
    info, trace = pocket.backbone.info, pocket_traces.manifest.trace
    spec = IndexerSpec(
        shape=IndexerConfig(heads=16, rank=96, distance_bumps=0, scale=False, slot=False, join="max"),
        layers=trace.layers, hidden=info.hidden, key_width=info.key_width, chunking=trace.chunking,
        window=trace.window, backbone=info.fingerprint, key=info.key, rope=info.rope,
    )  # fmt: skip
    indexer = MemoryIndexer.from_spec(spec, device="cpu").eval()
    initialise(indexer, pocket.folder)
    return indexer


def tiny_tokenizer():
    """One token per ASCII character, with a chat template."""
    vocabulary = {chr(code): code for code in range(128)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    raw.decoder = decoders.Fuse()
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="\x03", unk_token="?")
    fast.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\x03{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def tokenizer():
    """See `tiny_tokenizer`."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_recipe():
    """Settings for one-character tokens, 4-token chunks and a tiny Llama: seconds, not minutes."""
    return Recipe.model_validate(
        {
            "backbone": {"path": "unused"},
            "documents": {
                "tokens": [420, 500],
                "train": {"text": 4, "single": 4},
                "heldout": {"text": 2, "multi_value": 2},
            },
            "trace": {
                "chunking": {"tokens": 4, "sink": 1, "recent": 2},
                "layers": [0, 2],
                "window": 16,
                "text_rows": 64,
                "answer_lead": 8,
                "tail": 4,
            },
            "indexer": {"heads": 4, "rank": 8},
            # of mass, which planted traces state exactly
            "train": {
                "loss": "listwise_mass",
                "choose": "mass_recall",
                "epochs": 4,
                "windows_per_document": 16,
                "validation_every": 4,
                "eval_epochs": 1,
            },
            "decode": {"answer_tokens": 6, "text_documents": 1, "text_tokens": 40},
        }
    )


@pytest.fixture(scope="session")
def stores(tmp_path_factory, tokenizer, tiny_recipe):
    """(training, held-out) trace stores of the tiny Llama."""
    root = tmp_path_factory.mktemp("traces")
    backbone = DenseBackbone(tiny_model("llama"))

    return tuple(generate(backbone, tokenizer, tiny_recipe.documents, tiny_recipe.trace, root))


@pytest.fixture
def lookahead(capsys, monkeypatch):
    """Run the command in this process: arguments -> (exit code, standard output, last line of standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lookahead", *map(str, arguments)])
        monkeypatch.setattr(cli, "heed_signals", lambda: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return stop.value.code or 0, out, (err.splitlines() or [""])[-1]

    return call


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, tokenizer, tiny_recipe):
    """A recipe file over a tiny Llama saved to disk."""
    root = tmp_path_factory.mktemp("recipe")
    tiny_model("llama").save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    settings = tiny_recipe.model_dump(mode="json")
    settings["backbone"]["path"] = str(root / "model")
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory, recipe):
    """The output folder of `lookahead run`; the debug recipe's test runs one in a process of its own."""
    out, printed = tmp_path_factory.mktemp("run") / "out", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["lookahead", "run", str(recipe), "--out", str(out)])
        patch.setattr(cli, "heed_signals", lambda: None)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    (out / "stdout.txt").write_text(printed.getvalue())
    return out


def planted_store(root, documents, seed):
    """Traces with a known secret: every token reads one random chunk, and its hidden state foretells two.

    It is a fixed rotation of the keys of the chunks that this token and the next one read: the whole window of two
    tokens. Keys are unit vectors in an order of each document's own. Whoever learns the rotation finds the chunks in
    any document; whoever does not is left with chance.
    """
    width = chunks = rows = 32
    rotation = torch.linalg.qr(torch.randn(2, 2 * width, 2 * width, generator=torch.Generator().manual_seed(99))).Q
    generator = torch.Generator().manual_seed(seed)
    trace = TraceConfig(chunking=Chunking(tokens=4, sink=1, recent=2), layers=[0, 1], window=2, text_rows=rows, tail=2)
    backbone = BackboneInfo("planted", "planted", [0, 1], 2 * width, width, 4 * chunks, entry_bytes=256)
    plan = {number: (str(number), "") for number in range(documents)}
    store = TraceStore.create(root, Manifest(backbone=backbone, trace=trace, documents={}, plan=plan, versions={}))
    positions = torch.arange(4 * chunks - rows, 4 * chunks)
    oldest_query = int(positions[0]) // 4
    for index in range(documents):
        read = torch.randint(1, oldest_query - 2, (rows + 1,), generator=generator)
        keys = 4 * torch.stack([torch.eye(width)[torch.randperm(chunks, generator=generator)] for _ in range(2)])
        states = [torch.cat([keys[k, read[:-1]], keys[k, read[1:]]], dim=1) @ rotation[k] for k in range(2)]
        mean = torch.full((rows, chunks, 1), 0.1 / chunks)
        mean[torch.arange(rows), read[:-1]] = 0.9
        raw = RawTrace(
            hidden={layer: states[layer].bfloat16() for layer in range(2)},
            keys={layer: keys[layer].half() for layer in range(2)},
            positions=positions,
            oracle=SparseAttention.from_dense(mean, mean, (positions + 1) // 4, chunks),
            mean_pooled=torch.zeros(rows, chunks).half(),
        )
        span = Span(first=0, last=rows, serve=0, tail=False)
        store.write(index, DocumentMeta(name=str(index), task="planted", length=4 * chunks, spans=[span]), raw)
    return store


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """(training, held-out) stores of `planted_store`."""
    root = tmp_path_factory.mktemp("planted")
    return planted_store(root / "train", 48, seed=1), planted_store(root / "heldout", 8, seed=2)
