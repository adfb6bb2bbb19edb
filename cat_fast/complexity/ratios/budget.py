"""Assignment of ratios to a set of images under a token budget; complex images get more tokens."""

import math
from collections.abc import Sequence

import numpy as np

from cat_fast.complexity.ratios.mix import RATIOS, tokens_per_image
from cat_fast.errors import UserError
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
        ratios: one to three ratios to choose from.
        preferred: the ratio each image would have without a budget.

    Raises:
        UserError: the budget is below the cost of all images at the highest ratio, or `resolution` does not
            divide into patches.
    """
    levels = sorted(set(to_integers("ratios", ratios)))
    low, middle, high = levels[0], levels[len(levels) // 2], levels[-1]
    low_cost, middle_cost, high_cost = (
        tokens_per_image(ratio, resolution, patch_size) for ratio in (low, middle, high)
    )
    count = len(complexities)
    if not mean_tokens >= high_cost:  # also true for NaN
        size = resolution if isinstance(resolution, int) else f"{resolution[1]} x {resolution[0]}"
        raise UserError(
            f"mean_tokens is {mean_tokens:g}, expected at least {high_cost}: the cost of an image of"
            f" {size} px at {high}x"
        )
    # For each number of images at the lowest ratio, put as many at the middle one as the budget allows.
    at_low = np.arange(count + 1)
    budget = np.floor(min(mean_tokens, low_cost) * count + 1e-6)
    remaining = budget - at_low * low_cost - (count - at_low) * high_cost
    step = middle_cost - high_cost if len(levels) == 3 else 0
    at_middle = np.clip(remaining // step, 0, count - at_low) if step else np.zeros_like(remaining)
    at_high = count - at_low - at_middle
    cost = np.where(remaining < 0, -1, at_low * low_cost + at_middle * middle_cost + at_high * high_cost)
    best = np.flatnonzero(cost == cost.max())

    order = sorted(range(count), key=lambda i: (-complexities[i], i))
    if preferred is not None:
        wanted = np.array([preferred[i] for i in order], dtype=int)
        prefix = {f: np.concatenate([[0], np.cumsum(wanted == f)]) for f in (low, middle, high)}
        first, second = at_low[best], (at_low + at_middle)[best].astype(int)
        agreeing = (
            prefix[low][first]
            + (prefix[middle][second] - prefix[middle][first])
            + (prefix[high][-1] - prefix[high][second])
        )
        best = best[agreeing == agreeing.max()]
    entropy = [_entropy(int(at_low[i]), int(at_middle[i]), int(at_high[i])) for i in best]
    most_diverse = best[int(np.argmax(entropy))]
    n_low, n_middle = int(at_low[most_diverse]), int(at_middle[most_diverse])
    chosen = [low] * n_low + [middle] * n_middle + [high] * (count - n_low - n_middle)
    result = dict(zip(order, chosen, strict=True))
    return [result[i] for i in range(count)]


def _entropy(*counts: int) -> float:
    """Return the entropy in nats of the shares of `counts`; it does not depend on their order."""
    total = sum(counts)
    return -math.fsum(count / total * math.log(count / total) for count in counts if count)
