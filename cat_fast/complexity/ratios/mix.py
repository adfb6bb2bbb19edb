"""Compression ratios, mixes of them over a set of images, and their token counts.

Functions accept the tokenizer's ratios by default; `ratios` names another set.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from cat_fast.errors import UserError
from cat_fast.integers import as_integer, to_integers

RATIOS = (8, 16, 32)
"""Compression ratios f of the nested tokenizer: an image of side r has a latent of side r/f."""


def ratio_mix(ratios: Iterable[int]) -> dict[int, float]:
    """Return the share of each ratio, {8: share, 16: share, 32: share}, summing to 1.

    Raises:
        UserError: `ratios` is empty or contains an unknown ratio.
    """
    counts = Counter(valid_ratio(ratio) for ratio in ratios)
    if not counts:
        raise UserError("a mix of ratios needs at least one image, got no images")
    return {ratio: counts[ratio] / counts.total() for ratio in RATIOS}


def mix_entropy(mix: Mapping[int, float]) -> float:
    """Return the entropy of a mix in nats: 0 if all images have one ratio, log 3 for three equal shares."""
    return 0.0 - math.fsum(share * math.log(share) for share in mix.values() if share)


def tokens_per_image(
    ratio: int,
    resolution: int | tuple[int, int] = 512,
    patch_size: int = 2,
    *,
    ratios: Sequence[int] = RATIOS,
) -> int:
    """Return the tokens of one image, (height / ratio / patch_size) · (width / ratio / patch_size).

    A square image of 512 px has 1024, 256 or 64.

    Args:
        ratio: one of `ratios`.
        resolution: side of a square image in pixels, or height and width.
        patch_size: side of a patch in latent pixels.

    Raises:
        UserError: `ratio` is not one of `ratios`, or a side is not a multiple of ratio · patch_size.
    """
    ratio = valid_ratio(ratio, ratios)
    unit = ratio * patch_size
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    for side in (height, width):
        if side % unit or side < unit:
            raise UserError(
                f"an image of {side} px does not divide into {patch_size} x {patch_size} patches"
                f" at {ratio}x; use a multiple of {unit} px"
            )
    return (height // unit) * (width // unit)


def token_costs(
    ratios: Sequence[int], resolution: int | tuple[int, int] = 512, patch_size: int = 2
) -> list[int]:
    """Return the tokens of an image at each of `ratios`; raise UserError if a size does not divide."""
    highest_first = [tokens_per_image(f, resolution, patch_size, ratios=ratios) for f in reversed(ratios)]
    return highest_first[::-1]


def mean_tokens(
    mix: Mapping[int, float],
    resolution: int | tuple[int, int] = 512,
    patch_size: int = 2,
    *,
    ratios: Sequence[int] = RATIOS,
) -> float:
    """Return the mean tokens per image of `mix`, {ratio: share}; ratios of share 0 are ignored."""
    shares = require_mix(mix, ratios).items()
    return math.fsum(
        share * tokens_per_image(ratio, resolution, patch_size, ratios=ratios)
        for ratio, share in shares
        if share
    )


def average_latent_side(
    mix: Mapping[int, float], resolution: int = 512, *, ratios: Sequence[int] = RATIOS
) -> float:
    """Return the published "average latent dim": the root mean square of the latent side, in latent pixels.

    Tokens and FLOPs are proportional to the latent's area, hence not the arithmetic mean of sides.
    """
    return math.sqrt(
        math.fsum(share * (resolution / ratio) ** 2 for ratio, share in require_mix(mix, ratios).items())
    )


def average_ratio(mix: Mapping[int, float], *, ratios: Sequence[int] = RATIOS) -> float:
    """Return the published "average rate": the fixed ratio with the same mean latent area."""
    return 1 / average_latent_side(mix, resolution=1, ratios=ratios)


def require_mix(mix: Mapping[int, float], ratios: Sequence[int] = RATIOS) -> Mapping[int, float]:
    """Return `mix`, {ratio: share}; raise UserError for unknown ratios and shares that do not sum to 1."""
    mix = {valid_ratio(ratio, ratios): share for ratio, share in mix.items()}
    if any(share < 0 for share in mix.values()) or not math.isclose(math.fsum(mix.values()), 1, abs_tol=1e-6):
        raise UserError(f"the shares of a mix of ratios must be positive and sum to 1, got {mix}")
    return mix


def require_budget(
    mean_tokens: float, ratios: Sequence[int], costs: Sequence[int], resolution: int | tuple[int, int]
) -> None:
    """Check that a budget suffices for images at the highest ratio.

    Args:
        costs: tokens of an image per ratio.

    Raises:
        UserError: it does not, or it is not a number; names the range that can be reached.
    """
    if not mean_tokens >= costs[-1]:  # also for NaN
        size = resolution if isinstance(resolution, int) else f"{resolution[1]} x {resolution[0]}"
        raise UserError(
            f"mean_tokens is {mean_tokens:g}, expected at least {costs[-1]}: images of {size} px cost"
            f" {costs[-1]} tokens at {ratios[-1]}x to {costs[0]} at {ratios[0]}x"
        )


def valid_ratio(ratio: int, ratios: Sequence[int] = RATIOS) -> int:
    """Return `ratio` as an int; raise UserError if it is not one of `ratios`."""
    integer = as_integer(ratio)
    if integer is None or integer not in ratios:
        *others, last = map(str, ratios)
        raise UserError(f"a compression ratio must be one of {', '.join(others)} and {last}, got {ratio!r}")
    return integer


def valid_ratios(ratios: Sequence[int]) -> tuple[int, ...]:
    """Return a set of ratios as ints.

    Raises:
        UserError: fewer than two ratios, or they are not positive integers in ascending order.
    """
    found = to_integers("ratios", ratios)
    if len(found) < 2 or found[0] < 1 or any(a >= b for a, b in itertools.pairwise(found)):
        raise UserError(f"ratios must be two or more positive integers in ascending order, got {found}")
    return found
