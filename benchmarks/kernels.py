"""Speed of the operators, each against the common alternatives.

    python -m benchmarks.kernels --json FILE [--quick] [--only TEXT]

Keys are <operator>.<shape>.<forward|forward_backward>.ratio_vs_<eager|compile|sdpa|padded|loop>. To add an
operator, write a function that returns its `Setup`, and one entry of `TABLE` per size.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.shared import baselines, harness, program
from cat_fast.hardware import run_device_type
from cat_fast.kernels import backends
from cat_fast.kernels.adaln.op import adaln, gate_residual_adaln
from cat_fast.kernels.adaln.reference import adaln_reference, gate_residual_adaln_reference
from cat_fast.kernels.group_norm_silu.op import group_norm_silu
from cat_fast.kernels.group_norm_silu.reference import group_norm_silu_reference
from cat_fast.kernels.pack.op import pack
from cat_fast.kernels.pack.reference import pack_reference
from cat_fast.kernels.scalar_attention.op import scalar_attention
from cat_fast.kernels.scalar_attention.reference import scalar_attention_reference
from cat_fast.kernels.varlen_attention.op import varlen_attention
from cat_fast.kernels.varlen_attention.reference import varlen_attention_reference
from cat_fast.kernels.wide_attention.op import wide_attention
from cat_fast.kernels.wide_attention.reference import wide_attention_reference
from cat_fast.processes.signals import run_command

DEVICE = run_device_type()
PASSES = ("forward", "forward_backward")
Tensors = torch.Tensor | tuple[torch.Tensor, ...]
"""One output, or several."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One implementation of an operator with its inputs, in its own layout."""

    function: Callable[..., Tensors]
    inputs: Sequence[torch.Tensor]
    """All of them require gradients."""
    grad: Tensors
    """Gradient of the output."""
    restore: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    """Converts an output or a gradient to our layout."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """An operator at one size. Mappings to numbers have the pass as key."""

    ours: Rival
    baselines: Mapping[str, Rival]
    reference: Callable[..., Tensors]
    """Computes the truth from our inputs in float64."""
    tolerance: float = 1e-5
    bytes_moved: Mapping[str, int] = field(default_factory=dict)
    copied: torch.Tensor | None = None
    flops: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes that determine the backend."""


def group_norm_silu_channels_last(*shape: int) -> Setup:
    """Return GroupNorm + SiLU of x: (N, C, H, W), fp32, channels-last, in 32 groups."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(shape, generator=generator).to(DEVICE, memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight, bias = torch.randn(2, shape[1], generator=generator).to(DEVICE).unbind()
    options = {"groups": 32, "eps": 1e-6}
    eager = partial(group_norm_silu_reference, **options)
    rival = partial(Rival, inputs=(x, weight, bias), grad=grad)
    return Setup(
        ours=rival(function=partial(group_norm_silu, **options)),
        baselines={
            "eager": rival(function=eager),
            "compile": rival(function=torch.compile(eager, dynamic=False)),
        },
        reference=eager,
        # Forward reads x twice and writes y; backward reads x and dy twice and writes dx.
        bytes_moved={"forward": 3 * x.nbytes, "forward_backward": 8 * x.nbytes},
        copied=x,
    )


def scalar_attention_normal(heads: int, count: int) -> Setup:
    """Return attention over `count` positions in heads of one dimension: q, k, v of unit variance, fp32."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, count, heads, generator=generator).to(DEVICE).unbind()

    def apart(x: torch.Tensor) -> torch.Tensor:  # [B, N, H] -> [B, H, N, 1]
        return x.transpose(1, 2).unsqueeze(-1).contiguous()

    return Setup(
        ours=Rival(function=scalar_attention, inputs=(q, k, v), grad=grad),
        baselines={
            "sdpa": Rival(
                function=partial(F.scaled_dot_product_attention, scale=1.0),
                inputs=[apart(x) for x in (q, k, v)],
                grad=apart(grad),
                restore=lambda x: x.squeeze(-1).transpose(1, 2),
            )
        },
        reference=scalar_attention_reference,
        # Forward reads q, k, v and writes y; backward reads q, k, v, dy and writes dq, dk, dv.
        bytes_moved={"forward": 4 * q.nbytes, "forward_backward": 11 * q.nbytes},
        copied=q,
    )


