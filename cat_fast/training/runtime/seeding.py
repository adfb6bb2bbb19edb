"""Randomness of a step as a function of (run seed, step, rank).

No random state is carried from one step to the next. So a resumed run draws the same numbers as an
uninterrupted one, and checkpoints need no generator state.

Each stream appends a number of its own to its seed: NumPy pads seeds with zeros, so (seed, step, rank 0)
would equal the stream from which the ratio plan draws with (seed, step).
"""

from functools import lru_cache

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators for one step of one rank."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank, 1]).generate_state(1, np.uint64)[0] >> 1))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order in which an epoch visits the samples: a permutation of [0, size), which is read-only.

    The last two are kept, since every step needs one and drawing it takes time proportional to `size`.
    """
    order = np.random.default_rng([seed, epoch]).permutation(size)
    order.flags.writeable = False
    return order
