"""A model by name, folder or config.json."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from data_gen.core.errors import InputError
from data_gen.core.files import one_line
from eval.plan.deepseek_v4 import deepseek_v4_model
from eval.plan.dense import dense_model
from eval.plan.latent import latent_model
from eval.plan.shapes import Model

SHIPPED = files("eval.plan") / "configs"


def load_model(name: str, chunk_tokens: int | None) -> Model:
    """A shipped model's name, a folder with a config.json, or the file itself.

    Raises InputError when there is none, when it is no valid configuration, or when its family is not known.
    """
    shipped = SHIPPED / f"{name}.json"
    if shipped.is_file():
        with as_file(shipped) as path:
            return _read(name, path, chunk_tokens)
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        names = sorted(file.name for file in SHIPPED.iterdir())
        known = ", ".join(name.removesuffix(".json") for name in names if name.endswith(".json"))
        raise InputError(f"plan {name}: neither a folder with a config.json nor one of {known}")
    return _read(name, path, chunk_tokens)


def _read(name: str, path: Path, chunk_tokens: int | None) -> Model:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise InputError(f"{path}: no model_type in it; a Hugging Face config.json has one")
    try:
        whole = AutoConfig.from_pretrained(str(path))
        config = whole.get_text_config(decoder=True)
        config.dtype = config.dtype or whole.dtype  # a multimodal file names it once, outside of its text part
    except Exception as error:  # whatever its class trips over, the file is all that it was given
        raise InputError(f"{path}: not a configuration that transformers reads ({one_line(error)})") from error
    latent = getattr(config, "kv_lora_rank", None) is not None
    family = LATENT if latent else FAMILIES.get(config.model_type, DENSE)
    family.check(raw, path)
    return family.model(name, config, chunk_tokens)


@dataclass(frozen=True)
class Family:
    """How models of one kind are planned. check: raises InputError for a config.json (its content, its path) that says
    too little; model: (name, configuration, tokens of a chunk) -> the model, term by term."""

    check: Callable[[dict[str, Any], Path], None]
    model: Callable[[str, Any, int | None], Model]


def _plain_weights(raw: dict[str, Any], path: Path) -> None:
    if "quantization_config" in raw:
        raise InputError(f"{path}: quantised weights of dense models are not supported; remove quantization_config")


def _says_what_is_compressed(raw: dict[str, Any], path: Path) -> None:
    if "layer_types" not in raw and "compress_ratios" not in raw:  # the class's defaults are some other model's
        raise InputError(f"{path}: neither layer_types nor compress_ratios says which layers are compressed")


FAMILIES = {"deepseek_v4": Family(_says_what_is_compressed, deepseek_v4_model)}
"""Model types that are planned as more than dense models."""
DENSE = Family(_plain_weights, dense_model)
LATENT = Family(lambda raw, path: None, latent_model)
"""Of any configuration with a latent (MLA, DSA)."""
