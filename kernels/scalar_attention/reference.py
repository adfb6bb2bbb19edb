"""Attention with head dimension 1 in plain torch: the reference for every backend."""

import torch

from ..sdpa import scaled_dot_product_attention


def scalar_attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute y_i = Σ_j e^{q_i k_j} v_j / Σ_j e^{q_i k_j} per head and sample.

    q, k, v: (B, N, H), with H heads of dimension 1, so that the usual scale 1 / √D is 1. Computed in fp32 or
    wider; y has q's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BHN1, k_BHN1, v_BHN1 = (x.to(dtype).transpose(1, 2).unsqueeze(-1) for x in (q, k, v))
    y_BHN1 = scaled_dot_product_attention(q_BHN1, k_BHN1, v_BHN1, scale=1.0)
    return y_BHN1.squeeze(-1).transpose(1, 2).to(q.dtype)
