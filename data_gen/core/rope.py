"""Rotary positions of DeepSeek-V4's compressed branch: interleaved pairs on the last dims, plain or YaRN."""

import math
from functools import lru_cache
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from data_gen.core.errors import InputError
from data_gen.core.tensors import require


class Rope(BaseModel):
    """Which dims turn how fast, and up to which position.

    dims: rotated dims, the last of a vector; theta: base; positions: first position that is refused;
    factor: YaRN's stretch, 1 for plain RoPE; original: context in tokens before the stretch; beta_fast, beta_slow:
    turns within `original` above which a frequency is kept, and below which it is divided by `factor`.
    DeepSeek-V4: 64 dims, theta 160000, factor 16, original 65536, betas 32 and 1, 1048576 positions, no mscale.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dims: PositiveInt
    theta: PositiveFloat
    positions: PositiveInt
    factor: PositiveFloat = 1.0
    original: PositiveInt = 65536
    beta_fast: PositiveFloat = 32.0
    beta_slow: NonNegativeFloat = 1.0

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.dims % 2:
            raise ValueError("dims must be even, because they are rotated in pairs")
        if self.beta_fast <= self.beta_slow:
            raise ValueError("beta_fast must exceed beta_slow")
        return self

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any], dims: int, positions: int) -> Self:
        """From one entry of a transformers config's `rope_parameters`. Raises InputError on a type we do not know."""
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", "yarn"):
            raise InputError(f"unknown RoPE type {kind!r}; choose `default` or `yarn`")
        settings = {"dims": dims, "theta": parameters["rope_theta"], "positions": positions}
        if kind == "yarn":
            settings |= {"factor": parameters["factor"], "original": parameters["original_max_position_embeddings"]}
            settings |= {name: parameters[name] for name in ("beta_fast", "beta_slow") if name in parameters}
        return cls(**settings)

    def frequencies(self) -> torch.Tensor:
        """[dims / 2] fp32, radians per token.

        Computed on the CPU in fp32 in the reference's order: at position 10^6 one bit more is 0.06 radians.
        """
        power = self.theta ** (torch.arange(0, self.dims, 2, dtype=torch.float32) / self.dims)
        kept, stretched = 1.0 / power, 1.0 / (self.factor * power)
        if self.factor == 1.0:
            return kept
        first = max(math.floor(self._pair_turning(self.beta_fast)), 0)
        last = min(math.ceil(self._pair_turning(self.beta_slow)), self.dims - 1)
        ramp = (torch.arange(self.dims // 2, dtype=torch.float32) - first) / max(last - first, 1e-3)
        keep = 1 - ramp.clamp(0, 1)
        return stretched * (1 - keep) + kept * keep

    def _pair_turning(self, turns: float) -> float:
        """The (fractional) pair that makes `turns` full turns within `original` tokens."""
        return self.dims * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions [...] (integers, 0-based) -> angles [..., dims / 2] fp32 = fp32(position) * frequency.

        Raises InputError beyond the configured maximum, see `check`.
        """
        self.check(positions)
        return positions[..., None].float() * _frequencies(self, positions.device)

    def check(self, positions: torch.Tensor) -> None:
        """Raise InputError at a position that is refused: a table that clamps there scores wrong distances.

        positions: integers of any shape.

        Of positions on a GPU the process ends instead, with a device assertion (`require`): check them on the
        CPU, before they move.
        """
        require(
            (positions >= 0) & (positions < self.positions),
            lambda: (
                f"positions {int(positions.min())}..{int(positions.max())} are outside 0..{self.positions - 1}, "
                "the backbone's range"
            ),
        )

    def table(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions [...] -> unit complex numbers [..., dims / 2] complex64 (the release's freqs_cis)."""
        angles = self.angles(positions)
        return torch.polar(torch.ones_like(angles), angles)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turn the last `dims` of x: [..., d] by positions, which broadcast to x.shape[:-1]. Returns [..., d] fp32."""
        fixed, turning = x.float().split([x.shape[-1] - self.dims, self.dims], dim=-1)
        angles = self.angles(positions)
        pairs = torch.view_as_complex(turning.contiguous().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * torch.complex(angles.cos(), angles.sin())).flatten(-2)
        return torch.cat([fixed, turned], dim=-1)


@lru_cache
def _frequencies(rope: Rope, device: torch.device) -> torch.Tensor:
    """Kept where they are used: a copy to a GPU would be waited for."""
    return rope.frequencies().to(device)
