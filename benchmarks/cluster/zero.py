"""Collectives of a training step under ZeRO with the presets of configs/deepspeed.

P is the number of parameters of an engine. An all-reduce counts twice: each rank sends about two values per
element.

    stage 1   all-reduce of the gradients once per step (2 P), all-gather of the updated weights (P)
    stage 2   the same, but an all-reduce after every accumulated backward pass
    stage 3   per backward pass an all-gather of the weights (P) and a reduce-scatter of the gradients (P)

DeepSpeed's stages 1 and 2 all-reduce every bucket by default (`use_multi_rank_bucket_allreduce`), and each
rank keeps its part. Stage 3 prefetches weights while earlier layers are computed, on a stream of its own, so
that only the first bucket is waited for. It gathers weights again for the backward pass only beyond
`stage3_max_reuse_distance`; parameters of at most `stage3_param_persistence_threshold` elements stay complete
and are gathered after the update, by one call each, which are launched together. All values are fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

FP32 = 4
Pass = Literal["forward", "backward"]
BUCKET = 50_000_000
"""`reduce_bucket_size` in configs/deepspeed, in elements."""
PREFETCH = 50_000_000
"""DeepSpeed's default of `stage3_prefetch_bucket_size`, in elements."""
REUSE_DISTANCE = 1_000_000_000
"""DeepSpeed's default of `stage3_max_reuse_distance`, in elements that are used in between."""
PERSISTENT = 100_000
"""DeepSpeed's default of `stage3_param_persistence_threshold`, in elements."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Equal collectives of one kind per step."""

    collective: str
    """all_reduce, reduce_scatter or all_gather."""
    elements: float
    """Elements of the complete tensors, in all calls together."""
    calls: int
    hidden_by: Pass | None = None
    """Pass whose computing can hide it, on a stream of its own."""
    together: bool = False
    """All calls are launched before the first one is waited for."""

    def sent_bytes(self, ranks: int) -> float:
        """Return the bytes that each rank sends."""
        rounds = 2 if self.collective == "all_reduce" else 1
        return rounds * FP32 * self.elements * (ranks - 1) / ranks


CONTROL = Exchange(collective="all_reduce", elements=2, calls=2)
"""The two reductions of a step that are not DeepSpeed's: amounts before it, metrics after it."""


def exchanges(tensors: Sequence[int], stage: int, accumulation: int = 1) -> list[Exchange]:
    """Return the collectives of one engine per step.

    Args:
        tensors: number of elements of each trained tensor, in the order of the forward pass.
        stage: ZeRO stage, 1 to 3.
        accumulation: number of backward passes per step.
    """
    total = sum(tensors)
    norm = Exchange(collective="all_reduce", elements=1, calls=1)
    if stage < 3:
        passes = 1 if stage == 1 else accumulation
        weights = Exchange(collective="all_gather", elements=total, calls=1)
        return [*_reductions("all_reduce", tensors, passes), weights, norm]
    large = sum(n for n in tensors if n > PERSISTENT)
    small = [n for n in tensors if n <= PERSISTENT]
    found = _reductions("reduce_scatter", tensors, accumulation)
    gathered: list[tuple[int, Pass | None]] = [
        (min(large, PREFETCH), None),
        (max(0, large - PREFETCH), "forward"),
        (max(0, large - REUSE_DISTANCE // 2), "backward"),
    ]
    found += [
        Exchange(
            collective="all_gather",
            elements=accumulation * elements,
            calls=accumulation * ceil(elements / PREFETCH),
            hidden_by=hidden_by,
        )
        for elements, hidden_by in gathered
        if elements
    ]
    if small:
        found.append(Exchange(collective="all_gather", elements=sum(small), calls=len(small), together=True))
    return [*found, norm]


def resident_elements(tensors: Sequence[int]) -> int:
    """Return the largest number of gathered elements on a rank under stage 3."""
    large = sum(n for n in tensors if n > PERSISTENT)
    return sum(tensors) - large + min(large, REUSE_DISTANCE // 2)


def _reductions(collective: str, tensors: Sequence[int], passes: int) -> list[Exchange]:
    """Return the reductions of the gradients: those of the last bucket follow the backward pass."""
    *earlier, last = _buckets(tensors)
    found = [Exchange(collective=collective, elements=passes * last, calls=passes)]
    if earlier:
        calls, elements = passes * len(earlier), passes * sum(earlier)
        found.append(Exchange(collective=collective, elements=elements, calls=calls, hidden_by="backward"))
    return found


def _buckets(tensors: Sequence[int]) -> list[int]:
    """Return the elements of each bucket, filled in the order of the backward pass."""
    buckets = [0]
    for elements in reversed(tensors):
        if buckets[-1] and buckets[-1] + elements > BUCKET:
            buckets.append(0)
        buckets[-1] += elements
    return buckets
