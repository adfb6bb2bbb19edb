"""GroupNorm + SiLU in plain torch: the reference for every backend, and the last fallback."""

import torch
import torch.nn.functional as F


def group_norm_silu_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    activation: bool = True,
    input_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute y = silu(γ · (x − μ_g) / √(σ²_g + eps) + β) with mean and biased variance per group g.

    x is (N, C, *spatial), weight and bias are (C,). With input_bias (C,), x + input_bias takes the place of
    x. Computed in the wider dtype of x and weight, so that fp32 parameters keep their precision with bf16
    activations; y has x's dtype.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    wide = x.to(dtype)
    if input_bias is not None:
        wide = wide + per_channel(input_bias.to(dtype), x)
    y = F.group_norm(wide, groups, weight.to(dtype), bias.to(dtype), eps)
    return (F.silu(y) if activation else y).to(x.dtype)


def per_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a view of `values` (C,) that broadcasts along the channels of x (N, C, *spatial)."""
    return values.view(-1, *[1] * (x.dim() - 2))
