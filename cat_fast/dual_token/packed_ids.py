"""Packed batches of flat sequences, whose lengths differ by a factor of up to eight between guide sizes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.packing import TokenBudgetPacker


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedIds:
    """S sequences with T ids in total, without padding."""

    ids: Tensor
    """(T,) int64."""
    cu_seqlens: Tensor
    """(S + 1,) int32; sequence s is ids cu_seqlens[s] to cu_seqlens[s + 1]."""
    positions: Tensor
    """(T,) int64: position of each id in its sequence."""
    max_seqlen: int
    """Length of the longest sequence."""

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "PackedIds":
        """Pack sequences in the given order.

        Raises:
            UserError: there are none, or one is empty.
        """
        if not sequences or not all(map(len, sequences)):
            raise UserError("sequences: expected at least one, and no empty one")
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return cls(
            ids=torch.tensor([token for sequence in sequences for token in sequence]),
            cu_seqlens=offsets.to(torch.int32),
            positions=torch.cat([torch.arange(int(length)) for length in lengths]),
            max_seqlen=int(lengths.max()),
        )

    def split(self) -> list[Tensor]:
        """Return the ids of each sequence; views."""
        return list(self.ids.split(self.cu_seqlens.diff().tolist()))

    def block_causal_mask(self) -> Tensor:
        """Return the attention mask (1, 1, T, T), boolean: True where an id sees an earlier one of its own
        sequence, or itself."""
        lengths = self.cu_seqlens.diff()
        return block_causal(torch.repeat_interleave(torch.arange(len(lengths)), lengths))[None, None]


def block_causal(owner: Tensor) -> Tensor:
    """Return which positions see which, (T, T) boolean: earlier ones of their own sequence, and themselves.

    Args:
        owner: (T,) number of each position's sequence.
    """
    same = owner[:, None] == owner
    return same & torch.ones_like(same).tril()


def pack_ids(sequences: Iterable[Sequence[int]], max_tokens: int) -> Iterator[PackedIds]:
    """Yield packed batches of at most `max_tokens` ids, each sequence in one of them.

    Raises:
        UserError: a sequence is longer than `max_tokens`, or empty.
    """
    waiting: dict[int, Sequence[int]] = {}

    def lengths() -> Iterator[tuple[int, int]]:
        for number, sequence in enumerate(sequences):
            waiting[number] = sequence
            yield number, len(sequence)

    for batch in TokenBudgetPacker[int](max_tokens).pack(lengths()):
        yield PackedIds.of([waiting.pop(number) for number in batch])
