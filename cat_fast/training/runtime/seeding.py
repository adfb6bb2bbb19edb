"""Randomness of a step as a function of (run seed, step, rank).

Nothing random is carried from one step to the next, so a resumed run needs no generator state to go on
exactly as a straight one would.
Each stream ends its seed in a number of its own: numpy pads seeds with zeros, so (seed, step, rank 0) would
be the stream from which the plan of ratios draws with (seed, step).
"""

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators for one step of one rank."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank, 1]).generate_state(1, np.uint64)[0] >> 1))
