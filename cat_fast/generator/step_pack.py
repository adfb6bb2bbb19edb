"""Packing of one sampling step, filled up with null sequences to sizes that kernels or graphs require."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch

from cat_fast.generator.packed_text import PackedText
from cat_fast.packing import PackedSequence
from cat_fast.packing.transfer import copy_together

FEWEST_SEQUENCES, FEWEST_TOKENS, FEWEST_TEXT_TOKENS, SHORTEST = 16, 256, 64, 64
"""Smallest sizes of a bucket; steps below them take no longer on a GPU."""


class StepRow(NamedTuple):
    """One sequence of a step."""

    tokens: torch.Tensor
    """(n, C)."""
    grid: tuple[int, int]
    ratio: int
    label: int
    timestep: float
    text: torch.Tensor | None
    """(L, text_dim); None for a model without text."""


class StepSize(NamedTuple):
    """Sizes of a step's tensors."""

    sequences: int
    tokens: int
    max_seqlen: int
    text_tokens: int | None
    """None for a model without text."""
    max_text: int

    @classmethod
    def of(cls, rows: Sequence[StepRow]) -> "StepSize":
        """Return the sizes of unfilled rows."""
        lengths = [len(row.tokens) for row in rows]
        texts = [len(row.text) for row in rows if row.text is not None]
        return cls(
            len(rows), sum(lengths), max(lengths), sum(texts) if texts else None, max(texts, default=0)
        )


@dataclass(frozen=True)
class Filling:
    """Sizes that steps are filled up to.

    Null sequences are added behind the others, so the bits of an image do not change as long as they do not
    depend on the number of rows (`inference.engine.invariance`).
    """

    rows: int = 1
    """Sequences, tokens and text tokens are filled up to multiples of this."""
    buckets: bool = False
    """Fill up to one of a few sizes, with a few upper bounds of lengths, so that CUDA graphs are used again.
    Tokens grow by at most a half."""

    def target(self, size: StepSize) -> StepSize:
        """Return the sizes that a step is filled up to; with buckets, lengths are upper bounds."""
        tokens, text_tokens = self._tokens(size.tokens), self._text_tokens(size.text_tokens)
        missing, missing_text = tokens - size.tokens, (text_tokens or 0) - (size.text_tokens or 0)
        max_seqlen, max_text = size.max_seqlen, max(size.max_text, min(missing_text, SHORTEST))
        if self.buckets:
            max_seqlen, max_text = _power(max_seqlen, 4, SHORTEST), _power(max_text, 4, SHORTEST)
        needed = max(-(-missing // max_seqlen), -(-missing_text // max(max_text, 1)))
        return StepSize(self._sequences(size.sequences + needed), tokens, max_seqlen, text_tokens, max_text)

    def fill(self, rows: Sequence[StepRow], null_class: int) -> tuple[list[StepRow], StepSize]:
        """Return rows with null sequences behind them, and the sizes of the filled step."""
        size, like = StepSize.of(rows), rows[0]
        target = self.target(size)
        number = target.sequences - size.sequences
        tokens = _zeros(like.tokens, target.tokens - size.tokens, number)
        texts: list[torch.Tensor | None] = [None] * number
        if like.text is not None and target.text_tokens is not None and size.text_tokens is not None:
            texts = [*_zeros(like.text, target.text_tokens - size.text_tokens, number)]
        fillers = [
            StepRow(one, (1, len(one)), like.ratio, null_class, 0.0, text)
            for one, text in zip(tokens, texts, strict=True)
        ]
        return [*rows, *fillers], target

    def _sequences(self, number: int) -> int:
        return self._multiple(_power(number, 2, FEWEST_SEQUENCES) if self.buckets else number)

    def _tokens(self, number: int) -> int:
        if not self.buckets:
            return self._multiple(number)
        size = _power(number, 2, FEWEST_TOKENS)
        return self._multiple(size * 3 // 4 if number <= size * 3 // 4 and size > FEWEST_TOKENS else size)

    def _text_tokens(self, number: int | None) -> int | None:
        if number is None:
            return None
        return self._multiple(_power(number, 2, FEWEST_TEXT_TOKENS) if self.buckets else number)

    def _multiple(self, number: int) -> int:
        return -(-number // self.rows) * self.rows


def _power(number: int, base: int, smallest: int) -> int:
    """Return the smallest of smallest * base^k that is at least `number`."""
    return next(size for k in count() if (size := smallest * base**k) >= number)


def _zeros(like: torch.Tensor, total: int, number: int) -> Sequence[torch.Tensor]:
    """Return `number` zero tensors of `total` rows in all, which differ by at most one row."""
    if not number:
        return ()
    share, more = divmod(total, number)
    return like.new_zeros(total, like.shape[1]).split([share + (i < more) for i in range(number)])


def join(rows: Sequence[StepRow], size: StepSize) -> tuple[PackedSequence, PackedText | None]:
    """Pack the rows of a step; `size` has the upper bounds of their lengths."""
    lengths = torch.tensor([0] + [len(row.tokens) for row in rows])
    texts = [row.text for row in rows if row.text is not None]
    text_lengths = torch.tensor([0] + [len(text) for text in texts])
    label, timestep, cu_seqlens, grid, ratio, cu_texts = copy_together(
        [
            torch.tensor([row.label for row in rows]),
            torch.tensor([row.timestep for row in rows]),
            lengths.cumsum(0, dtype=torch.int32),
            torch.tensor([row.grid for row in rows], dtype=torch.int32),
            torch.tensor([row.ratio for row in rows], dtype=torch.int32),
            text_lengths.cumsum(0, dtype=torch.int32),
        ],
        rows[0].tokens.device,
    )
    packed = PackedSequence(
        tokens=torch.cat([row.tokens for row in rows]),
        cu_seqlens=cu_seqlens,
        grid=grid,
        ratio=ratio,
        label=label,
        timestep=timestep,
        max_seqlen=size.max_seqlen,
    )
    if not texts:
        return packed, None
    return packed, PackedText(tokens=torch.cat(texts), cu_seqlens=cu_texts, max_seqlen=size.max_text)
