"""torch's scaled dot product attention (SDPA), made differentiable any number of times.

The fused kernels behind F.scaled_dot_product_attention have gradients, but no second derivatives and no
forward mode. Those are computed from the formula, with a matrix of N x M weights per head.
"""

import torch
import torch.nn.functional as F

from . import derivatives
from .autocast import autocast


def scaled_dot_product_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Compute softmax(q kᵀ · scale) v; by default, the scale is 1 / √D.

    q: (..., N, D). k, v: (..., M, D). Outputs and gradients are those of F.scaled_dot_product_attention, bit
    for bit.
    """

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = autocast(q, k, v)
        return _formula(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)

    return derivatives.with_formula(formula, function, q, k, v)


def _formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute attention in fp32 or wider; the result has q's dtype."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        weights = torch.softmax(scale * q.to(dtype) @ k.to(dtype).transpose(-2, -1), dim=-1)
        return (weights @ v.to(dtype)).to(q.dtype)
