"""A model as the planner sees it: what it caches and reads per token, and what its weights are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from data_gen.core.errors import InputError
from data_gen.core.files import one_line

StoredBytes = Callable[[int, int], int]
"""(rows, columns) of a matrix -> the bytes it takes, quantisation scales included."""

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
UNNAMED_DTYPE = "bfloat16"
"""Assumed, and said in the plan, when a configuration names no dtype."""
KEY_BYTES = 2
"""Of a number of a chunk key, but for DeepSeek-V4's: fp16."""
MX_BLOCK = 32
"""fp4 values that share a one-byte scale (OCP microscaling)."""


@dataclass(frozen=True)
class Cache:
    """One kind of entry that decoding keeps and reads.

    name: the entries; reader: the work done with them; layers: layers that keep them; tokens: tokens after one entry;
    entry_bytes, read_flops: for one entry in one layer; window: newest tokens kept, None for all; top: most entries
    read per token, None for all that are there; paged: lookahead sparse attention keeps only the resident ones.
    """

    name: str
    reader: str
    layers: int
    tokens: int
    entry_bytes: int
    read_flops: int
    window: int | None = None
    top: int | None = None
    paged: bool = False

    def entries(self, context: int) -> int:
        """Entries in one layer after `context` tokens."""
        return (context if self.window is None else min(context, self.window)) // self.tokens

    def read(self, entries: int) -> int:
        """How many of `entries` one decoded token reads."""
        return entries if self.top is None else min(entries, self.top)


@dataclass(frozen=True)
class Weight:
    """Weights of one term, over all layers.

    values: how many there are; used: how many of them one token is multiplied with (the chosen experts' only; none of
    an embedding or a norm); stored: bytes.
    """

    term: str
    values: int
    used: int
    stored: int


@dataclass(frozen=True)
class Model:
    """Everything that a plan needs to know of a model.

    positions: longest context it was made for; chunk_tokens: tokens in one chunk; key_width, key_bytes: the vector that
    stands for a chunk in one layer, and how it is stored; state_bytes: scratch of one request that does not grow;
    extra_flops: matrix products per token that are neither weights nor attention, by term; dtype_named: whether the
    configuration says the dtype of what is not quantised.
    """

    name: str
    hidden: int
    positions: int
    chunk_tokens: int
    key_width: int
    key_bytes: int
    caches: tuple[Cache, ...]
    weights: tuple[Weight, ...]
    state_bytes: int
    extra_flops: dict[str, int]
    dtype_named: bool


def matrix(term: str, stored: StoredBytes, rows: int, columns: int, count: int = 1, used: int | None = None) -> Weight:
    """`count` equal matrices, of which one token is multiplied with `used` (None: all of them)."""
    values = rows * columns
    return Weight(term, count * values, (count if used is None else used) * values, count * stored(rows, columns))


def check_sizes(name: str, config: Any, fields: tuple[str, ...]) -> None:
    """Raise InputError unless each of `fields` is one positive whole number."""
    for field in fields:
        value = getattr(config, field, None)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: model type {config.model_type}: {field} is {value}, not one positive number")


def dtype_bytes(name: str, config: Any) -> int:
    """Bytes of one unquantised number. Raises InputError on a dtype that is not a float of DTYPE_BYTES."""
    dtype = str(config.dtype or UNNAMED_DTYPE).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise InputError(f"{name}: dtype {dtype}; known are {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def plain(bytes_each: int) -> StoredBytes:
    """Storage without quantisation."""
    return lambda rows, columns: rows * columns * bytes_each


def formats(name: str, config: Any) -> tuple[StoredBytes, StoredBytes, StoredBytes]:
    """Storage of unquantised weights, of quantised ones, and of routed experts.

    Raises InputError for another scheme.
    """
    usual = plain(dtype_bytes(name, config))
    scheme = getattr(config, "quantization_config", None)
    if scheme is None:
        return usual, usual, usual
    if scheme.get("quant_method") != "fp8" or scheme.get("expert_dtype") not in (None, "fp4"):
        raise InputError(f"{name}: weights are known as fp8 with fp8 or fp4 experts, or unquantised; not {scheme}")
    rows_block, columns_block = scheme["weight_block_size"]
    scale = 1 if scheme.get("scale_fmt") == "ue8m0" else DTYPE_BYTES["float32"]

    def fp8(rows: int, columns: int) -> int:
        return rows * columns + scale * -(-rows // rows_block) * -(-columns // columns_block)

    def fp4(rows: int, columns: int) -> int:
        return rows * -(-columns // 2) + rows * -(-columns // MX_BLOCK)

    return usual, fp8, fp4 if scheme.get("expert_dtype") == "fp4" else fp8


def count_module(name: str, config: Any) -> tuple[int, int]:
    """(all parameters, those in linear layers) of transformers' module, built without memory.

    Raises InputError where transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever its module trips over, the configuration is all that it was given
        raise InputError(f"{name}: transformers builds no causal model of it ({one_line(error)})") from error
    linear = sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear))
    return sum(parameter.numel() for parameter in model.parameters()), linear