def varlen_attention_packed(heads: int, dim: int, lengths: Sequence[int]) -> Setup:
    """Return attention over packed sequences of these lengths, fp32."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, sum(lengths), heads, dim, generator=generator).to(DEVICE).unbind()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    rival = partial(Rival, inputs=(q, k, v), grad=grad)

    def pad(x: torch.Tensor) -> torch.Tensor:  # [T, H, D] -> [S, L, H, D]
        return pad_sequence(x.split(list(lengths)), batch_first=True)

    real = pad(torch.ones(sum(lengths), dtype=torch.bool, device=DEVICE))
    multiplied = 4 * heads * dim * sum(length**2 for length in lengths)  # q k^T and the weights times v
    return Setup(
        ours=rival(function=partial(varlen_attention, cu_seqlens=cu_seqlens, max_seqlen=max(lengths))),
        baselines={
            "padded": Rival(
                function=partial(baselines.padded_sdpa, real=real),
                inputs=[pad(x) for x in (q, k, v)],
                grad=pad(grad),
                restore=lambda x: x[real],
            ),
            "loop": rival(function=partial(baselines.sdpa_per_sequence, lengths=lengths)),
        },
        reference=partial(varlen_attention_reference, cu_seqlens=cu_seqlens),
        # Backward multiplies four times where forward does twice: dv, dp, dq and dk.
        flops={"forward": multiplied, "forward_backward": 3 * multiplied},
        sizes={"head_dim": dim},
    )


def pack_mixed(channels: int, sides: Sequence[int]) -> Setup:
    """Return packing of square fp32 latents of these sides into tokens of 2 x 2; backward unpacks."""
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(channels, side, side, generator=generator).to(DEVICE) for side in sides]
    grad = torch.randn(sum(side**2 for side in sides) // 4, 4 * channels, generator=generator).to(DEVICE)
    rival = partial(Rival, inputs=latents, grad=grad)

    def eager(*latents: torch.Tensor) -> torch.Tensor:
        return pack_reference(latents, 2)

    return Setup(
        ours=rival(function=lambda *latents: pack(latents, 2)),
        baselines={"eager": rival(function=eager)},
        reference=eager,
        tolerance=0.0,
        bytes_moved={"forward": 2 * grad.nbytes, "forward_backward": 4 * grad.nbytes},
        copied=grad,
    )


def adaln_packed(features: int, lengths: Sequence[int], gated: bool) -> Setup:
    """Return adaLN over packed tokens (T, D) of these lengths, fp32; the modulation are views of (S, 6 D).

    `gated` adds gate and residual before it. The baselines expand the modulation to tokens.
    """
    generator = torch.Generator().manual_seed(0)
    x, h, *grads = torch.randn(4, sum(lengths), features, generator=generator).to(DEVICE).unbind()
    modulation = torch.randn(len(lengths), 6 * features, generator=generator).to(DEVICE)
    gate, shift, scale, *_ = modulation.chunk(6, dim=1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    options = {"cu_seqlens": cu_seqlens, "eps": 1e-6}
    if gated:
        rival = partial(Rival, inputs=(x, h, gate, shift, scale), grad=tuple(grads))
        ours, eager = (
            partial(gate_residual_adaln, **options),
            partial(gate_residual_adaln_reference, **options),
        )
        moved = {"forward": 4, "forward_backward": 4 + 6}  # backward: dx_new, dy, x_new and h, dx and dh
    else:
        rival = partial(Rival, inputs=(x, shift, scale), grad=grads[0])
        ours, eager = partial(adaln, **options), partial(adaln_reference, **options)
        moved = {"forward": 2, "forward_backward": 2 + 3}
    return Setup(
        ours=rival(function=ours),
        baselines={
            "eager": rival(function=eager),
            "compile": rival(function=torch.compile(eager, dynamic=False)),
        },
        reference=eager,
        bytes_moved={name: count * x.nbytes for name, count in moved.items()},
        copied=x,
    )


def wide_attention_one_head(count: int, dim: int) -> Setup:
    """Return attention over `count` positions in one head of `dim` dimensions, fp32."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, count, 1, dim, generator=generator).to(DEVICE).unbind()
    rival = partial(Rival, inputs=(q, k, v), grad=grad)
    multiplied = 4 * dim * count**2  # in backward, twice as much again
    return Setup(
        ours=rival(function=wide_attention),
        baselines={
            "eager": rival(function=baselines.materialized_attention),
            "sdpa": rival(function=wide_attention_reference),
        },
        reference=wide_attention_reference,
        flops={"forward": multiplied, "forward_backward": 3 * multiplied},
        sizes={"head_dim": dim},
    )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An operator at one size, and its baselines per pass."""

    op: str
    shape: str
    """Part of the key."""
    setup: Callable[[], Setup]
    forward: Sequence[str] = ()
    forward_backward: Sequence[str] = ()


TABLE = (
    *(
        Entry(
            op="group_norm_silu",
            shape="x".join(map(str, shape)) + "_channels_last",
            setup=partial(group_norm_silu_channels_last, *shape),
            forward=("eager", "compile"),
            forward_backward=("eager",),
        )
        for shape in ((1, 64, 512, 512), (1, 256, 128, 128))
    ),
    *(
        Entry(
            op="scalar_attention",
            shape=f"512x{count}",
            setup=partial(scalar_attention_normal, 512, count),
            forward=("sdpa",),
            forward_backward=("sdpa",) if count == 1024 else (),
        )
        for count in (4096, 1024, 256)
    ),
    Entry(
        op="varlen_attention",
        shape="16x72_64x7+256x8+1024",
        setup=partial(varlen_attention_packed, 16, 72, [64] * 7 + [256] * 8 + [1024]),
        forward=("padded", "loop"),
        forward_backward=("padded", "loop"),
    ),
    *(
        Entry(
            op="pack",
            shape=f"16_64x{each}+32x{each}+16x{each}",
            setup=partial(pack_mixed, 16, [64, 32, 16] * each),
            forward=("eager",),
            forward_backward=("eager",),
        )
        for each in (1, 8)
    ),
    *(
        Entry(
            op=op,
            shape="1152_64x7+256x8+1024",
            setup=partial(adaln_packed, 1152, [64] * 7 + [256] * 8 + [1024], gated=gated),
            forward=("eager", "compile"),
            forward_backward=("eager",),
        )
        for op, gated in (("adaln", False), ("gate_residual_adaln", True))
    ),
    Entry(
        op="wide_attention",
        shape="1x512x1024",
        setup=partial(wide_attention_one_head, 1024, 512),
        forward=("eager", "sdpa"),
        forward_backward=("eager", "sdpa"),
    ),
)


def cases(table: Sequence[Entry] = TABLE) -> dict[str, Callable[[], harness.Case]]:
    """Return one case per entry and pass that has a baseline."""
    return {
        f"{entry.op}.{entry.shape}.{name}": partial(case, entry, name)
        for entry in table
        for name in PASSES
        if getattr(entry, name)
    }


def case(entry: Entry, name: str) -> harness.Case:
    """Set up one pass of one entry."""
    setup = entry.setup()
    ours = setup.ours

    def truth() -> Sequence[torch.Tensor]:
        doubles = [x.double() for x in ours.inputs]
        grad = tuple(g.double() for g in several(ours.grad))
        exact = Rival(function=setup.reference, inputs=doubles, grad=grad)
        return contestant(exact, name).run()

    return harness.Case(
        ours=contestant(ours, name),
        baselines={vs: contestant(setup.baselines[vs], name) for vs in getattr(entry, name)},
        truth=truth,
        tolerance=setup.tolerance,
        bytes_moved=setup.bytes_moved.get(name),
        copied=setup.copied,
        flops=setup.flops.get(name),
        details={
            "backend": backends.choose(entry.op, ours.inputs[0], **setup.sizes),
            "dtype": str(ours.inputs[0].dtype).removeprefix("torch."),
            "device": DEVICE,
        },
    )


def contestant(rival: Rival, name: str) -> harness.Contestant:
    """Return one pass: outputs without autograd, or outputs and gradients of all inputs."""

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return several(rival.function(*rival.inputs))

    def forward_backward() -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in rival.inputs]
        outputs = several(rival.function(*leaves))
        gradients = torch.autograd.grad(outputs, leaves, several(rival.grad))
        return *(y.detach() for y in outputs), *gradients

    return harness.Contestant(
        run={"forward": forward, "forward_backward": forward_backward}[name],
        outputs=lambda tensors: [rival.restore(x) for x in tensors],
    )


def several(outputs: Tensors) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


if __name__ == "__main__":
    sys.exit(run_command(lambda: program.main("kernels", cases())))
