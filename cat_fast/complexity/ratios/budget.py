"""Assignment of ratios to a set of images under a token budget; complex images get more tokens."""

import itertools
from collections.abc import Sequence

import numpy as np

from cat_fast.complexity.ratios.cuts import Agreement, cut_within_budget
from cat_fast.complexity.ratios.mix import RATIOS, require_budget, token_costs
from cat_fast.integers import to_integers


def ratios_within_budget(
    complexities: Sequence[float],
    mean_tokens: float,
    *,
    resolution: int | tuple[int, int] = 512,
    patch_size: int = 2,
    ratios: Sequence[int] = RATIOS,
    preferred: Sequence[int] | None = None,
) -> list[int]:
    """Choose a ratio per image so that their mean tokens come as close to `mean_tokens` as possible without
    exceeding it.

    No image gets fewer tokens than a less complex one. Many mixes cost the same: one image at 8x costs as
    much as sixteen at 32x. Among these, the mix that agrees best with `preferred` is chosen, then the most
    diverse one, in which the shares of the ratios have the largest entropy. `preferred` ratios that never
    increase with complexity and meet the budget exactly are returned unchanged, unless complexities are tied.

    Args:
        complexities: one value per image, in any unit; ties favour earlier images.
        resolution: side of the images in pixels, or height and width.
        ratios: the ratios to choose from, in any order.
        preferred: the ratio each image would have without a budget.

    Raises:
        UserError: the budget is below the cost of all images at the highest ratio, or `resolution` does not
            divide into patches.
    """
    levels = sorted(set(to_integers("ratios", ratios)))
    costs = token_costs(levels, resolution, patch_size)
    require_budget(mean_tokens, levels, costs, resolution)
    count = len(complexities)
    if not count:
        return []
    order = np.argsort(-np.asarray(complexities, dtype=np.float64), kind="stable")
    wanted = None if preferred is None else np.asarray(preferred, dtype=np.int64)[order]
    cuts = cut_within_budget(
        np.arange(count + 1, dtype=np.float64),
        costs,
        min(mean_tokens, costs[0]) * count,
        agreement=None if wanted is None else _agreement(wanted, levels),
        estimate=None if wanted is None else np.cumsum([(wanted == f).sum() for f in levels[:-1]]).tolist(),
    )
    chosen = np.empty(count, dtype=np.int64)
    chosen[order] = np.repeat(levels, np.diff([0, *cuts, count]))
    return chosen.tolist()


def _agreement(wanted: np.ndarray, levels: Sequence[int]) -> Agreement:
    """Return the function from cuts to the number of images with their wanted ratio."""
    matches = [np.concatenate([[0], np.cumsum(wanted == f)]) for f in levels]

    def count(cuts: Sequence[np.ndarray]) -> np.ndarray:
        bounds = [np.zeros(len(cuts[0])), *cuts, np.full(len(cuts[0]), len(wanted))]
        indices = [bound.astype(np.int64) for bound in bounds]
        return sum(
            match[high] - match[low]
            for match, (low, high) in zip(matches, itertools.pairwise(indices), strict=True)
        )

    return count
