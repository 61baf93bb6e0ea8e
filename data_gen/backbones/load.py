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
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone
from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.tiny import tiny_backbone
from data_gen.config import BackboneConfig, TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.files import package_folder
from data_gen.traces.types import BackboneInfo, RawTrace


class Backbone(Protocol):
    """A frozen LLM that can be traced."""

    model: PreTrainedModel
    info: BackboneInfo

    def check(self, config: TraceConfig) -> None:
        """Raise InputError unless the settings fit the backbone: its layers, its oracles, its chunks."""
        ...

    def trace(self, tokens: list[int], positions: torch.Tensor, config: TraceConfig) -> RawTrace:
        """Read a document once, teacher-forced, and keep the query tokens at `positions`."""
        ...

    def trace_own(self, prompt: list[int], config: TraceConfig) -> tuple[list[int], RawTrace]:
        """On-policy: let the model write up to `config.own_tokens` tokens behind `prompt`, greedily, and trace those.

        Returns (prompt and written tokens, trace); the query tokens start `config.answer_lead` before the prompt's end
        and leave out the last token, which answers none.
        """
        ...


ADAPTERS: dict[str, Callable[[PreTrainedModel], Backbone]] = {"deepseek_v4": DeepseekV4Backbone}
"""Families with an adapter of their own, by `model_type`; any other model is read as an ordinary decoder."""
SPREADABLE = ("deepseek_v4",)
"""Families that are read while they lie on several GPUs."""
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


_READING = threading.Lock()
"""One load at a time changes the package gguf: the last of two at once would leave the other's change behind."""


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


def load_backbone(config: BackboneConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in eval mode on the best device, tokenizer). Raises InputError when there is nothing to load."""
    if config.path == TINY:
        return tiny_backbone()
    path = resolve(config.path)
    local = Path(path)
    if _looks_local(path) and not local.exists():
        raise InputError(f"backbone {path}: no such file or folder")
    folder, extra, reading = path, {}, contextlib.nullcontext()
    if path.endswith(".gguf"):
        if importlib.util.find_spec("gguf") is None:
            raise InputError("reading a GGUF file needs the package gguf: pip install 'lookahead-indexer[gguf]'")
        folder, extra = str(local.parent), {"gguf_file": local.name}
        reading = _read_once()
    dtype = getattr(torch, config.dtype)
    spread = {"device_map": "auto"} if config.spread else {}
    try:
        with reading:
            tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra, **spread)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"backbone {config.path} cannot be loaded as a causal LM: {first_line}") from error
    if config.spread and model.config.model_type not in SPREADABLE:
        raise InputError(f"backbone.spread: only the DeepSeek-V4 adapter reads a model on several GPUs; {path} is none")
    with contextlib.suppress(AttributeError):
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if not config.spread:
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")  # a cast here would round RoPE frequencies too
    return model.eval(), tokenizer


def adapter(model: PreTrainedModel, name: str | None = None) -> Backbone:
    """The adapter of the model's family; `name` is told in its `info`. Raises InputError when there is none."""
    found = ADAPTERS.get(model.config.model_type, DenseBackbone)(model)
    found.info = replace(found.info, name=name)
    return found
