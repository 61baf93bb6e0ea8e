"""One value for a model's weights: from the model in memory or its checkpoint's files, whoever names the tensors.

Each row of each tensor (along its last axis) gives a 64-bit number; the fingerprint is a hash of the set of them. So
it is the same when tensors are joined or split along any other axis (q, k and v as one projection, experts as one
stack), have other names, lie in another order, or when a tied matrix is there once or twice. Every value counts: any
change of weights that bf16 can tell is another fingerprint, except equal rows in other places.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from data_gen.core.errors import InputError
from data_gen.core.files import whole

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
REMEDY = "copy the checkpoint again"
APART = re.compile(
    r"(^|\.)(vision_\w+|visual|audio_\w+|embed_vision|embed_audio|multi_modal_projector|mtp)\.|inv_freq$"
)
"""Tensors that a checkpoint holds beside the language model, and tables that are computed anew."""
TILE_ELEMENTS = 1 << 20
FIRST, SECOND = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9
"""Odd 63-bit constants."""
LOW_HALF = (1 << 32) - 1


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Sixteen hexadecimal digits for named tensors of any shapes, on any device.

    Floats count as bf16, so that a model loaded in fp32 or bf16 has the value of its files; one that was rounded to
    fp16 has not. Names decide only what belongs to the language model. Costs one reading of all values: 135 M of them
    in 0.8 s on one core. Raises InputError where a tensor has no values in memory.
    """
    numbers = [number for name, tensor in tensors if not APART.search(name) for number in _rows(name, tensor)]
    if not numbers:
        raise InputError("fingerprint: there is no tensor of a language model")
    return hashlib.sha256(torch.cat(numbers).unique().numpy().tobytes()).hexdigest()[:16]


def checkpoint_fingerprint(folder: Path) -> str:
    """The fingerprint of a checkpoint's files: the value of the model that transformers loads from them."""
    return fingerprint(checkpoint_tensors(folder))


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of every tensor of a folder's safetensors files, one file after the other, in order of names.

    Raises InputError where there are none, or a file is missing or damaged.
    """
    index = folder / INDEX
    if index.exists():
        with whole(index, "index of a checkpoint", REMEDY):
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    else:
        files = [SINGLE]
    for name in files:
        path = folder / name
        if not path.exists():
            raise InputError(f"{path}: no such file; the fingerprint needs the checkpoint's safetensors files")
        with whole(path, "checkpoint", REMEDY), safe_open(path, framework="pt") as file:
            for tensor in sorted(file.keys()):
                yield tensor, file.get_tensor(tensor)


def _rows(name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A number for each row of a tensor, [rows] int64 on the CPU, tile after tile."""
    if tensor.is_meta:
        raise InputError(f"fingerprint: {name} has no values in memory (device meta); load the whole model")
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    width = rows.shape[1]
    words = -(-width // 4) if rows.is_floating_point() else width
    weights = _mix(torch.arange(1, words + 1, device=rows.device) * FIRST) | 1
    size = _mix(torch.tensor(width, device=rows.device))
    for tile in rows.split(max(1, TILE_ELEMENTS // max(1, width))):
        yield _mix((_mix(_words(tile) * FIRST) * weights).sum(dim=1) + size).cpu()


def _words(rows: torch.Tensor) -> torch.Tensor:
    """The values of rows [R, C] as 64-bit words: four floats as bf16 in each, or one integer."""
    if not rows.is_floating_point():
        return rows.long()
    rows = torch.nn.functional.pad(rows.to(torch.bfloat16), (0, -rows.shape[1] % 4))
    return rows.contiguous().view(torch.int64)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """Spread the upper half of each word over the lower one; different words stay different."""
    return (words ^ ((words >> 32) & LOW_HALF)) * SECOND
