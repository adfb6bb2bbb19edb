"""A budget of tokens over a set of images: the more complex get more of it."""

from collections.abc import Sequence

import numpy as np

from cat_fast.complexity.ratio import RATIOS, tokens_per_image
from cat_fast.errors import UserError


def ratios_within_budget(
    complexities: Sequence[float],
    mean_tokens: float,
    *,
    resolution: int | tuple[int, int] = 512,
    patch_size: int = 2,
    ratios: Sequence[int] = RATIOS,
    preferred: Sequence[int] | None = None,
) -> list[int]:
    """A ratio for each image, so that the mean of their tokens is as near to `mean_tokens` as it can be
    without exceeding it.

    No image gets fewer tokens than a less complex one. Many mixes cost the same (an 8x image as much as
    sixteen at 32x): the one taken agrees best with `preferred`, and of those it has the fewest at the lowest
    ratio. So a budget that `preferred` ratios just meet gives them back.

    Args:
        complexities: of each image, in any unit; of equal ones the first get more.
        resolution: side of the images in pixels, or height and width.
        ratios: up to three that may be chosen.
        preferred: the ratio that each image would have without a budget.

    Raises:
        UserError: a budget below what all images cost at the highest ratio, or a resolution that makes no
            whole number of patches.
    """
    levels = sorted(set(ratios))
    low, middle, high = levels[0], levels[len(levels) // 2], levels[-1]
    most, some, least = (tokens_per_image(ratio, resolution, patch_size) for ratio in (low, middle, high))
    count = len(complexities)
    if not mean_tokens >= least:  # neither is NaN
        size = resolution if isinstance(resolution, int) else f"{resolution[1]} x {resolution[0]}"
        raise UserError(
            f"mean_tokens {mean_tokens:g}: an image of {size} px costs {least} tokens at least ({high}x)"
        )
    # With `first` images at the lowest ratio, as many at the middle one as the rest of the budget pays.
    first = np.arange(count + 1)
    left = np.floor(min(mean_tokens, most) * count + 1e-6) - first * most - (count - first) * least
    step = some - least if len(levels) == 3 else 0
    second = np.clip(left // step, 0, count - first) if step else np.zeros_like(left)
    cost = np.where(left < 0, -1, first * most + second * some + (count - first - second) * least)
    best = np.flatnonzero(cost == cost.max())

    order = sorted(range(count), key=lambda i: (-complexities[i], i))
    if preferred is not None:
        wanted = np.array([preferred[i] for i in order], dtype=int)
        below = {f: np.concatenate([[0], np.cumsum(wanted == f)]) for f in (low, middle, high)}
        one, two = first[best], (first + second)[best].astype(int)
        agreeing = (
            below[low][one] + (below[middle][two] - below[middle][one]) + below[high][-1] - below[high][two]
        )
        best = best[agreeing == agreeing.max()]
    at_low, at_middle = int(first[best[0]]), int(second[best[0]])
    chosen = [low] * at_low + [middle] * at_middle + [high] * (count - at_low - at_middle)
    result = dict(zip(order, chosen, strict=True))
    return [result[i] for i in range(count)]
