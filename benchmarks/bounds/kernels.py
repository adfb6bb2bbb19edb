"""Compulsory and actual work of every operator, at the sizes of the paper's models.

Compulsory bytes are those of the inputs and outputs, each once: no implementation moves fewer if its caches
are cold at the start and its results reach the memory. In `forward_backward` the outputs include y, and the
inputs the gradient of y. `moved` are the bytes that ours moves by its design, as the README of each operator
derives them. FLOPs count matrix products only; the operators with heads of one dimension have none, since
their sums take linear time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

ITEM_BYTES = {"bfloat16": 2, "float32": 4}
MIX = [64] * 64 + [256] * 32 + [1024] * 4
"""Lengths of a batch of 16,384 tokens with all ratios at 512 px."""
NORM_SHAPE = (8, 128, 256, 256)
SCALAR_ATTENTION_SHAPE = (8, 4096, 512)
WIDE_ATTENTION_SHAPE = (4, 4096, 1, 512)
HEADS, HEAD_DIM = 16, 72
LATENT_CHANNELS, PATCH_AREA = 16, 4
PASSES = ("forward", "forward_backward")
FLASH_HEAD_DIMS = (32, 64, 96, 128, 192, 256)
"""Head dimensions that FlashAttention computes with; others are padded."""


@dataclass(frozen=True)
class Tensors:
    """Number of times that a tensor of an operator's size is read or written, by format."""

    own: int
    """In the operator's dtype."""
    float32: int = 0

    def bytes(self, elements: int, item: int) -> int:
        """Return the bytes for tensors of so many elements, in a dtype of `item` bytes."""
        return elements * (self.own * item + self.float32 * 4)


COMPULSORY: Mapping[str, tuple[Tensors, Tensors]] = {
    "group_norm_silu": (Tensors(2), Tensors(4)),
    "scalar_attention": (Tensors(4), Tensors(8)),
    "wide_attention": (Tensors(4), Tensors(8)),
    "varlen_attention": (Tensors(4), Tensors(8)),
    "adaln": (Tensors(2), Tensors(4)),
    "gate_residual_adaln": (Tensors(4), Tensors(8)),
    "pack": (Tensors(2), Tensors(4)),
}
"""Inputs and outputs by operator, of both PASSES."""
MOVED: Mapping[str, tuple[Tensors, Tensors]] = {
    # x twice and y; then x and dy twice, and dx
    "group_norm_silu": (Tensors(3), Tensors(3 + 5)),
    # ranges of q, k and v; sums of k and v; q and y. Then ranges of q, k, v and dy; sums of k and v; q, dy
    # and dq; sums of q; k, v, dk and dv; and two intermediate results in fp32, each written and read
    "scalar_attention": (Tensors(3 + 2 + 2), Tensors(7 + 4 + 2 + 3 + 1 + 4, float32=4)),
    # q, k, v and y; then these, dy, dq, dk and dv
    "wide_attention": (Tensors(4), Tensors(4 + 8)),
    "varlen_attention": (Tensors(4), Tensors(4 + 8)),
    # x and y; then x, dy and dx
    "adaln": (Tensors(2), Tensors(2 + 3)),
    # x, h, their sum and y; then the sum, h, both gradients, dx and dh
    "gate_residual_adaln": (Tensors(4), Tensors(4 + 6)),
    "pack": (Tensors(2), Tensors(2 + 2)),
}
"""What ours reads and writes, of both PASSES, without tables and rows that are small next to a tensor."""


def moved_bytes(op: str, elements: int, item: int) -> dict[str, int]:
    """Return the bytes that an operator of ours moves, by pass, for tensors of so many elements."""
    return {name: one.bytes(elements, item) for name, one in zip(PASSES, MOVED[op], strict=True)}


def flash_head_dim(dim: int) -> int:
    """Return the head dimension with which FlashAttention computes."""
    return next(known for known in FLASH_HEAD_DIMS if known >= dim)


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
    """Operations that ours multiplies, including recomputed products and padding."""

    @property
    def intensity(self) -> float:
        """FLOPs per compulsory byte."""
        return self.flops / self.compulsory


def works() -> list[Work]:
    """Return all operators and passes."""
    tokens, width = sum(MIX), HEADS * HEAD_DIM
    packed, latents = (tokens, width), (tokens, LATENT_CHANNELS * PATCH_AREA)
    batch, count, heads, dim = WIDE_ATTENTION_SHAPE
    wide = 2 * batch * heads * count**2 * dim
    varlen = 2 * width * sum(length**2 for length in MIX)
    return [
        *(work for dtype in ITEM_BYTES for work in _work("group_norm_silu", NORM_SHAPE, dtype)),
        *(work for dtype in ITEM_BYTES for work in _work("scalar_attention", SCALAR_ATTENTION_SHAPE, dtype)),
        *_work("wide_attention", WIDE_ATTENTION_SHAPE, product=wide),
        *_work(
            "varlen_attention",
            (tokens, HEADS, HEAD_DIM),
            product=varlen,
            padding=flash_head_dim(HEAD_DIM) / HEAD_DIM,
        ),
        *_work("adaln", packed),
        *_work("gate_residual_adaln", packed),
        *_work("pack", latents),
    ]


def shapes() -> dict[str, str]:
    """Return the shape of each operator's tensors as text."""
    return {work.op: work.shape for work in works()}


def _work(
    op: str, shape: Sequence[int], dtype: str = "bfloat16", product: int = 0, padding: float = 1.0
) -> list[Work]:
    """Return both passes; the figures of `forward_backward` include the forward pass.

    Args:
        op: key of COMPULSORY and MOVED.
        shape: of its tensors.
        dtype: of its tensors.
        product: FLOPs of one product of an attention: forward takes two, backward four and the scores again.
        padding: factor of executed products, for padded heads.
    """
    elements, item = prod(shape), ITEM_BYTES[dtype]
    moved = moved_bytes(op, elements, item)
    return [
        Work(
            op=op,
            shape="x".join(map(str, shape)),
            dtype=dtype,
            which=which,
            compulsory=COMPULSORY[op][i].bytes(elements, item),
            moved=moved[which],
            flops=(2, 6)[i] * product,
            executed=round((2, 7)[i] * product * padding),
        )
        for i, which in enumerate(PASSES)
    ]
