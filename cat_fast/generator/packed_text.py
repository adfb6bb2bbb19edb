"""`PackedText`: encoded texts as one run of tokens without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch

from cat_fast.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedText:
    """S texts with L tokens in total, one text per sequence of a `PackedSequence`, in the same order.

    An empty text is the null text of classifier-free guidance.

    Raises:
        UserError: inconsistent fields. Shapes are always checked. The values of ``cu_seqlens`` are checked on
            the CPU only, because reading them from a GPU would synchronize.
    """

    tokens: torch.Tensor
    """(L, text_dim) float: last hidden states of the encoder."""
    cu_seqlens: torch.Tensor
    """(S + 1,) int32; text s is tokens cu_seqlens[s] to cu_seqlens[s + 1]."""
    max_seqlen: int
    """Length of the longest text in tokens, or a bound above it, kept on the host to avoid device
    synchronization."""

    lengths: tuple[int, ...] | None = None
    """Length of each text, if it is known on the host."""

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or not self.tokens.is_floating_point():
            raise UserError(
                f"text tokens: expected (L, text_dim) of a float dtype, got {_format(self.tokens)}"
            )
        if self.cu_seqlens.ndim != 1 or self.cu_seqlens.dtype != torch.int32 or len(self.cu_seqlens) < 2:
            raise UserError(
                f"text cu_seqlens: expected (S + 1,) int32 with S >= 1, got {_format(self.cu_seqlens)}"
            )
        if self.cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_values()

    def __len__(self) -> int:
        """Return the number of texts, S."""
        return self.cu_seqlens.shape[0] - 1

    @classmethod
    def of(cls, texts: Sequence[torch.Tensor]) -> Self:
        """Pack texts (tokens, text_dim) of the same width, dtype and device, in the given order.

        Raises:
            UserError: `texts` is empty, or the widths differ.
        """
        if not texts or len({text.shape[1:] for text in texts}) > 1:
            shapes = [tuple(text.shape) for text in texts]
            raise UserError(f"texts: expected at least one, all of the same width, got {shapes}")
        lengths = [len(text) for text in texts]
        offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return cls(
            tokens=torch.cat(list(texts)),
            cu_seqlens=offsets.to(texts[0].device, non_blocking=True),
            max_seqlen=max(lengths),
            lengths=tuple(lengths),
        )

    def null(self) -> Self:
        """Return S null texts, for the unconditional half of classifier-free guidance."""
        return type(self)(tokens=self.tokens[:0], cu_seqlens=torch.zeros_like(self.cu_seqlens), max_seqlen=0)

    def split(self) -> list[Self]:
        """Return one PackedText per text; tokens are views."""
        return [self.of([self.tokens[begin:end]]) for begin, end in pairwise(self.cu_seqlens.tolist())]

    @classmethod
    def concat(cls, packs: Sequence[Self]) -> Self:
        """Concatenate packs, in order.

        Raises:
            UserError: `packs` is empty.
        """
        if not packs:
            raise UserError("nothing to concatenate: expected at least one PackedText")
        lengths = torch.cat([pack.cu_seqlens.diff() for pack in packs])
        return cls(
            tokens=torch.cat([pack.tokens for pack in packs]),
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            max_seqlen=max(pack.max_seqlen for pack in packs),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move both tensors to `device`; cast the tokens to `dtype`."""
        non_blocking = device is not None and torch.device(device).type != "cpu"
        return type(self)(
            tokens=self.tokens.to(device=device, dtype=dtype, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device=device, non_blocking=non_blocking),
            max_seqlen=self.max_seqlen,
            lengths=self.lengths,
        )

    def _check_values(self) -> None:
        lengths = self.cu_seqlens.diff()
        total = self.tokens.shape[0]
        if self.cu_seqlens[0] != 0 or self.cu_seqlens[-1] != total or (lengths < 0).any():
            raise UserError(
                f"text cu_seqlens: expected to increase from 0 to the {total} tokens, "
                f"got {self.cu_seqlens.tolist()}"
            )
        if self.max_seqlen < int(lengths.max()):
            raise UserError(
                f"text max_seqlen: expected at least {int(lengths.max())}, the longest text,"
                f" got {self.max_seqlen}"
            )


def _format(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
