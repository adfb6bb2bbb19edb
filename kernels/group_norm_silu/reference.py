"""GroupNorm + SiLU in plain torch: what every backend is compared with, and the last fallback."""

import torch
import torch.nn.functional as F


def group_norm_silu_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    activation: bool = True,
) -> torch.Tensor:
    """y = silu(γ · (x − μ_g) / √(σ²_g + eps) + β), the mean and biased variance taken over each group.

    x is (N, C, *spatial), weight and bias are (C,); y has x's shape, dtype and memory format.
    """
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if activation else y
