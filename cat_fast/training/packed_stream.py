"""Which latents each rank packs into its next batch, whatever the number of ranks when the run goes on."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from cat_fast.packing import TokenBudgetPacker
from cat_fast.training.distributed import Ranks


class PackedStream:
    """One rank's endless batches. Epochs, each a new permutation of all latents, are laid end to end; the
    places of this line are dealt to the ranks in turn, and each packs what it is dealt.

    Ranks run through their places at different speeds, as their batches fill. When a run goes on with another
    number of ranks, what no batch has held yet is dealt anew: first, in order, the places before the furthest
    reader that are pending in a packer or not read yet, then the line from there on. So each latent still
    comes up once an epoch; and with the same number of ranks, batches are those of a run without a break.

    Args:
        lengths: tokens of each latent, (N,).
        packer: of this rank; its items are places.
    """

    def __init__(
        self, lengths: Sequence[int], packer: TokenBudgetPacker[int], seed: int, ranks: Ranks
    ) -> None:
        self.lengths, self.packer, self.seed, self.ranks = lengths, packer, seed, ranks
        self.position = ranks.rank

    def next(self) -> list[int]:
        """The indices of the latents in this rank's next batch."""
        while (batch := self.packer.next()) is None:
            self._add(self.position)
            self.position += self.ranks.world_size
        return [self._index(place) for place in batch]

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, as plain data."""
        return {"position": self.position, "packer": self.packer.state_dict()}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the states of all ranks there were, in their order."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        if len(states) == world_size:
            self.position = states[rank]["position"]
            self.packer.load_state_dict(states[rank]["packer"])
            return
        furthest = max(state["position"] for state in states)
        pending = [place for state in states for _, _, place in state["packer"]["pending"]]
        skipped = [p for state in states for p in range(state["position"], furthest, len(states))]
        for place in sorted(pending + skipped)[rank::world_size]:
            self._add(place)
        self.position = furthest + rank

    def _add(self, place: int) -> None:
        self.packer.add(place, self.lengths[self._index(place)])

    def _index(self, place: int) -> int:
        epoch, at = divmod(place, len(self.lengths))
        return int(_order(self.seed, epoch, len(self.lengths))[at])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
