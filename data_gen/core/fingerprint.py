"""One value for a model's weights: from the model in memory or its checkpoint's files, whoever names the tensors.

Each row of each tensor (along its last axis; of a vector each value) gives a 64-bit number, the rows of a tensor in
order give another, and those of a layer, with its number, are hashed together. Frameworks join tensors by laying them
one after the other (q, k and v; gate and up; the experts of a layer): such parts are read in that order, joined or
not, so both give one value. Nor does it matter what tensors lie beside the layers' numbers are called, in which order
or files they lie, or whether a tied matrix is there once or twice.

Another value follows from any change of a value that bf16 can tell (replaced, merged, quantised, an adapter folded
in), from rows or columns that change places, from tensors that are missing, there twice, or of another layer, and from
two tensors of a layer that change places, if MEMBERS knows one of them. Not told apart are two tensors of one layer
and one shape that MEMBERS knows neither of. Not covered are configurations, and what APART says. A framework that
gives a tensor of MEMBERS a name that is not there has another value: a refusal, never a wrong match.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from data_gen.core.errors import InputError
from data_gen.core.files import whole

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
REMEDY = "copy the checkpoint again"
APART = re.compile(
    r"(^|\.)(vision_\w+|visual|audio_\w+|embed_vision|embed_audio|multi_modal_projector|mtp)\.|inv_freq$"
)
"""Tensors that a checkpoint holds beside the language model, and tables that are computed again."""
MEMBERS = {
    name: (group, order)
    for group, members in {
        "qkv": ["q_proj wq qkv_proj", "k_proj wk", "v_proj wv"],
        "gate_up": ["gate_proj w1 wgate gate_up_proj w13", "up_proj w3"],
        "out": ["o_proj wo"],
        "down": ["down_proj w2"],
        "first norm": ["input_layernorm attention_norm attn_norm"],
        "second norm": ["post_attention_layernorm ffn_norm"],
        "query norm": ["q_norm q_a_norm q_a_layernorm"],
        "key norm": ["k_norm"],
        "embedding": ["embed_tokens embed tok_embeddings"],
        "head": ["lm_head head output"],
    }.items()
    for order, names in enumerate(members)
    for name in names.split()
}
"""Names of modules -> (what they are, place in the tensor that frameworks join them to)."""
ENDING = re.compile(r"[._](weight|bias)$")
TILE_ELEMENTS = 1 << 20
FIRST, SECOND, THIRD = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111ED
"""Odd 63-bit constants; THIRD is 5 modulo 8, so that none of its first 2^62 powers is the same."""
LOW_HALF = (1 << 32) - 1
ALL = (1 << 64) - 1


class _Part(NamedTuple):
    """A tensor among those it may be joined to: by expert, then by order; rows, and their number as a polynomial."""

    expert: int
    order: int
    rows: int
    number: int


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Sixteen hexadecimal digits for named tensors of any shapes, on any device.

    Floats count as bf16, so that a model loaded in fp32 or bf16 has the value of its files; one that was rounded to
    fp16 has not. Costs one reading of all values. Raises InputError where a tensor has no values in memory.
    """
    groups: dict[tuple[int, str, str], list[_Part]] = defaultdict(list)
    for name, tensor in tensors:
        if not APART.search(name) and tensor.numel():
            layer, what, path, expert, order = _placed(name)
            groups[layer, what, path].append(_Part(expert, order, *_rows(name, tensor)))
    if not groups:
        raise InputError("fingerprint: no tensor of a language model found")
    found = sorted((layer, what, _joined(parts)) for (layer, what, _), parts in groups.items())
    outside = {number for layer, what, number in found if layer < 0 and what != "head weight"}
    kept = [each for each in found if each[1] != "head weight" or each[2] not in outside]  # else it is tied
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values, of any shape, of every tensor of a folder's safetensors files, file by file in order of names:
    their `fingerprint` is that of the model which transformers loads from them.

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


def _placed(name: str) -> tuple[int, str, str, int, int]:
    """Where a tensor belongs: (layer, -1 outside; what it is, "" of others; its path, "" of those; expert; order)."""
    path, *ending = ENDING.split(name)
    parts = path.split(".")
    numbers = [int(part) for part in parts if part.isdigit()]
    layer, expert = [*numbers, -1, 0][0], [*numbers[1:], 0][0]
    group, order = MEMBERS.get(parts[-1], ("", 0))
    if not group:
        return layer, "", ".".join(part for part in parts if not part.isdigit()) + name[len(path) :], expert, 0
    whose = "of experts " * ("experts" in parts) + "shared " * any("shared" in part for part in parts)
    return layer, f"{whose}{group} {ending[0] if ending else 'weight'}", "", expert, order


def _joined(parts: list[_Part]) -> tuple[int, int]:
    """(rows, number) of the tensor that holds all parts, one after the other."""
    rows = number = 0
    for part in sorted(parts):
        number = (number + part.number * pow(THIRD, rows, 1 << 64)) & ALL
        rows += part.rows
    return rows, number


def _rows(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """(rows, their numbers as a polynomial modulo 2^64) of a tensor."""
    if tensor.is_meta:
        raise InputError(f"fingerprint: {name} has no values in memory (device meta); load the whole model")
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)
    width = rows.shape[1]
    words = -(-width // 4) if rows.is_floating_point() else width
    weights = _mix(torch.arange(1, words + 1, device=rows.device) * FIRST) | 1
    size = _mix(torch.tensor(width, device=rows.device))
    tiles = rows.split(max(1, TILE_ELEMENTS // width))
    powers = _powers(len(tiles[0]), rows.device)
    sums = [(_mix(_mix((_mix(_words(tile) * FIRST) * weights).sum(dim=1) + size)) * powers[: len(tile)]).sum()
            for tile in tiles]  # fmt: skip
    step, number = pow(THIRD, len(tiles[0]), 1 << 64), 0
    for found in reversed(torch.stack(sums).tolist()):
        number = (number * step + found) & ALL
    return len(rows), number


def _powers(count: int, device: torch.device) -> torch.Tensor:
    """THIRD to the powers 0 .. count - 1, modulo 2^64: [count] int64."""
    powers, step = torch.ones(1, dtype=torch.int64, device=device), THIRD
    while len(powers) < count:
        powers = torch.cat([powers, powers * _signed(step)])
        step = step * step & ALL
    return powers[:count]


def _signed(number: int) -> int:
    return number - (number >> 63 << 64)


def _words(rows: torch.Tensor) -> torch.Tensor:
    """The values of rows [R, C] as 64-bit words: four floats as bf16 in each, or one integer."""
    if not rows.is_floating_point():
        return rows.long()
    rows = torch.nn.functional.pad(rows.to(torch.bfloat16), (0, -rows.shape[1] % 4))
    return rows.contiguous().view(torch.int64)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """Spread the upper half of each word over the lower one; different words stay different."""
    return (words ^ ((words >> 32) & LOW_HALF)) * SECOND
