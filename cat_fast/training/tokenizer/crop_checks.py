"""Checks of the size of training crops against the ratios and the discriminator, before training starts."""

from collections.abc import Iterable

from cat_fast.data.images.size import format_size
from cat_fast.errors import UserError
from cat_fast.training.config.settings import TokenizerRun


def require_multiples(config: TokenizerRun, ratios: Iterable[int]) -> None:
    """Check that the model can encode crops at all of `ratios`.

    Raises:
        UserError: a side of the crops is not a multiple of a ratio.
    """
    size = config.data.crop_size
    for ratio in sorted(ratios, reverse=True):
        if wrong := [side for side in size if side % ratio]:
            near = [max(ratio, round(side / ratio) * ratio) for side in size]
            raise UserError(
                f"data.image_size: {format_size(size)}: {wrong[0]} is not a multiple of the ratio {ratio}; "
                f"set it to {near[0] if near[0] == near[1] else near}, or remove the ratio from model.ratios "
                "and the data"
            )


def require_discriminator_fits(config: TokenizerRun, resolution: int) -> None:
    """Check that crops hold a window of the discriminator, if the run has one.

    Args:
        resolution: side of the window, in pixels.

    Raises:
        UserError: the smaller side of the crops is below it.
    """
    size = config.data.crop_size
    if config.loss.gan_weight and min(size) < resolution:
        smaller = 1 << (min(size).bit_length() - 1)
        change = (
            "use a discriminator.pretrained of lower resolution"
            if config.discriminator.pretrained
            else f"set discriminator.resolution={smaller}"
            if smaller >= 8
            else "set loss.gan_weight=0"
        )
        raise UserError(
            f"data.image_size: crops of {format_size(size)} are smaller than the discriminator's "
            f"{format_size(resolution)}: raise data.image_size to at least {resolution}, or {change}"
        )
