"""What a `DiT` is built of: transformer blocks with adaLN-Zero over packed tokens, and the output layer.

Names and shapes are the original DiT's; what it does not have (cross-attention, RoPE, normalised queries and
keys, SwiGLU, one modulation for all blocks) is built only where a model asks for it.

Shapes: S sequences, T tokens, D hidden size, H heads.
"""

from dataclasses import dataclass

import torch
from torch import nn

from cat_fast.generator.embeddings import rotate
from cat_fast.generator.packed_text import PackedText
from cat_fast.kernels.adaln.op import adaln, gate_residual_adaln
from cat_fast.kernels.varlen_attention.op import varlen_attention

NORM_EPS = 1e-6

Branch = tuple[torch.Tensor, torch.Tensor]
"""What the residual stream x is still to receive, x += gate * h: h (T, D) and its gate (S, D). It waits for
the next norm, so that one pass over the tokens does both."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Surroundings:
    """What every block sees beside its input."""

    condition: torch.Tensor
    """(S, D): timestep, class and ratio."""
    modulation: torch.Tensor | None
    """(S, 6 D or 9 D): shifts, scales and gates that all blocks share; None where each makes its own."""
    cu_seqlens: torch.Tensor
    """(S + 1,) int32."""
    max_seqlen: int
    rotation: torch.Tensor | None
    """(T, D / 2H) float32 angles of RoPE, if the model has it."""
    text: PackedText | None
    """Embedded text, a text for each sequence, of tokens (L, D)."""


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What a block has beside the original's layers; see `DiT`."""

    qk_norm: bool
    swiglu: bool
    shared_adaln: bool
    cross_attention: bool


class DiTBlock(nn.Module):
    """x += gate * f(modulate(norm(x))): f attention, then cross-attention if there is text, then an MLP."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, options: BlockOptions) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, options.qk_norm)
        if options.cross_attention:
            self.cross_attn = CrossAttention(hidden_size, num_heads, options.qk_norm)
        self.mlp = (SwiGLU if options.swiglu else Mlp)(hidden_size, mlp_ratio)
        self.parts = 9 if options.cross_attention else 6
        if options.shared_adaln:  # as PixArt's adaLN-single: a block adds its own constants
            self.modulation_table = nn.Parameter(torch.zeros(self.parts * hidden_size))
        else:
            self.adaLN_modulation = modulation(hidden_size, self.parts)

    def forward(
        self, x: torch.Tensor, branch: Branch | None, around: Surroundings
    ) -> tuple[torch.Tensor, Branch]:
        """x (T, D) and the last block's branch -> x, and the branch of this block."""
        if around.modulation is None:
            parts = self.adaLN_modulation(around.condition)
        else:
            parts = around.modulation + self.modulation_table
        shift1, scale1, gate1, shift2, scale2, gate2, *cross = parts.chunk(self.parts, dim=1)
        cu_seqlens = around.cu_seqlens
        x, y = receive(x, branch, shift1, scale1, cu_seqlens)
        branch = self.attn(y, around), gate1
        if around.text is not None:
            shift, scale, gate = cross
            x, y = receive(x, branch, shift, scale, cu_seqlens)
            branch = self.cross_attn(y, around.text, around), gate
        x, y = receive(x, branch, shift2, scale2, cu_seqlens)
        return x, (self.mlp(y), gate2)


class Attention(nn.Module):
    """Multi-head self-attention in which a token sees its own sequence only."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm, self.k_norm = head_norms(hidden_size // num_heads, qk_norm)

    def forward(self, x: torch.Tensor, around: Surroundings) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)  # [T, H, D / H]
        q, k = self.q_norm(q), self.k_norm(k)
        if around.rotation is not None:
            q, k = rotate(q, around.rotation), rotate(k, around.rotation)
        out = varlen_attention(q, k, v, around.cu_seqlens, around.max_seqlen)
        return self.proj(out.flatten(1))


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence's tokens to those of its text."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm, self.k_norm = head_norms(hidden_size // num_heads, qk_norm)

    def forward(self, x: torch.Tensor, text: PackedText, around: Surroundings) -> torch.Tensor:
        q = self.q_norm(self.q(x).unflatten(1, (self.num_heads, -1)))
        k, v = self.kv(text.tokens).view(text.tokens.shape[0], 2, self.num_heads, -1).unbind(1)
        k = self.k_norm(k)
        out = varlen_attention(
            q, k, v, around.cu_seqlens, around.max_seqlen, text.cu_seqlens, text.max_seqlen
        )
        return self.proj(out.flatten(1))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        inner_size = int(hidden_size * mlp_ratio)
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """(silu(x W1) * x W2) W3 (Shazeer, arXiv:2002.05202), two thirds as wide: as many parameters as `Mlp`."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        inner_size = round(hidden_size * mlp_ratio * 2 / 3)
        self.fc1 = nn.Linear(hidden_size, 2 * inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.fc1(x).chunk(2, dim=1)
        return self.fc2(nn.functional.silu(gate) * up)


class FinalLayer(nn.Module):
    """Modulated norm and the linear layer to (T, C)."""

    def __init__(self, hidden_size: int, token_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, token_dim)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(
        self, x: torch.Tensor, branch: Branch | None, condition: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        _x, y = receive(x, branch, shift, scale, cu_seqlens)
        return self.linear(y)


def modulation(hidden_size: int, parts: int) -> nn.Sequential:
    """(S, D) conditioning -> (S, parts * D) shifts, scales and gates."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))


def head_norms(head_dim: int, qk_norm: bool) -> tuple[nn.Module, nn.Module]:
    """For queries and keys (T, H, D / H): an RMS norm over each head, or nothing."""
    if not qk_norm:
        return nn.Identity(), nn.Identity()
    return HeadNorm(head_dim, NORM_EPS), HeadNorm(head_dim, NORM_EPS)


class HeadNorm(nn.RMSNorm):
    """Whose weight follows the activations' dtype, as autocast has it for linear layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def receive(
    x: torch.Tensor,
    branch: Branch | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x with the branch added, if there is one, and norm(x) * (1 + scale) + shift. scale, shift: (S, D)."""
    if branch is None:
        return x, adaln(x, shift, scale, cu_seqlens, NORM_EPS)
    h, gate = branch
    return gate_residual_adaln(x, h, gate, shift, scale, cu_seqlens, NORM_EPS)
