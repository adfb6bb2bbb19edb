"""`PackedText`: what a text encoder says of several texts, as one run of tokens without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch

from cat_fast.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedText:
    """S texts of L tokens in all, one text for each sequence of a `PackedSequence`, in its order.

    A text of no tokens is the null text of classifier-free guidance.

    Raises:
        UserError: if the fields do not fit each other. Shapes are checked always; values (does ``cu_seqlens``
            rise from 0 to L) where they are on the CPU, as a GPU would have to stop for it.
    """

    tokens: torch.Tensor
    """(L, text_dim) float: last hidden states of the encoder."""
    cu_seqlens: torch.Tensor
    """(S + 1,) int32; text s holds tokens cu_seqlens[s] to cu_seqlens[s + 1]."""
    max_seqlen: int
    """Length of the longest text in tokens, on the host so that no use of it has to wait for a device."""

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or not self.tokens.is_floating_point():
            raise UserError(
                f"text tokens: expected (L, text_dim) of a float dtype, got {_spell(self.tokens)}"
            )
        if self.cu_seqlens.ndim != 1 or self.cu_seqlens.dtype != torch.int32 or len(self.cu_seqlens) < 2:
            raise UserError(
                f"text cu_seqlens: expected (S + 1,) int32 with S >= 1, got {_spell(self.cu_seqlens)}"
            )
        if self.cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_values()

    def __len__(self) -> int:
        """The number of texts, S."""
        return self.cu_seqlens.shape[0] - 1

    @classmethod
    def of(cls, texts: Sequence[torch.Tensor]) -> Self:
        """Pack texts of (tokens, text_dim) each, all of one width, dtype and device, in the order given.

        Raises:
            UserError: there is none, or their widths differ.
        """
        if not texts or len({text.shape[1:] for text in texts}) > 1:
            raise UserError(f"texts: expected some of one width, got {[tuple(t.shape) for t in texts]}")
        lengths = [len(text) for text in texts]
        offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return cls(
            tokens=torch.cat(list(texts)), cu_seqlens=offsets.to(texts[0].device), max_seqlen=max(lengths)
        )

    def null(self) -> Self:
        """As many null texts, such as the unconditional half of classifier-free guidance takes."""
        return type(self)(tokens=self.tokens[:0], cu_seqlens=torch.zeros_like(self.cu_seqlens), max_seqlen=0)

    def split(self) -> list[Self]:
        """Each text as a PackedText of its own; tokens are views."""
        return [self.of([self.tokens[begin:end]]) for begin, end in pairwise(self.cu_seqlens.tolist())]

    @classmethod
    def concat(cls, packs: Sequence[Self]) -> Self:
        """One pack of all texts of `packs`, in order.

        Raises:
            UserError: if there is none.
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
        at_once = device is not None and torch.device(device).type != "cpu"
        return type(self)(
            tokens=self.tokens.to(device=device, dtype=dtype, non_blocking=at_once),
            cu_seqlens=self.cu_seqlens.to(device=device, non_blocking=at_once),
            max_seqlen=self.max_seqlen,
        )

    def _check_values(self) -> None:
        lengths = self.cu_seqlens.diff()
        total = self.tokens.shape[0]
        if self.cu_seqlens[0] != 0 or self.cu_seqlens[-1] != total or (lengths < 0).any():
            raise UserError(
                f"text cu_seqlens: expected to rise from 0 to the {total} tokens, "
                f"got {self.cu_seqlens.tolist()}"
            )
        if self.max_seqlen != int(lengths.max()):
            raise UserError(
                f"text max_seqlen: the longest text has {int(lengths.max())} tokens, not {self.max_seqlen}"
            )


def _spell(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
