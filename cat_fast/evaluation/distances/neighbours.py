"""Precision and recall of generated images (Kynkäänniemi et al., 2019), as in ADM's evaluation.

Each image of a set has a sphere that reaches its k-th nearest neighbour in the set. Precision is the share of
samples within a sphere of the reference, recall the share of references within a sphere of the samples. The
published figures have k = 3, Inception pool features, 50,000 samples and 10,000 references.

Distances are computed in blocks, from features that were shifted by the reference's mean: far from the
origin, |x|^2 + |y|^2 - 2 x·y loses digits in float32.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cat_fast.errors import UserError

_BLOCK = 4096


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    samples: Tensor,
    reference: Tensor,
    k: int = 3,
    block: int = _BLOCK,
    on_block: Callable[[], None] = lambda: None,
) -> PrecisionRecall:
    """Return precision and recall of samples, (N, D), against a reference, (M, D).

    Memory beyond the features is about 4 `block`^2 x 4 bytes.

    Args:
        on_block: called after each block of distances, `num_blocks` times.

    Raises:
        UserError: a set has at most k images, or features of different sizes.
    """
    if min(len(samples), len(reference)) <= k:
        raise UserError(
            f"precision and recall: expected more than {k} images in each set, got {len(samples)} and"
            f" {len(reference)}"
        )
    if samples.shape[1] != reference.shape[1]:
        raise UserError(
            f"precision and recall: features of {samples.shape[1]} and {reference.shape[1]} dimensions cannot"
            " be compared"
        )
    shift = reference.mean(0, dtype=torch.float64).float()
    generated, real = _Points(samples, shift, block), _Points(reference, shift, block)
    sample_radii, reference_radii = (points.radii(k, on_block) for points in (generated, real))
    in_reference = torch.zeros(len(samples), dtype=torch.bool)
    in_samples = torch.zeros(len(reference), dtype=torch.bool)
    for rows, x in generated.blocks():
        for columns, y in real.blocks():
            distances = _squared_distances(x, y)
            in_reference[rows] |= (distances <= reference_radii[columns]).any(1)
            in_samples[columns] |= (distances <= sample_radii[rows, None]).any(0)
            on_block()
    return PrecisionRecall(in_reference.double().mean().item(), in_samples.double().mean().item())


def num_blocks(samples: int, reference: int, block: int = _BLOCK) -> int:
    """Return the number of blocks of distances for sets of these sizes."""
    a, b = -(-samples // block), -(-reference // block)
    return a * (a + 1) // 2 + b * (b + 1) // 2 + a * b


class _Points:
    """Features of a set, shifted block by block: a shifted copy of all would double the memory."""

    def __init__(self, features: Tensor, shift: Tensor, block: int) -> None:
        self.features, self.shift, self.block = features, shift, block

    def blocks(self, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
        for start in range(first, len(self.features), self.block):
            rows = slice(start, start + self.block)
            yield rows, self.features[rows].float() - self.shift

    def radii(self, k: int, on_block: Callable[[], None]) -> Tensor:
        """Return each point's squared distance to its k-th neighbour, itself left out."""
        nearest = torch.full((len(self.features), k + 1), torch.inf)
        for rows, x in self.blocks():
            for columns, y in self.blocks(rows.start):
                distances = _squared_distances(x, y)
                if rows == columns:
                    distances.fill_diagonal_(0)
                else:  # the matrix is symmetric: one block serves both
                    nearest[columns] = _smallest(nearest[columns], distances.T, k)
                nearest[rows] = _smallest(nearest[rows], distances, k)
                on_block()
        return nearest[:, k]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return norms.addmm_(x, y.T, alpha=-2).clamp_min_(0)


def _smallest(known: Tensor, distances: Tensor, k: int) -> Tensor:
    """Return the k + 1 smallest of known values and new distances per row, in ascending order."""
    count = min(k + 1, distances.shape[1])
    new = distances.topk(count, dim=1, largest=False).values
    return torch.cat([known, new], 1).sort(1).values[:, : k + 1]
