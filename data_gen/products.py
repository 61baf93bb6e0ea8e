"""Matrix products without a gradient. On the CPU oneDNN's are used: PyTorch's default library leaves AVX-512 unused on
AMD processors, and half of their speed with it.
"""

import torch


def product(x: torch.Tensor, weight: torch.Tensor, relu: bool = False) -> torch.Tensor:
    """x weight^T, negative values set to zero if asked. x: [M, K]; weight: [N, K]. Returns [M, N]."""
    if x.is_cpu and x.dtype == weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), None, "relu" if relu else "none", [], "")
    found = torch.mm(x, weight.T)
    return found.relu_() if relu else found


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """Rows (or columns) with gaps between them would be multiplied by a slow reference kernel."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()
