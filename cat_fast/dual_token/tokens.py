"""`DualTokens`: the codes of one image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cat_fast.dual_token.grid import Grid
from cat_fast.errors import UserError


@dataclass(frozen=True, eq=False)
class DualTokens:
    """Semantic codes and guide codes of one image, int64 on the CPU.

    Raises:
        UserError: other shapes or dtypes, or negative codes.
    """

    semantic: Tensor
    """(32,), in causal order; (0,) without the semantic branch."""
    guide: Tensor
    """(h, w); (0, 0) without the guide."""

    def __post_init__(self) -> None:
        for name, codes, dimensions in (("semantic", self.semantic, 1), ("guide", self.guide, 2)):
            if codes.ndim != dimensions or codes.dtype != torch.int64:
                shape = "(n,)" if dimensions == 1 else "(h, w)"
                raise UserError(
                    f"{name} codes: expected int64 of shape {shape}, got {codes.dtype} of"
                    f" {tuple(codes.shape)}"
                )
            if codes.numel() and codes.min() < 0:
                raise UserError(f"{name} codes: expected indices from 0, got {int(codes.min())}")
        if (self.guide.shape[0] == 0) != (self.guide.shape[1] == 0):
            raise UserError(f"guide codes: expected a grid or none, got {tuple(self.guide.shape)}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DualTokens):
            return NotImplemented
        return torch.equal(self.semantic, other.semantic) and torch.equal(self.guide, other.guide)

    __hash__ = None  # type: ignore[assignment] # tensors

    @property
    def grid(self) -> Grid:
        """Height and width of the guide in tokens."""
        return self.guide.shape[0], self.guide.shape[1]

    def __len__(self) -> int:
        """Return the number of tokens, without the special ones of a sequence."""
        return self.semantic.numel() + self.guide.numel()

    def without_semantic(self) -> "DualTokens":
        """Return the guide alone."""
        return DualTokens(self.semantic[:0], self.guide)

    def without_guide(self) -> "DualTokens":
        """Return the semantic codes alone."""
        return DualTokens(self.semantic, self.guide[:0, :0])
