"""Write parity.safetensors: `python tests/golden/make_parity.py [FILE]`. float64 NumPy, nothing of the package.

README.md beside this file says what the tensors are. fp32 appears only where the format itself says so.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, RANK, HEADS, WIDTH, ROPE = 32, 16, 16, 128, 64
CHUNK, SELECTED = 4, 8
POSITIONS = [0, 63, 65535, 65536, 131071, 1048575]
CHUNKS = [*range(16), 8191, 12345, *range(16376, 16384), 16384, 16385, 32766, 32767, 100000, 200000, 262142, 262143]


def frequencies():
    """YaRN with base 160000, factor 16, original context 65536, betas 32 and 1: fp32, radians per token."""
    exponent = np.arange(0, ROPE, 2, dtype=np.float32) / np.float32(ROPE)
    power = (160000.0 ** exponent.astype(np.float64)).astype(np.float32)
    kept, stretched = np.float32(1) / power, np.float32(1) / (np.float32(16) * power)
    ramp = np.clip((np.arange(ROPE // 2, dtype=np.float32) - np.float32(15)) / np.float32(10), 0, 1)
    keep = np.float32(1) - ramp
    return stretched * (np.float32(1) - keep) + kept * keep


def rope(x, positions):
    """Turn interleaved pairs of the last 64 dims by fp32(position) * fp32(frequency). x: [P, ..., 128]."""
    angle = (np.asarray(positions, np.float32)[:, None] * frequencies()).astype(np.float64)
    angle = angle.reshape(len(angle), *[1] * (x.ndim - 2), -1)
    pairs = x[..., WIDTH - ROPE :].reshape(*x.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    turned = np.stack([turned.real, turned.imag], axis=-1).reshape(*x.shape[:-1], ROPE)
    return np.concatenate([x[..., : WIDTH - ROPE], turned], axis=-1)


def hadamard(x):
    """Times the Sylvester matrix / sqrt(128)."""
    matrix = np.ones((1, 1))
    while len(matrix) < WIDTH:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return x @ matrix / np.sqrt(WIDTH)


def fp8_values():
    """float8_e4m3fn by code: sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7f and 0xff are NaN."""
    codes = np.arange(256)
    sign, exponent, mantissa = np.where(codes & 0x80, -1.0, 1.0), (codes >> 3) & 15, codes & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where((codes & 0x7F) == 0x7F, np.nan, sign * value)


def encode(keys):
    """[K, 128] fp32 -> [K, 132] bytes; the rule's divisions and products are single fp32 operations."""
    scale = np.maximum(np.float32(1e-4), np.abs(keys).max(axis=1, keepdims=True)) / np.float32(448)
    scaled = np.clip((keys * (np.float32(1) / scale)).astype(np.float64), -448, 448)
    distance = np.abs(np.abs(scaled)[..., None] - fp8_values()[:0x7F])  # [K, 128, 127]
    nearest = distance.argmin(axis=-1)  # the lower of two equally near codes ...
    tie = np.take_along_axis(distance, np.minimum(nearest + 1, 0x7E)[..., None], -1)[..., 0] == distance.min(axis=-1)
    nearest = np.where(tie & (nearest % 2 == 1), nearest + 1, nearest)  # ... unless the upper one is even
    codes = (nearest | np.where(np.signbit(scaled), 0x80, 0)).astype(np.uint8)
    return np.concatenate([codes, scale.astype("<f4").view(np.uint8)], axis=1)


def decode(rows):
    """[K, 132] bytes -> [K, 128]."""
    return fp8_values()[rows[:, :128]] * np.ascontiguousarray(rows[:, 128:]).view("<f4").astype(np.float64)


def draw():
    """Weights, hidden states and keys before RoPE, all fp32; hidden states are bf16 numbers."""
    random = np.random.default_rng(20260609)

    def normal(*shape, std=1.0):
        return (random.standard_normal(shape) * std).astype(np.float32)

    hidden = (normal(len(POSITIONS), HIDDEN).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return {
        "wq_a.weight": normal(RANK, HIDDEN, std=HIDDEN**-0.5),
        "q_norm_weight": 1 + normal(RANK, std=0.1),
        "wq_b.weight": normal(HEADS * WIDTH, RANK, std=RANK**-0.5),
        "weights_proj.weight": normal(HEADS, HIDDEN),
        "hidden": hidden,
        "keys": normal(len(CHUNKS), WIDTH) * np.exp(normal(len(CHUNKS), 1)),
    }


def make():
    """All tensors by name."""
    given = draw()
    positions, chunks = np.array(POSITIONS), np.array(CHUNKS)
    visible = chunks < (positions[:, None] + 1) // CHUNK
    wide = {name: value.astype(np.float64) for name, value in given.items()}
    latent = wide["hidden"] @ wide["wq_a.weight"].T
    latent = latent / np.sqrt((latent**2).mean(axis=1, keepdims=True) + 1e-6) * wide["q_norm_weight"]
    query = rope((latent @ wide["wq_b.weight"].T).reshape(-1, HEADS, WIDTH), positions)
    weights = wide["hidden"] @ wide["weights_proj.weight"].T / np.sqrt(WIDTH * HEADS)
    tensors = given | {
        "positions": positions,
        "chunks": chunks,
        "frequencies": frequencies(),
        "expected.weights": weights,
        "visible": visible.astype(np.uint8),
    }
    for name, turn in (("hadamard", hadamard), ("plain", lambda x: x)):
        turned = turn(rope(wide["keys"], CHUNK * chunks)).astype(np.float32)
        rows, queries = encode(turned), turn(query)
        match = np.einsum("qhd,kd->qhk", queries, decode(rows))
        logits = np.einsum("qhk,qh->qk", np.maximum(match, 0), weights)
        order = np.argsort(np.where(visible, -logits, np.inf), axis=1, kind="stable")[:, :SELECTED]
        tensors |= {
            f"{name}.keys": turned,
            f"{name}.rows": rows,
            f"{name}.queries": queries,
            f"{name}.logits": logits,
            f"{name}.top": np.where(np.take_along_axis(visible, order, 1), chunks[order], -1),
            f"{name}.above": (visible & (logits >= 0)).astype(np.uint8),
        }
        _no_near_ties(np.where(visible, logits, np.nan))
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def _no_near_ties(logits):
    """fp32 must be able to agree on every set: nothing within 1e-3 of the threshold or of the cut."""
    assert np.nanmin(np.abs(logits)) > 1e-3
    ranked = -np.sort(-logits, axis=1)  # NaN last
    gap = ranked[:, SELECTED - 1] - ranked[:, SELECTED]
    assert np.nanmin(gap) > 1e-3


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "parity.safetensors"
    save_file(make(), out)
