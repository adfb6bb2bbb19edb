"""Every operator on random inputs at named sizes, for tests, timing and compute-sanitizer.

Sizes: `toy` runs in Triton's interpreter within a second, `odd` has lengths that no tile divides, `chip` is a
layer of a paper model and fills a GPU, `huge` has more than 2^31 elements.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bounds.kernels import (
    HEAD_DIM,
    HEADS,
    LATENT_CHANNELS,
    MIX,
    NORM_SHAPE,
    SCALAR_ATTENTION_SHAPE,
    WIDE_ATTENTION_SHAPE,
    moved_bytes,
)
from cat_fast.kernels.adaln.op import adaln, gate_residual_adaln
from cat_fast.kernels.group_norm_silu.op import group_norm_silu
from cat_fast.kernels.pack.op import pack
from cat_fast.kernels.scalar_attention.op import scalar_attention
from cat_fast.kernels.varlen_attention.op import varlen_attention
from cat_fast.kernels.wide_attention.op import wide_attention

EPS = 1e-6
HUGE = 2**31 + 2**20
"""Elements of the tensors of size `huge`, at least."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """An operator, its inputs and the gradients of its outputs."""

    op: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    """All are differentiated. The first one has a row per token or sample, and so have the outputs."""
    grads: tuple[Tensor, ...]
    last: Callable[[], "Call"] | None = None
    """Make the same call on the last sample or sequence alone."""
    bytes_moved: Mapping[str, int] = field(default_factory=dict)
    """By pass, `forward` and `forward_backward`; of operators that are bound by memory."""
    flops: Mapping[str, int] = field(default_factory=dict)
    """By pass; of operators that are bound by arithmetic."""

    def forward(self) -> tuple[Tensor, ...]:
        """Return the outputs, without gradients."""
        with torch.no_grad():
            return _several(self.function(*self.inputs))

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Return the outputs, and the gradients of all inputs."""
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        outputs = _several(self.function(*leaves))
        gradients = torch.autograd.grad(outputs, leaves, self.grads)
        return *(y.detach() for y in outputs), *gradients


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _random(shape: Sequence[int], count: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(*shape, generator=generator, device=device, dtype=dtype) for _ in range(count)]


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def group_norm_silu_call(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, channels_last: bool = True
) -> Call:
    """GroupNorm + SiLU of (N, C, H, W) in 32 groups, or in C / 2."""
    x, grad = _random(shape, 2, device, dtype)
    if channels_last:
        x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    weight, bias = _random(shape[1:2], 2, device, torch.float32)
    groups = min(32, shape[1] // 2)

    def make(x: Tensor, grad: Tensor) -> Call:
        return Call(
            op="group_norm_silu",
            function=partial(group_norm_silu, groups=groups, eps=EPS),
            inputs=(x, weight, bias),
            grads=(grad,),
            last=lambda: make(x[-1:], grad[-1:]),
            bytes_moved=moved_bytes("group_norm_silu", x.numel(), x.itemsize),
        )

    return make(x, grad)


def scalar_attention_call(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Call:
    """Attention of (B, N, H): B images, N positions, H heads of one dimension."""
    q, k, v, grad = _random(shape, 4, device, dtype)

    def make(tensors: Sequence[Tensor]) -> Call:
        q, k, v, grad = tensors
        return Call(
            op="scalar_attention",
            function=scalar_attention,
            inputs=(q, k, v),
            grads=(grad,),
            last=lambda: make([t[-1:] for t in tensors]),
            bytes_moved=moved_bytes("scalar_attention", q.numel(), q.itemsize),
        )

    return make((q, k, v, grad))


def varlen_attention_call(
    lengths: Sequence[int], heads: int, dim: int, device: torch.device, dtype: torch.dtype
) -> Call:
    """Attention within packed sequences; q, k and v are views of one fused tensor, as in a block."""
    (qkv,) = _random((sum(lengths), 3, heads, dim), 1, device, dtype)
    (grad,) = _random((sum(lengths), heads, dim), 1, device, dtype)
    return _varlen(qkv, grad, lengths)


def _varlen(qkv: Tensor, grad: Tensor, lengths: Sequence[int]) -> Call:
    heads, dim = grad.shape[1:]
    work = 4 * heads * dim * sum(length**2 for length in lengths)
    arguments = {"cu_seqlens": _offsets(lengths, qkv.device), "max_seqlen": max(lengths)}
    last = lengths[-1]
    return Call(
        op="varlen_attention",
        function=partial(varlen_attention, **arguments),
        inputs=qkv.unbind(1),
        grads=(grad,),
        last=lambda: _varlen(qkv[-last:], grad[-last:], [last]),
        # Backward multiplies five times where forward does twice: scores again, dv, dp, dq and dk.
        flops={"forward": work, "forward_backward": work * 7 // 2},
    )


def adaln_call(
    lengths: Sequence[int], features: int, device: torch.device, dtype: torch.dtype, gated: bool
) -> Call:
    """adaLN over packed tokens, with gate and residual if `gated`; modulation are views of (S, 6 D)."""
    x, h, *grads = _random((sum(lengths), features), 4, device, dtype)
    (rows,) = _random((len(lengths), 6 * features), 1, device, dtype)
    return _adaln(x, h, grads, rows, lengths, gated)


def _adaln(
    x: Tensor, h: Tensor, grads: Sequence[Tensor], rows: Tensor, lengths: Sequence[int], gated: bool
) -> Call:
    gate, shift, scale, *_ = rows.chunk(6, dim=1)
    options = {"cu_seqlens": _offsets(lengths, x.device), "eps": EPS}
    last, op = lengths[-1], "gate_residual_adaln" if gated else "adaln"
    return Call(
        op=op,
        function=partial(gate_residual_adaln if gated else adaln, **options),
        inputs=(x, h, gate, shift, scale) if gated else (x, shift, scale),
        grads=tuple(grads) if gated else (grads[0],),
        last=lambda: _adaln(x[-last:], h[-last:], [g[-last:] for g in grads], rows[-1:], [last], gated),
        bytes_moved=moved_bytes(op, x.numel(), x.itemsize),
    )


def pack_call(channels: int, sides: Sequence[int], device: torch.device, dtype: torch.dtype) -> Call:
    """Packing of square latents into tokens of 2 x 2; the last latent comes first among the inputs."""
    latents = [_random((channels, side, side), 1, device, dtype)[0] for side in sides]
    (grad,) = _random((sum(side**2 for side in sides) // 4, 4 * channels), 1, device, dtype)
    return _pack(latents, grad)


def _pack(latents: Sequence[Tensor], grad: Tensor) -> Call:
    tokens = latents[-1][0].numel() // 4

    def run(last: Tensor, *others: Tensor) -> Tensor:
        return pack([*others, last], 2)

    return Call(
        op="pack",
        function=run,
        inputs=(latents[-1], *latents[:-1]),
        grads=(grad,),
        last=lambda: _pack(latents[-1:], grad[-tokens:]),
        bytes_moved=moved_bytes("pack", grad.numel(), grad.itemsize),
    )


def wide_attention_call(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Call:
    """Attention of (B, N, H, D) with wide heads, as in the autoencoder's middle block."""
    batch, count, heads, dim = shape
    q, k, v, grad = _random(shape, 4, device, dtype)
    work = 4 * batch * heads * dim * count**2

    def make(tensors: Sequence[Tensor]) -> Call:
        return Call(
            op="wide_attention",
            function=wide_attention,
            inputs=tuple(tensors[:3]),
            grads=(tensors[3],),
            last=lambda: make([t[-1:] for t in tensors]),
            flops={"forward": work, "forward_backward": work * 7 // 2},
        )

    return make((q, k, v, grad))


SIZES: Mapping[str, Mapping[str, Callable[[torch.device, torch.dtype], Call]]] = {
    "toy": {
        "group_norm_silu": partial(group_norm_silu_call, (2, 8, 4, 4)),
        "scalar_attention": partial(scalar_attention_call, (2, 16, 2)),
        "varlen_attention": partial(varlen_attention_call, [3, 17], 1, 32),
        "adaln": partial(adaln_call, [3, 5], 16, gated=False),
        "gate_residual_adaln": partial(adaln_call, [3, 5], 16, gated=True),
        "pack": partial(pack_call, 4, [8, 4]),
        "wide_attention": partial(wide_attention_call, (1, 16, 1, 256)),
    },
    "odd": {
        "group_norm_silu": partial(group_norm_silu_call, (3, 6, 53, 61)),
        "scalar_attention": partial(scalar_attention_call, (3, 301, 7)),
        "varlen_attention": partial(varlen_attention_call, [1, 63, 65, 1000, 33], 3, 72),
        "adaln": partial(adaln_call, [1, 63, 65, 1000, 33], 1155, gated=False),
        "gate_residual_adaln": partial(adaln_call, [1, 63, 65, 1000, 33], 1155, gated=True),
        "pack": partial(pack_call, 5, [2, 6, 34, 10]),
        "wide_attention": partial(wide_attention_call, (2, 77, 2, 320)),
    },
    "chip": {
        "group_norm_silu": partial(group_norm_silu_call, NORM_SHAPE),
        "scalar_attention": partial(scalar_attention_call, SCALAR_ATTENTION_SHAPE),
        "varlen_attention": partial(varlen_attention_call, MIX, HEADS, HEAD_DIM),
        "adaln": partial(adaln_call, MIX, HEADS * HEAD_DIM, gated=False),
        "gate_residual_adaln": partial(adaln_call, MIX, HEADS * HEAD_DIM, gated=True),
        "pack": partial(pack_call, LATENT_CHANNELS, [int(math.sqrt(4 * length)) for length in MIX]),
        "wide_attention": partial(wide_attention_call, WIDE_ATTENTION_SHAPE),
    },
    "huge": {
        "group_norm_silu": partial(group_norm_silu_call, (33, 64, 1024, 1024)),
        "scalar_attention": partial(scalar_attention_call, (1026, 4096, 512)),
        "varlen_attention": partial(varlen_attention_call, [256] * (HUGE // (256 * 16 * 72) + 1), 16, 72),
        "adaln": partial(adaln_call, [256] * (HUGE // (256 * 1152) + 1), 1152, gated=False),
        "gate_residual_adaln": partial(adaln_call, [256] * (HUGE // (256 * 1152) + 1), 1152, gated=True),
        "pack": partial(pack_call, 16, [1024] * 129),
        "wide_attention": partial(wide_attention_call, (4100, 1024, 1, 512)),
    },
}


def mixes(count: int, seed: int = 0, longest: int = 1024) -> list[list[int]]:
    """Return the lengths of `count` random packed batches: 1 to 64 sequences of 1 to `longest` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    return [[number(longest) for _ in range(number(64))] for _ in range(count)]
