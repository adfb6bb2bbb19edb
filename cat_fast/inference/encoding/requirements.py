"""Checks of image size and ratios before encoding."""

from cat_fast.complexity import RATIOS
from cat_fast.errors import UserError


def require_patches(size: int, deepest_ratio: int) -> None:
    """Check that an image of `size` px divides into patches at every ratio; raise UserError otherwise."""
    smallest = 2 * deepest_ratio  # one 2 x 2 patch of the smallest latent
    if size < 1 or size % smallest:
        raise UserError(f"size {size}: expected a multiple of {smallest} px, such as 256 or 512")


def require_served(ratio: int | None, served: tuple[int, ...]) -> None:
    """Check that `ratio` is among a tokenizer's ratios `served`, or for None (adaptive) that all are served.

    Raises:
        UserError: a ratio is missing.
    """
    names = ", ".join(map(str, served))
    if ratio is not None and ratio not in served:
        raise UserError(f"this tokenizer has no ratio {ratio}; it was trained for {names}")
    if ratio is None and not set(RATIOS) <= set(served):
        wanted = ", ".join(map(str, RATIOS))
        raise UserError(
            f"adaptive ratios need a tokenizer with ratios {wanted}, this one has {names}; use a fixed ratio"
        )
