"""Level 1's queries in Triton: hidden states of all layers to packed queries in two launches, weights in bf16.

The first launch computes what each layer reads from the hidden state: its latent, head weights and other terms. In the
second a program norms a latent, multiplies it with the weights of one head, turns that head as the keys are turned
(RoPE, Hadamard), and writes it where the packed query has it. Either is a pass over the weights and little else.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from data_gen.core.key_bytes import hadamard
from indexer_train.scorer import Scorer

STORED = torch.bfloat16
"""Of weights, and of what they are multiplied with. The interpreter lacks products of it."""
BATCH = tl.constexpr(16)
"""Sequences that share a pass over the weights: a product needs as many."""
ROWS, DEPTH, HEAD_DEPTH = 32, 128, 64
"""Tiles of weights: rows of the first launch, columns of either."""
HEAD_OPTIONS = {"num_warps": 4, "maxnreg": 168}
"""Three programs an SM, so that 384 heads run at once."""


class QueryWeights:
    """A copy of a scorer's weights as the kernels read them, as they are now; keys of kind fp8_rope_hadamard.

    first: [L, rank + rest, hidden], latents, then head weights, bumps, scale, slot and bias; second: [L, H d, rank].
    """

    def __init__(self, scorer: Scorer) -> None:
        spec = self.spec = scorer.spec
        encoders = [scorer.encoder(layer) for layer in spec.layers]
        device, width, heads = scorer.device, spec.key_width, spec.shape.heads
        rest = spec.packed.size - heads * width
        first = torch.zeros(len(encoders), spec.shape.rank + rest, spec.hidden, device=device)
        self.added = torch.zeros(len(encoders), rest, device=device)
        for rows, added, encoder in zip(first, self.added, encoders, strict=True):
            parts = [encoder.wq_a.weight, encoder.weights_proj.weight * encoder.weight_scale]
            if encoder.extras is not None:
                parts.append(encoder.extras.weight)
                added[heads : heads + len(encoder.extras.bias)] = encoder.extras.bias.detach()
            if scorer.bias is not None:
                added[-1] = scorer.bias.detach()
            known = torch.cat(parts).detach()
            rows[: len(known)] = known
        self.first = first.to(STORED)
        self.second = torch.stack([encoder.wq_b.weight.detach() for encoder in encoders]).to(STORED)
        self.norms = torch.stack([encoder.q_norm.weight.detach() for encoder in encoders]).float()
        self.frequencies = torch.zeros(width, device=device)
        signs = hadamard(torch.eye(width)).sign()
        crossed = torch.zeros_like(signs)  # of each pair (x, y) Hadamard's signs of (-y, x)
        if spec.rope is not None:
            start = width - spec.rope.dims
            self.frequencies[start:] = spec.rope.frequencies().to(device).repeat_interleave(2)
            crossed[:, start::2], crossed[:, start + 1 :: 2] = signs[:, start + 1 :: 2], -signs[:, start::2]
        self.signs, self.crossed = signs.half().to(device), crossed.half().to(device)

    def pack(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `Scorer.pack`: [B, L, hidden] at `positions` [B] -> packed queries [B, L size + 1] fp32."""
        spec, device = self.spec, self.first.device
        if spec.rope is not None:
            spec.rope.check(positions)
        batch, layers, depth = hidden.shape
        rank, heads, width, size = spec.shape.rank, spec.shape.heads, spec.key_width, spec.packed.size
        states, positions = hidden.to(device, STORED).contiguous(), positions.to(device)
        latents = torch.empty(batch, layers, rank, device=device)
        packed = torch.empty(batch, layers * size + 1, device=device)
        packed[:, -1] = positions
        groups = triton.cdiv(batch, BATCH.value)
        first_kernel[(layers * triton.cdiv(self.first.shape[1], ROWS), groups)](
            states, self.first, self.added, latents, packed, batch, depth,
            layers, rank, self.first.shape[1] - rank, size, ROWS, DEPTH, num_warps=4,
        )  # fmt: skip
        head_kernel[(layers * heads, groups)](
            latents, self.norms, self.second, positions, self.frequencies, self.signs, self.crossed, packed, batch,
            layers, rank, heads, width, size, width**-0.5, HEAD_DEPTH, **HEAD_OPTIONS,
        )  # fmt: skip
        return packed


