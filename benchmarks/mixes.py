"""Mixes of sequence lengths, and how well the packer fills and balances batches of them."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from cat_fast.errors import UserError
from cat_fast.packing import packer

MIXES: Mapping[str, Mapping[int, float]] = {
    "252": {1024: 0.10, 256: 0.48, 64: 0.42},
    "216": {1024: 0.06, 256: 0.49, 64: 0.45},
    "197": {1024: 0.04, 256: 0.49, 64: 0.47},
}
"""Of the paper's pictures of 512 px at 8x, 16x and 32x: lengths and their shares, by the mean length."""
UNIFORM = dict.fromkeys(range(16, 1025), 1.0)
MAX_TOKENS = 16_384
"""The paper's budget of a GPU: 4 x 4096."""


def drawn(mix: Mapping[int, float], count: int, seed: int = 0) -> np.ndarray:
    """(count,) int64 lengths, drawn by their shares."""
    shares = np.array(list(mix.values()))
    return np.random.default_rng(seed).choice(list(mix), size=count, p=shares / shares.sum())


def spread(squares: np.ndarray) -> float:
    """Standard deviation of sum(n^2) over the ranks of a step as a share of its mean, over (steps, ranks)."""
    return float((squares.std(axis=1) / squares.mean(axis=1)).mean())


def packed(mix: Mapping[int, float], count: int, ranks: int, window: int = 256) -> dict[str, Any]:
    """What planning `count` lengths for `ranks` comes to.

    Returns: seconds (median of three), milliseconds a step, fill of the budget, and spreads of sum(n^2) over
    ranks: balanced, and of batches packed for one rank and dealt in turn.
    """
    if not packer.NATIVE:
        raise UserError("the packer's native core is not built: run `make build`")
    lengths = drawn(mix, count)
    seconds: list[float] = []
    batches = {}
    for planned_for in (1, ranks):
        core = packer.BestFitPacker(MAX_TOKENS, MAX_TOKENS, window * planned_for, planned_for)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            ids, offsets = core.plan(lengths)
            seconds.append(time.perf_counter() - start)
        steps = (len(offsets) - 1) // ranks - 2  # the last steps are flushed: nothing comes behind them
        sums = [
            np.diff(np.concatenate([[0], lengths[ids].astype(np.int64) ** power]).cumsum()[offsets])
            for power in (1, 2)
        ]
        batches[planned_for] = [each[: steps * ranks].reshape(steps, ranks) for each in sums]
    tokens, squares = batches[ranks]
    return {
        "seconds": statistics.median(seconds),
        "milliseconds_a_step": 1e3 * statistics.median(seconds) / (len(squares) + 2),
        "fill": float(tokens.mean() / MAX_TOKENS),
        "spread": spread(squares),
        "spread_dealt_in_turn": spread(batches[1][1]),
    }
