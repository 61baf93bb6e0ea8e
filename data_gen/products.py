"""Matrix products without a gradient. On CPUs with AVX-512 oneDNN's are used: PyTorch's default library leaves it
unused on AMD processors, and half of their speed with it. On others the default library is a little faster.
"""

import torch

ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: torch.Tensor, weight: torch.Tensor, relu: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T, negative values set to zero if asked. x: [M, K]; weight: [N, K]. Returns [M, N].

    out: [M, N], memory that may be used for the result: a loop need not ask the system for more each time.
    """
    if ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.float32 and x.numel():  # it refuses empty sums
        found = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), None, "none", [], "")
    else:
        found = torch.mm(x, weight.T, out=out)
    return found.relu_() if relu else found  # oneDNN's own turns NaN into zero


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """Rows (or columns) with gaps between them would be multiplied by a slow reference kernel."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()
