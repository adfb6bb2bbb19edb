"""Compression ratios, mixes of them over a set of images, and their token counts."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from cat_fast.errors import UserError
from cat_fast.integers import as_integer

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


def tokens_per_image(ratio: int, resolution: int | tuple[int, int] = 512, patch_size: int = 2) -> int:
    """Return the tokens of one image, (height / ratio / patch_size) · (width / ratio / patch_size).

    A square image of 512 px has 1024, 256 or 64.

    Args:
        ratio: 8, 16 or 32.
        resolution: side of a square image in pixels, or height and width.
        patch_size: side of a patch in latent pixels.

    Raises:
        UserError: `ratio` is not one of 8, 16, 32, or a side is not a multiple of ratio · patch_size.
    """
    ratio = valid_ratio(ratio)
    unit = ratio * patch_size
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    for side in (height, width):
        if side % unit or side < unit:
            raise UserError(
                f"an image of {side} px does not divide into {patch_size} x {patch_size} patches"
                f" at {ratio}x; use a multiple of {unit} px"
            )
    return (height // unit) * (width // unit)


def mean_tokens(mix: Mapping[int, float], resolution: int = 512, patch_size: int = 2) -> float:
    """Return the mean tokens per image of `mix`, {ratio: share}; ratios of share 0 are ignored."""
    shares = require_mix(mix).items()
    return math.fsum(
        share * tokens_per_image(ratio, resolution, patch_size) for ratio, share in shares if share
    )


def average_latent_side(mix: Mapping[int, float], resolution: int = 512) -> float:
    """Return the published "average latent dim": the root mean square of the latent side, in latent pixels.

    Tokens and FLOPs are proportional to the latent's area, hence not the arithmetic mean of sides.
    """
    return math.sqrt(
        math.fsum(share * (resolution / ratio) ** 2 for ratio, share in require_mix(mix).items())
    )


def average_ratio(mix: Mapping[int, float]) -> float:
    """Return the published "average rate": the fixed ratio with the same mean latent area."""
    return 1 / average_latent_side(mix, resolution=1)


def require_mix(mix: Mapping[int, float]) -> Mapping[int, float]:
    """Return `mix`, {ratio: share}; raise UserError for unknown ratios and shares that do not sum to 1."""
    mix = {valid_ratio(ratio): share for ratio, share in mix.items()}
    if any(share < 0 for share in mix.values()) or not math.isclose(math.fsum(mix.values()), 1, abs_tol=1e-6):
        raise UserError(f"the shares of a mix of ratios must be positive and sum to 1, got {mix}")
    return mix


def relative_cost(mix: Mapping[int, float], fixed_ratio: int) -> float:
    """Return the mean latent area of `mix`, relative to the area at `fixed_ratio`."""
    return math.fsum(share * (fixed_ratio / ratio) ** 2 for ratio, share in mix.items())


def valid_ratio(ratio: int) -> int:
    """Return `ratio` as an int; raise UserError for other values than 8, 16 and 32."""
    integer = as_integer(ratio)
    if integer is None or integer not in RATIOS:
        raise UserError(f"a compression ratio must be one of 8, 16 and 32, got {ratio!r}")
    return integer