@triton.jit
def first_kernel(
    states,  # [B, L, depth] bf16
    weights,  # [L, RANK + REST, depth] bf16
    added,  # [L, REST] fp32
    latents,  # [B, L, RANK] fp32
    packed,  # [B, L * SIZE + 1] fp32
    batch,
    depth,
    LAYERS: tl.constexpr,
    RANK: tl.constexpr,
    REST: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Grid (L * blocks of ROWS, groups of BATCH)."""
    blocks: tl.constexpr = (RANK + REST + ROWS - 1) // ROWS
    layer, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    sequence = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    real, there = (sequence < batch)[None, :], (row < RANK + REST)[:, None]
    of_row = (layer * (RANK + REST) + row).to(tl.int64)[:, None] * depth
    of_sequence = (sequence.to(tl.int64) * LAYERS + layer)[None, :]
    found = tl.zeros([ROWS, BATCH], tl.float32)
    for start in tl.range(0, depth, DEPTH, num_stages=4):
        at = start + tl.arange(0, DEPTH)
        tile = tl.load(weights + of_row + at[None, :], mask=there & (at < depth)[None, :], other=0.0)
        state = tl.load(states + of_sequence * depth + at[:, None], mask=real & (at < depth)[:, None], other=0.0)
        found = tl.dot(tile, state, found)
    tl.store(latents + of_sequence * RANK + row[:, None], found, mask=real & (row < RANK)[:, None])
    rest = row[:, None] - RANK
    found += tl.load(added + layer * REST + rest, mask=there & (rest >= 0), other=0.0)
    out = packed + sequence.to(tl.int64)[None, :] * (LAYERS * SIZE + 1) + (layer + 1) * SIZE - REST + rest
    tl.store(out, found, mask=real & there & (rest >= 0))


@triton.jit
def head_kernel(
    latents,  # [B, L, RANK] fp32
    norms,  # [L, RANK] fp32
    weights,  # [L, HEADS * WIDTH, RANK] bf16
    positions,  # [B] int64
    frequencies,  # [WIDTH] fp32, radians per token; 0 for values that do not turn
    signs,  # [WIDTH, WIDTH] fp16, Hadamard's
    crossed,  # [WIDTH, WIDTH] fp16
    packed,  # [B, L * SIZE + 1] fp32
    batch,
    LAYERS: tl.constexpr,
    RANK: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Grid (L * HEADS, groups of BATCH)."""
    layer, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    value = tl.arange(0, WIDTH)
    sequence = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    real = sequence < batch
    of_value = (tl.program_id(0) * WIDTH + value).to(tl.int64)[:, None] * RANK
    of_sequence = (sequence.to(tl.int64) * LAYERS + layer)[None, :] * RANK
    query, squares = tl.zeros([WIDTH, BATCH], tl.float32), tl.zeros([BATCH], tl.float32)
    for start in tl.range(0, RANK, DEPTH, num_stages=3):
        at = start + tl.arange(0, DEPTH)
        latent = tl.load(latents + of_sequence + at[:, None], mask=real[None, :] & (at < RANK)[:, None], other=0.0)
        norm = tl.load(norms + layer * RANK + at, mask=at < RANK, other=0.0)
        tile = tl.load(weights + of_value + at[None, :], mask=(at < RANK)[None, :], other=0.0)
        squares += tl.sum(latent * latent, 0)
        query = tl.dot(tile, (latent * norm[:, None]).to(weights.dtype.element_ty), query)
    query *= tl.rsqrt(squares / RANK + 1e-6)[None, :]  # the epsilon of LayerEncoder's norm
    place = tl.load(positions + sequence, mask=real, other=0).to(tl.float32)
    angle = tl.load(frequencies + value)[:, None] * place[None, :]
    # A turn is x cos + (-y, x) sin, and Hadamard's signs of that are two products. Level 1 rounds to fp16 anyway.
    square = value[:, None] * WIDTH + value[None, :]
    turned = tl.dot(tl.load(signs + square), (query * tl.cos(angle)).to(tl.float16))
    turned = tl.dot(tl.load(crossed + square), (query * tl.sin(angle)).to(tl.float16), turned)
    out = packed + sequence.to(tl.int64)[None, :] * (LAYERS * SIZE + 1) + layer * SIZE + head * WIDTH + value[:, None]
    tl.store(out, turned * UNIT, mask=real[None, :])
