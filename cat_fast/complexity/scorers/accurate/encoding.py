"""Encoding of captions for both parts of the accurate scorer, in batches whose results do not vary.

A caption's result depends on nothing but the caption: a batch has a fixed number of captions of one padded
length, so that all matrix products have the same shapes whatever else is scored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_fast.complexity.scorers.accurate.rating_model import FROZEN_LAYERS
from cat_fast.complexity.sentence_encoder import SentenceEncoder

BATCH = 16
BATCH_TOKENS = 1024
"""Captions per batch, and tokens in batches of long captions; a smaller batch is filled up."""
LENGTH_STEP = 4
"""Lengths are padded to multiples of this."""
FIRST_POOLED = 2
"""Index of the first layer whose output is pooled for the kernel regression."""


@dataclass(frozen=True)
class EncodedBatch:
    """Encoded captions of one padded length."""

    indices: list[int]
    """Positions of the captions in the input; at most N, and the remaining rows are filled up."""
    hidden: Tensor
    """States after the frozen layers, float32 (N, L, 384)."""
    real: Tensor
    """False for padding, bool (N, L)."""
    pooled: Tensor
    """First token and mean of the states after each of the upper layers, float32 (N, 3072)."""


def batch_size(length: int) -> int:
    """Return the number of captions per batch of a padded length."""
    return min(BATCH, max(1, BATCH_TOKENS // length))


def batches(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield the padded length and the positions of each batch, shorter captions first."""
    groups: dict[int, list[int]] = {}
    for position, length in enumerate(lengths):
        groups.setdefault(-(-length // LENGTH_STEP) * LENGTH_STEP, []).append(position)
    for length, positions in sorted(groups.items()):
        size = batch_size(length)
        for first in range(0, len(positions), size):
            yield length, positions[first : first + size]


@torch.no_grad()
def encode(encoder: SentenceEncoder, captions: Sequence[str]) -> Iterator[EncodedBatch]:
    """Run the frozen encoder on captions, batch by batch."""
    tokens = encoder.tokens(captions)
    for length, positions in batches([len(ids) for ids in tokens]):
        size = batch_size(length)
        ids = torch.zeros(size, length, dtype=torch.int64)
        real = torch.zeros(size, length, dtype=torch.bool)
        for row in range(size):
            own = tokens[positions[min(row, len(positions) - 1)]]
            ids[row, : len(own)] = torch.tensor(own)
            real[row, : len(own)] = True
        states = encoder.embed(ids)
        weights = (real / real.sum(1, keepdim=True))[:, None]
        pooled = []
        for index, layer in enumerate(encoder.layers):
            states = layer(states, real)
            if index == FROZEN_LAYERS - 1:
                hidden = states
            if index >= FIRST_POOLED:
                pooled += [states[:, 0], (weights @ states)[:, 0]]
        yield EncodedBatch(positions, hidden, real, torch.cat(pooled, 1))
