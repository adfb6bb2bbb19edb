"""adaLN over packed tokens in plain torch: the reference for every backend, and the last fallback."""

import torch
import torch.nn.functional as F

from .. import derivatives


def adaln_reference(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, cu_seqlens: torch.Tensor, eps: float
) -> torch.Tensor:
    """Compute y_t = (x_t − μ_t) / √(σ²_t + eps) · (1 + scale_s) + shift_s for each token t of sequence s.

    x is (T, D); shift and scale are (S, D), expanded to tokens here. Computed in fp32 or wider; y has x's
    dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    index = _sequence_index(x, cu_seqlens)
    xhat = _layer_norm(x.to(dtype), eps)
    shift_TD, scale_TD = (rows.to(dtype).index_select(0, index) for rows in (shift, 1 + scale.to(dtype)))
    return torch.addcmul(shift_TD, xhat, scale_TD).to(x.dtype)


def gate_residual_adaln_reference(
    x: torch.Tensor,
    h: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x'_t = x_t + gate_s · h_t and y, the adaLN of x', both of x's dtype."""
    x_new = gate_residual_reference(x, h, gate, cu_seqlens)
    return x_new, adaln_reference(x_new, shift, scale, cu_seqlens, eps)


def gate_residual_reference(
    x: torch.Tensor, h: torch.Tensor, gate: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Return x'_t = x_t + gate_s · h_t, of x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    gate_TD = gate.to(dtype).index_select(0, _sequence_index(x, cu_seqlens))
    return torch.addcmul(x.to(dtype), gate_TD, h.to(dtype)).to(x.dtype)


def _layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return F.layer_norm over the last dimension.

    Its own third derivatives and its nested forward-mode derivatives are wrong.
    """

    def function(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=eps)

    def formula(x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()

    return derivatives.with_formula(formula, function, x)


def _sequence_index(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return, as int64 (T,), the index of the sequence that each token of x (T, D) belongs to."""
    index = torch.arange(cu_seqlens.shape[0] - 1, device=x.device)
    # Passing output_size avoids a device synchronization.
    return index.repeat_interleave(cu_seqlens.diff(), output_size=x.shape[0])
