"""Bytes of one cached entry in one layer, as serving engines store it.

The planner counts them from a configuration, a trace's manifest from the model that was read, Level 2 from its pages.
"""

from data_gen.core.key_bytes import SCALE_BYTES

BLOCK, LATENT_BLOCK = 64, 128
"""fp8 values that share a scale: of DeepSeek-V4's entries (one byte), of latents under DSA (fp32)."""
ALIGNMENT = 8
"""DeepSeek-V4's entries are padded to a multiple of this."""
BF16, FP32 = 2, 4


def index_key_bytes(width: int) -> int:
    """An index key of `width` numbers in fp8 and its scale: 132 bytes for 128."""
    return width + SCALE_BYTES


def compressed_bytes(still: int, rope: int) -> int:
    """DeepSeek-V4: `still` numbers in fp8, `rope` numbers that turn in bf16, scales, padding: 584 bytes for 448, 64."""
    return -(-(still + BF16 * rope + -(-still // BLOCK)) // ALIGNMENT) * ALIGNMENT


def latent_bytes(latent: int, rope: int) -> int:
    """Under DSA: `latent` numbers in fp8 with their scales, `rope` numbers that turn in bf16: 656 bytes for 512, 64."""
    return latent + FP32 * -(-latent // LATENT_BLOCK) + BF16 * rope
