"""Assignment of latents to each rank's batches; runs can resume on any number of ranks."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from cat_fast.errors import UserError
from cat_fast.packing import TokenBudgetPacker
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import epoch_order


class PackedStream:
    """Infinite sequence of one rank's batches, as indices of latents.

    Latents are read in concatenated epochs, each a permutation that depends on the seed. Every rank packs
    them for all ranks and keeps its own batch. Budgets are full and sums of squared lengths are nearly equal
    over ranks, without communication. At the paper's budget, planning takes 0.04 ms per step for 1 rank,
    1.5 ms for 64 and 50 ms for 1024, on one CPU core.

    The state is the same on every rank, and any number of ranks with any budget and window can resume from
    it: each latent is still used once per epoch. With the same number of ranks, budget and window, batches
    are those of an uninterrupted run.

    Args:
        lengths: number of tokens of each latent, (N,).
        max_tokens: token budget of a rank's batch.
        window: number of latents per rank that the packer may look ahead.
    """

    def __init__(self, lengths: Sequence[int], max_tokens: int, window: int, seed: int, ranks: Ranks) -> None:
        self.lengths, self.seed, self.rank = np.asarray(lengths), seed, ranks.rank
        self.packer = TokenBudgetPacker[int](max_tokens, window=window, ranks=ranks.world_size)
        self.position = 0
        """Number of latents given to the packer so far, over all epochs."""

    def next(self) -> list[int]:
        """Return the indices of the latents in this rank's next batch."""
        self._read(self.packer.missing)
        batches = self.packer.next()
        assert batches is not None
        return self._indices(np.asarray(batches[self.rank])).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, which is equal on all ranks, as JSON-compatible data."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Return a function that computes the `state_dict` of this moment when called later."""
        position, packer = self.position, self.packer.snapshot()
        return lambda: {
            "position": position,
            "packer": packer(),
            "latents": len(self.lengths),
            "lengths": self._digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of a run on any number of ranks, with any budget and window.

        Raises:
            UserError: the run had other latents.
        """
        if state["lengths"] != self._digest:
            raise UserError(
                f"data.latents: expected the {state['latents']} latents that the run started with, got "
                f"{len(self.lengths)} of other sizes or in another order: use the same latents, or start a "
                "new run in another output_dir"
            )
        self.packer.load_state_dict(state["packer"], repack=True)
        self.position = state["position"]

    @cached_property
    def _digest(self) -> str:
        """Hash of the latents' lengths, in order."""
        return hashlib.sha256(self.lengths.astype(np.int64).tobytes()).hexdigest()[:16]

    def _read(self, count: int) -> None:
        positions = np.arange(self.position, self.position + count)
        self.packer.extend(positions.tolist(), self.lengths[self._indices(positions)].tolist())
        self.position += count

    def _indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the latents at these positions in the concatenated epochs."""
        epochs, offsets = np.divmod(positions, len(self.lengths))
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            indices[selected] = epoch_order(self.seed, int(epoch), len(self.lengths))[offsets[selected]]
        return indices
