"""What a backbone offers, which families there are, and how one is loaded: folder, hub id, GGUF file or package."""

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone
from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.dsa import DsaBackbone
from data_gen.backbones.families import Family, family_of
from data_gen.backbones.layers import longest_text
from data_gen.backbones.tiny import tiny_backbone
from data_gen.config import BackboneConfig, TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.cpu import multiply_by_product
from data_gen.core.errors import InputError
from data_gen.core.files import one_line, package_folder
from data_gen.core.fingerprint import APART
from data_gen.traces.types import BackboneInfo, RawTrace


class Backbone(Protocol):
    """A frozen LLM that can be traced."""

    model: PreTrainedModel
    info: BackboneInfo

    @property
    def chunk_tokens(self) -> int | None:
        """The one size of a chunk that it has; None where any will do."""
        ...

    def check(self, config: TraceConfig) -> None:
        """Raise InputError unless the settings fit the backbone: its layers, its oracles, its chunks."""
        ...

    def probe(self, tokens: list[int], config: TraceConfig) -> None:
        """Raise InputError unless what tracing of a few tokens recomputes is what the model computes."""
        ...

    def trace(self, tokens: list[int], positions: torch.Tensor, config: TraceConfig) -> RawTrace:
        """Read a document once, teacher-forced, and keep the query tokens at `positions` ([T] int64, ascending)."""
        ...

    def trace_own(self, prompt: list[int], config: TraceConfig) -> tuple[list[int], RawTrace]:
        """On-policy: let the model write up to `config.own_tokens` tokens after `prompt`, greedily, and trace those.

        Returns (prompt and written tokens, trace); the query tokens start `config.answer_lead` before the prompt's end
        and leave out the last token, which answers none.
        """
        ...


ADAPTERS: dict[Family, Callable[[PreTrainedModel], Backbone]] = {
    "deepseek_v4": DeepseekV4Backbone,
    "dsa": DsaBackbone,
    "dense": DenseBackbone,
}
"""What traces a model of each family."""
SPREADABLE = ("deepseek_v4",)
"""Types of models that are read while they lie on several GPUs."""
PROBE_TOKENS = 24
"""Read when a backbone is opened, to see whether it can be traced."""
MOST = 10_000
"""Layers, heads or experts: no model has more, and transformers would build them until the memory is full."""
TINY = "tiny"
"""The path that stands for data_gen/backbones/tiny.py."""


def resolve(path: str) -> str:
    """`package:NAME/FILE` -> the file inside an installed package, found without importing it; ~ -> the home folder."""
    if not path.startswith("package:"):
        return str(Path(path).expanduser()) if path.startswith("~") else path
    package, _, file = path.removeprefix("package:").partition("/")
    return str(package_folder(package, f"backbone {path}") / file)


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.endswith(".gguf") or Path(path).exists()


def public_name(path: str) -> str | None:
    """The `path` of a backbone where it means the same on any machine: a hub id, a package's file; else None."""
    return path if path.startswith("package:") or not _looks_local(path) else None


def absolute(path: str) -> str:
    """The `path` of a backbone as a process with another working folder reads it."""
    return str(Path(resolve(path)).absolute()) if path != TINY and _looks_local(path) else path


