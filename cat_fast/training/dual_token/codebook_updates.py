"""Codebook updates in a step: sums of all ranks by the step's own reduction, averages, revival.

A step's `sums` are one vector: the metrics, the number of vectors per code, their sums, and on revival steps
vectors of every rank as candidates, each rank in its own rows.
"""

import numpy as np
import torch
from torch import Tensor

from cat_fast.dual_token.codebook import Statistics, VectorQuantizer
from cat_fast.training.config.dual_token import CodebookConfig
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.ranks import Ranks


class CodebookUpdates:
    """Statistics of a step's batches, and the update of a codebook from those of all ranks.

    Args:
        quantizer: the codebook of the engine's module.
        name: name of its `codebook` in the module, for the averaged weights of a gradient codebook.
    """

    def __init__(
        self, quantizer: VectorQuantizer, config: CodebookConfig, name: str, seed: int, ranks: Ranks
    ) -> None:
        self.quantizer, self.config, self.name = quantizer, config, name
        self.seed, self.ranks = seed, ranks
        self._statistics: Statistics | None = None
        self._vectors: list[Tensor] = []

    def add(self, features: Tensor, codes: Tensor) -> None:
        """Add a batch: vectors (..., D) before quantisation and their codes (...)."""
        found = self.quantizer.statistics(features.detach(), codes)
        before = self._statistics
        self._statistics = (
            found if before is None else Statistics(before.counts + found.counts, before.sums + found.sums)
        )
        self._vectors.append(features.detach().flatten(0, -2))

    def pack(self, step: int) -> Tensor:
        """Return this rank's sums of the step, flat float64, and forget the batches."""
        assert self._statistics is not None
        statistics, vectors = self._statistics, torch.cat(self._vectors)
        self._statistics, self._vectors = None, []
        parts = [statistics.counts, statistics.sums.flatten()]
        if self._revives(step):
            candidates = vectors.new_zeros(self._candidates, self.quantizer.dim, dtype=torch.float64)
            own = _permutation(len(vectors), self.seed, step, self.ranks.rank, 7)[: self._per_rank]
            first = self.ranks.rank * self._per_rank
            candidates[first : first + len(own)] = vectors[own.to(vectors.device)].double()
            parts.append(candidates.flatten())
        return torch.cat(parts)

    def apply(self, step: int, sums: Tensor, ema: EMA) -> None:
        """Update the codebook from the sums of all ranks, `pack` summed."""
        size, dim = self.quantizer.size, self.quantizer.dim
        rows = size if self.quantizer.ema else 0
        counts, sums, rest = sums.split([size, rows * dim, sums.numel() - size - rows * dim])
        self.quantizer.update(Statistics(counts, sums.view(rows, dim)), self.config.decay)
        if not self._revives(step):
            return
        candidates = rest.view(-1, dim)
        candidates = candidates[candidates.abs().sum(1) > 0]  # ranks with fewer vectors leave rows of zeros
        candidates = candidates[_permutation(len(candidates), self.seed, step, 0, 8)]
        revived = self.quantizer.revive(candidates, self.config.revive_below)
        if len(revived) and not self.quantizer.ema:
            _write_through(self.quantizer.codebook, self.name, revived, ema)

    def counts(self, sums: Tensor) -> Tensor:
        """Return the number of vectors per code (K,) in sums of `pack`."""
        return sums[: self.quantizer.size]

    def _revives(self, step: int) -> bool:
        every = self.config.revive_every_steps
        return every > 0 and step % every == 0

    @property
    def _per_rank(self) -> int:
        return -(-self.quantizer.size // self.ranks.world_size)

    @property
    def _candidates(self) -> int:
        return self._per_rank * self.ranks.world_size


def _permutation(count: int, *seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).permutation(count))


def _write_through(codebook: Tensor, name: str, rows: Tensor, ema: EMA) -> None:
    """Set rows of a trained codebook also in DeepSpeed's fp32 copy and in the averaged weights."""
    from deepspeed.utils import safe_set_full_fp32_param

    if hasattr(codebook, "_hp_mapping"):
        safe_set_full_fp32_param(codebook, codebook.detach().clone())
    if name in ema.averaged:
        ema.averaged[name][rows] = codebook.detach()[rows].float()
