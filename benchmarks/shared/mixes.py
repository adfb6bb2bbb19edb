"""Mixes of sequence lengths, and the fill and balance of batches that the packer makes of them."""

import time
from collections.abc import Mapping

import numpy as np

from cat_fast.errors import UserError
from cat_fast.packing import packer
from cat_fast.training.generator.packed_stream import PackedStream
from cat_fast.training.runtime.ranks import Ranks

TOKENS = {8: 1024, 16: 256, 32: 64}
"""Of a 512 px image by ratio."""
SHARES: Mapping[str, Mapping[int, float]] = {
    "252": {8: 0.10, 16: 0.48, 32: 0.42},
    "216": {8: 0.06, 16: 0.49, 32: 0.45},
    "197": {8: 0.04, 16: 0.49, 32: 0.47},
    "208": {8: 0.02, 16: 0.65, 32: 0.33},
}
"""The paper's shares of the ratios, by mean tokens: 208 by LLaVA's scores, and 197 in training, of which only
the mean is published (197.44)."""
IMAGENET = SHARES["216"]
"""On ImageNet with the paper's thresholds."""
TOKENIZER_TRAINING = SHARES["252"]
"""In the tokenizer's training."""
MIXES: Mapping[str, Mapping[int, float]] = {
    name: {TOKENS[ratio]: share for ratio, share in SHARES[name].items()} for name in ("252", "216", "197")
}
"""Shares by length, of the mixes that are packed."""
UNIFORM = dict.fromkeys(range(16, 1025), 1.0)
MAX_TOKENS = 16_384
"""The paper's budget per GPU: 4 x 4096."""


def draw_lengths(mix: Mapping[int, float], count: int, seed: int = 0) -> np.ndarray:
    """Draw (count,) int64 lengths by their shares."""
    shares = np.array(list(mix.values()))
    return np.random.default_rng(seed).choice(list(mix), size=count, p=shares / shares.sum())


def spread(squares: np.ndarray) -> float:
    """Return the mean over steps of std(sum(n^2)) / mean(sum(n^2)) over ranks; squares: (steps, ranks)."""
    return float((squares.std(axis=1) / squares.mean(axis=1)).mean())


def measure_packer(mix: Mapping[int, float], count: int, ranks: int, window: int = 256) -> dict[str, float]:
    """Plan `count` lengths for `ranks`, and measure the result.

    Returns: seconds; the fill of the budget; the spread of sum(n^2) over ranks, and that spread if batches
    were packed one by one and assigned to ranks in turn.
    """
    if not packer.NATIVE:
        raise UserError("the packer's native core is not built: run `make build`")
    lengths = draw_lengths(mix, count)
    seconds, tokens, squares = _planned(lengths, ranks, window)
    _, _, alone = _planned(lengths, 1, window)
    in_turn = alone[: len(alone) // ranks * ranks].reshape(-1, ranks)
    return {
        "seconds": seconds,
        "fill": float(tokens.mean() / MAX_TOKENS),
        "spread": spread(squares),
        "spread_in_turn": spread(in_turn),
    }


def _planned(lengths: np.ndarray, ranks: int, window: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Return seconds and sums of n and n^2 (steps, ranks), without the last steps, which nothing followed."""
    core = packer.BestFitPacker(MAX_TOKENS, MAX_TOKENS, window * ranks, ranks)
    start = time.perf_counter()
    ids, offsets = core.plan(lengths)
    seconds = time.perf_counter() - start
    placed = lengths[ids].astype(np.int64)
    tokens, squares = (
        np.diff(np.concatenate([[0], n.cumsum()])[offsets]).reshape(-1, ranks)[:-2]
        for n in (placed, placed**2)
    )
    return seconds, tokens, squares


def milliseconds_per_step(mix: Mapping[int, float], ranks: int, steps: int = 10, window: int = 256) -> float:
    """Return the time that a rank needs to plan one step with `PackedStream`."""
    stream = PackedStream(draw_lengths(mix, 1_000_000).tolist(), MAX_TOKENS, window, 0, Ranks(0, ranks))
    stream.next()  # fills the window
    start = time.perf_counter()
    for _ in range(steps):
        stream.next()
    return 1e3 * (time.perf_counter() - start) / steps