_READING = threading.Lock()
"""One load at a time changes the package gguf: the last of two at once would leave the other's change in place."""


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads a GGUF file three times and makes its table of names for every module: most of the loading."""
    import gguf

    with _READING:
        own = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader, gguf.get_tensor_name_map = map(lru_cache, own)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = own


def _place(config: BackboneConfig) -> tuple[str, dict[str, str], contextlib.AbstractContextManager[None]]:
    """(folder or hub id, what transformers is told beside it, what to read it in)."""
    path = resolve(config.path)
    local = Path(path)
    if _looks_local(path) and not local.exists():
        raise InputError(f"backbone {path}: no such file or folder")
    if local.is_dir() and not (local / "config.json").exists():
        raise InputError(f"backbone {path}: no model there (config.json is missing); name the folder that holds it")
    if not path.endswith(".gguf"):
        return path, {}, contextlib.nullcontext()
    if importlib.util.find_spec("gguf") is None:
        raise InputError("reading a GGUF file needs the package gguf: pip install 'lookahead-indexer[gguf]'")
    return str(local.parent), {"gguf_file": local.name}, _read_once()


def load_tokenizer(config: BackboneConfig) -> tuple[PreTrainedTokenizerBase, tuple[int, int]]:
    """(tokenizer, (context, vocabulary) of the model in tokens), without its weights. Raises InputError."""
    if config.path == TINY:
        model, tokenizer = tiny_backbone()
        return tokenizer, limits_of(model.config)
    folder, extra, reading = _place(config)
    try:
        with reading:
            _check_counts(PretrainedConfig.get_config_dict(folder, **extra)[0])
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, **extra)
            tokenizer("a", verbose=False)  # nobody checks its settings before it is used
            found: Any = AutoConfig.from_pretrained(folder, **extra)
        return tokenizer, limits_of(found)
    except InputError as error:
        raise InputError(f"backbone {config.path} cannot be traced: {error}") from error
    except Exception as error:  # of many parsers, which raise whatever a file that is not theirs leads them to
        raise InputError(f"backbone {config.path} cannot be loaded as a causal LM: {one_line(error)}") from error


def limits_of(config: PretrainedConfig) -> tuple[int, int]:
    """(context, vocabulary) in tokens. Raises InputError where the config does not say."""
    return longest_text(config, config.model_type), int(config.get_text_config(decoder=True).vocab_size)


def load_backbone(config: BackboneConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in eval mode on the best device, tokenizer). Raises InputError when there is nothing to load."""
    if config.path == TINY:
        return tiny_backbone()
    folder, extra, reading = _place(config)
    weights = {} if extra else {"use_safetensors": True}  # never the pickled file beside a missing one
    dtype = getattr(torch, config.dtype)
    spread = {"device_map": "auto"} if config.spread else {}
    try:
        with reading:
            _check_counts(PretrainedConfig.get_config_dict(folder, **extra)[0])
            tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
            tokenizer("a", verbose=False)  # nobody checks its settings before it is used
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, **weights, **extra, **spread
            )
    except Exception as error:  # of many parsers, which raise whatever a file that is not theirs leads them to
        raise InputError(f"backbone {config.path} cannot be loaded as a causal LM: {one_line(error)}") from error
    model, found = loaded
    others = sorted(name for name in found["unexpected_keys"] if not APART.search(name))
    if missing := sorted(found["missing_keys"]):
        unknown = f"; it holds {len(others)} that the model does not know ({_few(others)})" if others else ""
        raise InputError(
            f"backbone {config.path}: the checkpoint is not whole: {len(missing)} tensors of the model are missing "
            f"({_few(missing)}){unknown}"
        )
    if others:
        raise InputError(
            f"backbone {config.path}: {type(model).__name__} does not have {len(others)} tensors of the checkpoint "
            f"({_few(others)}); if the model is right without them, load it and save it with transformers"
        )
    if config.spread and model.config.model_type not in SPREADABLE:
        raise InputError(f"backbone.spread: only a DeepSeek-V4 can be spread over several GPUs; {folder} is not one")
    with contextlib.suppress(AttributeError):
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if not config.spread:
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")  # a cast here would round RoPE frequencies too
    multiply_by_product(model)
    return model.eval(), tokenizer


def _check_counts(config: dict[str, Any]) -> None:
    for name, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif name.startswith("num_") and isinstance(value, int) and value > MOST:
            raise InputError(f"its configuration says {name} {value}, which is more than any model has")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def adapter(model: PreTrainedModel, name: str | None = None) -> Backbone:
    """The adapter of the model's family, tried on a few tokens; `name` is told in its `info`.

    Raises InputError, which names what is in the way, when the model cannot be traced.
    """
    if away := [name for name, value in model.named_parameters() if value.is_meta]:
        raise InputError(f"{type(model).__name__}: {len(away)} tensors lie on no device (meta: {_few(away)}); load the "
                         "model where it fits completely")  # fmt: skip
    found = ADAPTERS[family_of(model)](model)
    found.info = replace(found.info, name=name)
    _probe(found)
    return found


def _probe(backbone: Backbone) -> None:
    """Trace a few tokens. Raises InputError unless what is recomputed is what the model computes."""
    length = min(PROBE_TOKENS, backbone.info.context)
    chunking = Chunking(tokens=backbone.chunk_tokens or 4, sink=0, recent=0)
    layers = backbone.info.full_layers[-1:]
    config = TraceConfig(chunking=chunking, layers=layers, window=1, tail=1, text_rows=1, top_chunks=8)
    try:
        words = backbone.model.config.get_text_config(decoder=True).vocab_size
        tokens = [place % words for place in range(length)]
        if isinstance(embeddings := backbone.model.get_input_embeddings(), nn.ModuleList):
            raise InputError(f"it reads {len(embeddings)} streams of tokens at once, not one text")
        backbone.probe(tokens, config)
        with torch.no_grad():  # tracing sees what enters attention, not what comes of the last layers
            output = backbone.model(torch.tensor([tokens], device=backbone.model.device), use_cache=True)
        if not bool(output.logits.isfinite().all()):
            raise InputError("its output is NaN or infinite; the weights are damaged, or do not fit the dtype")
        if (kind := type(output.past_key_values)) is not DynamicCache:
            raise InputError(f"it decodes into a {kind.__name__} of its own and takes no other cache")
    except InputError as error:
        raise InputError(f"{type(backbone.model).__name__} is not supported: {error}") from error
    except Exception as error:  # of a model's own code, met where it differs from all that is known
        raise InputError(f"{type(backbone.model).__name__} cannot be traced: {one_line(error)}") from error
