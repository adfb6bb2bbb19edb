"""Randomness of a step as a function of (run seed, step, rank).

No random state is carried from one step to the next. So a resumed run draws the same numbers as an
uninterrupted one, and checkpoints need no generator state.

Each stream appends a number of its own to its seed: NumPy pads seeds with zeros, so (seed, step, rank 0)
would equal the stream from which the ratio plan draws with (seed, step).
"""

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators for one step of one rank."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank, 1]).generate_state(1, np.uint64)[0] >> 1))
