"""Compulsory and actual work of every operator, at the sizes of the paper's models.

Compulsory bytes are those of the inputs and outputs, each once: no implementation moves fewer. `moved` are
the bytes that ours moves by its design, as the README of each operator derives them. FLOPs count matrix
products only; the operators with heads of one dimension have none, since their sums take linear time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ITEM_BYTES = {"bfloat16": 2, "float32": 4}
MIX = [64] * 64 + [256] * 32 + [1024] * 4
"""Lengths of a batch of 16,384 tokens with all ratios at 512 px."""
PASSES = ("forward", "forward_backward")


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one operator and pass."""

    op: str
    shape: str
    dtype: str
    which: str
    """One of PASSES."""
    compulsory: int
    """Bytes that any implementation moves."""
    moved: int
    """Bytes that ours moves."""
    flops: int
    """Operations that any implementation multiplies, 2 per multiply-accumulate."""
    executed: int
    """Operations that ours multiplies, including recomputed products."""

    @property
    def intensity(self) -> float:
        """FLOPs per compulsory byte."""
        return self.flops / self.compulsory


def works() -> list[Work]:
    """Return all operators and passes."""
    return [
        *(work for dtype in ITEM_BYTES for work in _norm((8, 128, 256, 256), dtype)),
        *(work for dtype in ITEM_BYTES for work in _scalar_attention((8, 4096, 512), dtype)),
        *_wide_attention((4, 4096, 1, 512)),
        *_varlen_attention(MIX, heads=16, dim=72),
        *_adaln(MIX, 1152, gated=False),
        *_adaln(MIX, 1152, gated=True),
        *_pack(MIX, features=64),
    ]


def _pair(
    op: str,
    shape: str,
    dtype: str,
    compulsory: Sequence[int],
    moved: Sequence[int],
    flops: Sequence[int] = (0, 0),
    executed: Sequence[int] = (0, 0),
) -> list[Work]:
    """Return both passes; the figures of `forward_backward` include the forward pass."""
    return [
        Work(
            op=op,
            shape=shape,
            dtype=dtype,
            which=which,
            compulsory=compulsory[i],
            moved=moved[i],
            flops=flops[i],
            executed=executed[i],
        )
        for i, which in enumerate(PASSES)
    ]


def _norm(shape: tuple[int, ...], dtype: str) -> list[Work]:
    """GroupNorm + SiLU; forward reads x and writes y, backward reads x and dy and writes dx."""
    size = _product(shape) * ITEM_BYTES[dtype]
    label = "x".join(map(str, shape))
    return _pair("group_norm_silu", label, dtype, (2 * size, 5 * size), (3 * size, 8 * size))


def _scalar_attention(shape: tuple[int, int, int], dtype: str) -> list[Work]:
    size = _product(shape) * ITEM_BYTES[dtype]
    label = "x".join(map(str, shape))
    return _pair("scalar_attention", label, dtype, (4 * size, 11 * size), (4 * size, 11 * size))


def _wide_attention(shape: tuple[int, int, int, int]) -> list[Work]:
    batch, count, heads, dim = shape
    size = _product(shape) * ITEM_BYTES["bfloat16"]
    product = 2 * batch * heads * count**2 * dim
    return _pair(
        "wide_attention",
        "x".join(map(str, shape)),
        "bfloat16",
        (4 * size, 12 * size),
        (4 * size, 12 * size),
        (2 * product, 6 * product),
        (2 * product, 7 * product),
    )


def _varlen_attention(lengths: Sequence[int], heads: int, dim: int) -> list[Work]:
    size = sum(lengths) * heads * dim * ITEM_BYTES["bfloat16"]
    product = 2 * heads * dim * sum(length**2 for length in lengths)
    return _pair(
        "varlen_attention",
        f"{heads}x{dim}_{len(lengths)} sequences",
        "bfloat16",
        (4 * size, 12 * size),
        (4 * size, 12 * size),
        (2 * product, 6 * product),
        (2 * product, 7 * product),
    )


def _adaln(lengths: Sequence[int], features: int, gated: bool) -> list[Work]:
    size = sum(lengths) * features * ITEM_BYTES["bfloat16"]
    forward, both = (4, 10) if gated else (2, 5)
    return _pair(
        "gate_residual_adaln" if gated else "adaln",
        f"{sum(lengths)}x{features}",
        "bfloat16",
        (forward * size, both * size),
        (forward * size, both * size),
    )


def _pack(lengths: Sequence[int], features: int) -> list[Work]:
    size = sum(lengths) * features * ITEM_BYTES["bfloat16"]
    return _pair("pack", f"{sum(lengths)}x{features}", "bfloat16", (2 * size, 4 * size), (2 * size, 4 * size))


def _product(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
