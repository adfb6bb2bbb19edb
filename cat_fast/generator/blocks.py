"""Building blocks of `DiT`: transformer blocks with adaLN-Zero over packed tokens, and the output layer.

Names and shapes follow the original DiT. Its extensions (cross-attention, RoPE, QK norm, SwiGLU, adaLN shared
by all blocks) are optional.

Shapes: S sequences, T tokens, D hidden size, H heads.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import nn

from cat_fast.generator.embeddings import rotate
from cat_fast.generator.packed_text import PackedText
from cat_fast.kernels.adaln.op import adaln, gate_residual_adaln
from cat_fast.kernels.linear.layer import Linear
from cat_fast.kernels.varlen_attention.op import varlen_attention

NORM_EPS = 1e-6

Branch = tuple[torch.Tensor, torch.Tensor]
"""A pending residual update x += gate * h: h (T, D) and its gate (S, D). It is applied by the next norm, so
that one pass over the tokens does both."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockContext:
    """Inputs that all blocks share, except the residual stream."""

    condition: torch.Tensor
    """(S, D): embedded timestep, class and ratio."""
    modulation: torch.Tensor | None
    """(S, 6 D or 9 D): shifts, scales and gates shared by all blocks; None if each block computes its own."""
    cu_seqlens: torch.Tensor
    """(S + 1,) int32."""
    max_seqlen: int
    rotation: torch.Tensor | None
    """(T, D / 2H) float32 RoPE angles; None without RoPE."""
    text: PackedText | None
    """Embedded texts, one per sequence, tokens (L, D); None for a class-conditional model."""

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors to `device`; accelerate calls this for blocks on other devices."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in values.items() if hasattr(x, "to")})


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Extensions of the original block; see `DiT`."""

    qk_norm: bool
    swiglu: bool
    shared_adaln: bool
    cross_attention: bool


class DiTBlock(nn.Module):
    """x += gate * f(modulate(norm(x))), where f is self-attention, cross-attention (with text) and an MLP."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, options: BlockOptions) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, options.qk_norm)
        if options.cross_attention:
            self.cross_attn = CrossAttention(hidden_size, num_heads, options.qk_norm)
        self.mlp = (SwiGLU if options.swiglu else Mlp)(hidden_size, mlp_ratio)
        self.parts = 9 if options.cross_attention else 6
        if options.shared_adaln:  # PixArt's adaLN-single: each block adds its own constants
            self.modulation_table = nn.Parameter(torch.zeros(self.parts * hidden_size))
        else:
            self.adaLN_modulation = modulation(hidden_size, self.parts)

    def forward(
        self, x: torch.Tensor, branch: Branch | None, context: BlockContext
    ) -> tuple[torch.Tensor, Branch]:
        """Return x (T, D) with the pending `branch` added, and the branch this block leaves pending."""
        if context.modulation is None:
            parts = self.adaLN_modulation(context.condition)
        else:
            parts = context.modulation + self.modulation_table
        shift1, scale1, gate1, shift2, scale2, gate2, *cross = parts.chunk(self.parts, dim=1)
        cu_seqlens = context.cu_seqlens
        x, y = add_and_modulate(x, branch, shift1, scale1, cu_seqlens)
        branch = self.attn(y, context), gate1
        if context.text is not None:
            shift, scale, gate = cross
            x, y = add_and_modulate(x, branch, shift, scale, cu_seqlens)
            branch = self.cross_attn(y, context.text, context), gate
        x, y = add_and_modulate(x, branch, shift2, scale2, cu_seqlens)
        return x, (self.mlp(y), gate2)


class Attention(nn.Module):
    """Multi-head self-attention within each sequence."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)
        self.q_norm, self.k_norm = head_norms(hidden_size // num_heads, qk_norm)

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)  # [T, H, D / H]
        q, k = self.q_norm(q), self.k_norm(k)
        if context.rotation is not None:
            q, k = rotate(q, context.rotation), rotate(k, context.rotation)
        out = varlen_attention(q, k, v, context.cu_seqlens, context.max_seqlen)
        return self.proj(out.flatten(1))


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of each sequence to those of its text."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(hidden_size, hidden_size)
        self.kv = Linear(hidden_size, 2 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)
        self.q_norm, self.k_norm = head_norms(hidden_size // num_heads, qk_norm)

    def forward(self, x: torch.Tensor, text: PackedText, context: BlockContext) -> torch.Tensor:
        q = self.q_norm(self.q(x).unflatten(1, (self.num_heads, -1)))
        k, v = self.kv(text.tokens).view(text.tokens.shape[0], 2, self.num_heads, -1).unbind(1)
        k = self.k_norm(k)
        out = varlen_attention(
            q, k, v, context.cu_seqlens, context.max_seqlen, text.cu_seqlens, text.max_seqlen
        )
        return self.proj(out.flatten(1))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        inner_size = int(hidden_size * mlp_ratio)
        self.fc1 = Linear(hidden_size, inner_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """(silu(x W1) * x W2) W3 (Shazeer, arXiv:2002.05202), two thirds as wide to match `Mlp` in parameters."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        inner_size = round(hidden_size * mlp_ratio * 2 / 3)
        self.fc1 = Linear(hidden_size, 2 * inner_size)
        self.fc2 = Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.fc1(x).chunk(2, dim=1)
        return self.fc2(nn.functional.silu(gate) * up)


class FinalLayer(nn.Module):
    """Modulated norm and linear projection to (T, C)."""

    def __init__(self, hidden_size: int, token_dim: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, token_dim)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(
        self, x: torch.Tensor, branch: Branch | None, condition: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        _x, y = add_and_modulate(x, branch, shift, scale, cu_seqlens)
        return self.linear(y)


def modulation(hidden_size: int, parts: int) -> nn.Sequential:
    """Return the adaLN-Zero layer: (S, D) conditioning -> (S, parts * D) shifts, scales and gates."""
    return nn.Sequential(nn.SiLU(), Linear(hidden_size, parts * hidden_size))


def head_norms(head_dim: int, qk_norm: bool) -> tuple[nn.Module, nn.Module]:
    """Return the norms of queries and keys (T, H, D / H): an RMS norm over each head, or the identity."""
    if not qk_norm:
        return nn.Identity(), nn.Identity()
    return HeadNorm(head_dim, NORM_EPS), HeadNorm(head_dim, NORM_EPS)


class HeadNorm(nn.RMSNorm):
    """RMS norm whose weight is cast to the activations' dtype, as autocast does for linear layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def add_and_modulate(
    x: torch.Tensor,
    branch: Branch | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x with the pending branch added, and norm(x) * (1 + scale) + shift; scale, shift: (S, D)."""
    if branch is None:
        return x, adaln(x, shift, scale, cu_seqlens, NORM_EPS)
    h, gate = branch
    return gate_residual_adaln(x, h, gate, shift, scale, cu_seqlens, NORM_EPS)
