"""One indexer layer's weights, outside of any format and of any module."""

from dataclasses import dataclass, fields
from typing import Self

import torch

from data_gen.core.errors import InputError
from indexer_train.scorer import LayerEncoder

EXACT = (torch.float32, torch.bfloat16, torch.float16)
"""What fp32 holds exactly, without a scale."""


@dataclass(frozen=True)
class LayerWeights:
    """What every format stores of one layer, fp32 on the CPU.

    wq_a: [R, hidden]; q_norm: [R]; wq_b: [H * d, R], head-major; weights_proj: [H, hidden].
    """

    wq_a: torch.Tensor
    q_norm: torch.Tensor
    wq_b: torch.Tensor
    weights_proj: torch.Tensor

    @classmethod
    def checked(cls, where: str, **tensors: torch.Tensor) -> Self:
        """Convert to fp32 (exact from narrower floats). Raises InputError, naming `where`, for shapes of no layer."""
        for name, tensor in tensors.items():
            plain = tensor.layout == torch.strided and tensor.ndim == (1 if name == "q_norm" else 2)
            if tensor.dtype not in EXACT or not plain or not tensor.numel():
                kind = "" if tensor.layout == torch.strided else f"{tensor.layout} "
                raise InputError(
                    f"{where}: {name} is {kind}{tensor.dtype} {list(tensor.shape)}, not weights in fp32, bf16 or fp16"
                )
            if not bool(tensor.isfinite().all()):
                raise InputError(f"{where}: {name} holds NaN or infinity; the file is damaged")
        weights = cls(**{name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()})
        rank, hidden = weights.wq_a.shape
        agree = len(weights.q_norm) == weights.wq_b.shape[1] == rank and weights.weights_proj.shape[1] == hidden
        if not agree or weights.wq_b.shape[0] % weights.heads:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            raise InputError(f"{where}: shapes do not belong together: {shapes}")
        return weights

    @classmethod
    def of(cls, encoder: LayerEncoder) -> Self:
        """The weights of a trained layer."""
        return cls(**{name: value.detach().to("cpu", torch.float32).clone() for name, value in _places(encoder)})

    @property
    def heads(self) -> int:
        """H."""
        return len(self.weights_proj)

    @property
    def rank(self) -> int:
        """R."""
        return len(self.q_norm)

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return self.wq_a.shape[1]

    @property
    def width(self) -> int:
        """d, of keys and of one head's query."""
        return len(self.wq_b) // self.heads

    @torch.no_grad()
    def copy_into(self, encoder: LayerEncoder) -> None:
        """Overwrite the leading heads and ranks of `encoder`, which may have more; the rest stays as it was drawn."""
        for name, place in _places(encoder):
            value = getattr(self, name)
            place[tuple(slice(size) for size in value.shape)].copy_(value)


def _places(encoder: LayerEncoder) -> list[tuple[str, torch.Tensor]]:
    names = [field.name for field in fields(LayerWeights)]
    return [(name, getattr(encoder, name).weight) for name in names]
