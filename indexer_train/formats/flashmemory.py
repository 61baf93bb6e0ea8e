"""The FlashMemory release's checkpoints: their tensors, read and written; formats/convert.py makes indexers of them.

Joint: one .pt with `retrievers.l{ordinal}.` before every name; layers: one .pt a layer without it; safetensors: the
joint names without RoPE tables; epoch: a .pt whose `model_state` is one of the first two. Layers are CSA ordinals.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from data_gen.core.errors import InputError
from data_gen.core.files import one_line, sweep, whole, write_atomically
from data_gen.core.rope import Rope
from indexer_train.formats.weights import LayerWeights

Format = Literal["flashmemory-joint", "flashmemory-layers", "flashmemory-safetensors"]
NAMES = {
    "wq_a": "wq_a.weight",
    "q_norm": "q_norm_weight",
    "wq_b": "wq_b.weight",
    "weights_proj": "weights_proj.weight",
}
TABLE = "freqs_cis"
BLOCK = 1 << 16
"""Positions of a RoPE table compared at once."""


@dataclass(frozen=True)
class Checkpoint:
    """What one file holds. layers: by CSA ordinal; table: RoPE as [P, dims / 2] complex64, None where it has none."""

    layers: dict[int, LayerWeights]
    table: torch.Tensor | None


def read_checkpoint(path: Path, layer: int | None = None) -> Checkpoint:
    """Read any of the release's checkpoint files. Pickles are loaded with weights_only, nothing of them is run.

    layer: ordinal of a single-layer file; without it, it is taken from the file's name (`..._l10_...`). Raises
    InputError when the file is none of the formats, is damaged or holds anything that is not understood, or when name
    and `layer` contradict each other.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'a folder; name a checkpoint in it' if path.is_dir() else 'no such file'}")
    state = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        match = re.fullmatch(r"retrievers\.l(\d+)\.(.+)", name)
        ordinal = int(match[1]) if match else _single_layer(path, name, layer)
        layers.setdefault(ordinal, {})[match[2] if match else name] = value
    if not layers:
        raise InputError(f"{path}: holds no weights")
    tables = [tensors.pop(TABLE) for tensors in layers.values() if TABLE in tensors]
    for table in tables:
        if table.layout != torch.strided or table.dtype != torch.complex64 or table.ndim != 2 or not table.numel():
            raise InputError(f"{path}: {TABLE} is {table.dtype} {list(table.shape)}, not a table of complex64 rows")
    if any(not torch.equal(table, tables[0]) for table in tables[1:]):
        raise InputError(f"{path}: its layers have different {TABLE} tables")
    return Checkpoint(
        {ordinal: _layer(path, ordinal, layers[ordinal]) for ordinal in sorted(layers)}, tables[0] if tables else None
    )


def write_checkpoint(layers: dict[int, LayerWeights], rope: Rope, out: Path, format: Format) -> list[Path]:
    """Write layers (by CSA ordinal) in one of the release's formats; returns the files, each whole or not there.

    out: the file, or, of `flashmemory-layers`, the folder. Raises InputError when it cannot have that name, or when the
    folder holds other layers, which would be loaded with these.
    """
    if out.is_dir() and format != "flashmemory-layers":
        raise InputError(f"{out}: is a folder; {format} is one file, name it")
    if (out.suffix == ".safetensors") != (format == "flashmemory-safetensors"):
        raise InputError(f"{out}: only flashmemory-safetensors ends in .safetensors; name a file that fits {format}")
    named = {
        ordinal: {NAMES[part]: value for part, value in vars(weights).items()} for ordinal, weights in layers.items()
    }
    if format == "flashmemory-safetensors":
        tensors = _joint(named)
        return [_write(out, lambda file: save_file(tensors, file))]
    table = rope.table(torch.arange(rope.positions))
    named = {ordinal: tensors | {TABLE: table} for ordinal, tensors in named.items()}
    if format == "flashmemory-joint":
        return [_write(out, lambda file: _pickle(_joint(named), file))]
    files = {out / f"ckpt_l{ordinal}.pt": tensors for ordinal, tensors in named.items()}
    if others := sorted(path.name for path in set(out.glob("ckpt_l*.pt")) - set(files)):
        raise InputError(f"{out}: holds {others[0]}, which is not of this export; choose another folder")
    return [_write(path, lambda file, tensors=tensors: _pickle(tensors, file)) for path, tensors in files.items()]


def check_table(where: Path, table: torch.Tensor, rope: Rope) -> None:
    """Raise InputError unless `table` is `rope`'s ([positions, dims / 2] complex), as far as both reach.

    Sine and cosine may differ by 1e-5.
    """
    if 2 * table.shape[1] != rope.dims:
        raise InputError(f"{where}: {TABLE} is {list(table.shape)}, not a table for {rope.dims} dims")
    for first in range(0, len(table), BLOCK):
        part = table[first : first + BLOCK]
        ours = rope.table(torch.arange(first, first + len(part)))
        if not float((part - ours).abs().max()) <= 1e-5:
            raise InputError(f"{where}: {TABLE} is not the RoPE of this backbone (from position {first} on)")


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with whole(path, "checkpoint of the release", "copy it again"):
        return load_file(path)


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a .pt, epoch wrapper removed; tensors stay on disk until they are touched."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {refused[1]}, which weights do not need" if refused else one_line(error)
        raise InputError(f"{path}: not loaded: {reason}") from error
    except Exception as error:  # damaged bytes can end in any exception of the pickle machine or of torch
        raise InputError(f"{path}: damaged, or no PyTorch checkpoint ({one_line(error)})") from error
    if isinstance(found, dict) and "model_state" in found:
        found = found["model_state"]
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        raise InputError(f"{path}: holds no dictionary of named weights")
    return found


def _single_layer(path: Path, name: str, layer: int | None) -> int:
    if name not in (*NAMES.values(), TABLE):
        raise InputError(f"{path}: tensor {name!r} belongs to no format of the release")
    match = re.search(r"(?:^|[^a-z])l(\d+)(?:[^0-9]|$)", path.stem)
    if match is None:
        if layer is None:
            raise InputError(f"{path}: a single layer, but the name does not say which (..._l10_...); pass --layers")
        return layer
    if layer is not None and int(match[1]) != layer:
        raise InputError(f"{path}: layer {int(match[1])} by its name, but --layers {layer} was asked for; rename it")
    return int(match[1])


def _layer(path: Path, ordinal: int, tensors: dict[str, torch.Tensor]) -> LayerWeights:
    missing, unknown = sorted(set(NAMES.values()) - set(tensors)), sorted(set(tensors) - set(NAMES.values()))
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is not understood"
        raise InputError(f"{path}: layer {ordinal} {what}")
    return LayerWeights.checked(f"{path}, layer {ordinal}", **{part: tensors[name] for part, name in NAMES.items()})


def _joint(named: dict[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        f"retrievers.l{ordinal}.{name}": value for ordinal, tensors in named.items() for name, value in tensors.items()
    }


def _pickle(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with open(path, "wb") as file:  # given a name instead, PyTorch wants one with an extension
        torch.save(tensors, file)


def _write(path: Path, write: Callable[[Path], None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    write_atomically(path, write)
    return path
