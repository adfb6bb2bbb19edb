"""Thresholds from JPEG sizes to compression ratios.

The paper fits them so that the JPEG baseline has the mix of ratios of the model that it is compared with;
`JpegThresholds.fit` does the same for any set of images.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cat_fast.complexity.ratios.mix import require_mix
from cat_fast.complexity.ratios.thresholds import parse_numbers
from cat_fast.complexity.signals.jpeg_size import JPEG_SIDE, jpeg_bytes
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MIN_FITTED_IMAGES = 100
_TIE_TOLERANCE = 1e-3
"""Share of images by which equal sizes may move a cut of large sets."""


@dataclass(frozen=True, order=True)
class JpegThresholds:
    """Thresholds from JPEG sizes in bytes to ratios: [0, a] gets 32x, (a, b] 16x, larger files 8x.

    Raises:
        UserError: a and b are not integers with 0 <= a <= b.
    """

    a: int
    b: int

    def __post_init__(self) -> None:
        are_integers = all(isinstance(t, int) and not isinstance(t, bool) for t in (self.a, self.b))
        if not are_integers or not 0 <= self.a <= self.b:
            raise UserError(f"JPEG thresholds must be bytes with 0 <= a <= b, got ({self.a}, {self.b})")

    @classmethod
    def parse(cls, text: str) -> "JpegThresholds":
        """Parse the command-line form "a,b"."""
        return cls(*parse_numbers(text, "JPEG thresholds", "38761,65837"))

    def ratio(self, size: int) -> int:
        """Return the compression ratio for a JPEG size in bytes."""
        return 32 if size <= self.a else 16 if size <= self.b else 8

    @classmethod
    def fit(cls, sizes: Iterable[int], mix: Mapping[int, float]) -> "JpegThresholds":
        """Return the thresholds under which images have a mix of ratios: quantiles of their JPEG sizes.

        Args:
            sizes: JPEG sizes in bytes (`jpeg_bytes`) of at least 100 representative images.
            mix: share of each ratio, {8: share, 16: share, 32: share}; a missing ratio has the share 0.

        Raises:
            UserError: fewer than 100 images, sizes that are not positive integers, shares that do not sum to
                1, or so many equal sizes at a threshold that no pair gives the mix.
        """
        ordered = _sorted_sizes(sizes)
        shares = require_mix(mix)
        count = len(ordered)
        if count < MIN_FITTED_IMAGES:
            raise UserError(
                f"JPEG thresholds are fitted to at least {MIN_FITTED_IMAGES} images, got {count};"
                " measure more images"
            )
        at_32 = shares.get(32, 0.0) * count
        a = _cut(ordered, at_32, 32)
        b = _cut(ordered, at_32 + shares.get(16, 0.0) * count, 16)
        return cls(a, b)


JPEG_THRESHOLDS = JpegThresholds(38761, 65837)
"""Published thresholds, for images of 512 px (resized with bicubic interpolation) at JPEG quality 75."""


def jpeg_ratio(image: "Tensor", thresholds: JpegThresholds = JPEG_THRESHOLDS) -> int:
    """Return the compression ratio 8, 16 or 32 of `image`, uint8 (3 or 1, 512, 512), by its JPEG size.

    Raises:
        UserError: wrong shape or dtype; the thresholds apply to 512 x 512 px only.
    """
    if tuple(image.shape[-2:]) != (JPEG_SIDE, JPEG_SIDE):
        raise UserError(
            f"expected an image of {JPEG_SIDE} x {JPEG_SIDE} px, got shape {tuple(image.shape)};"
            " resize and crop it first"
        )
    return thresholds.ratio(jpeg_bytes(image))


def _sorted_sizes(sizes: Iterable[int]) -> np.ndarray:
    values = np.asarray([*sizes])
    if not len(values):
        return np.zeros(0, dtype=np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu" or values.min() < 1:
        raise UserError("JPEG thresholds are fitted to sizes in bytes, expected positive integers")
    return np.sort(values)


def _cut(ordered: np.ndarray, below: float, ratio: int) -> int:
    """Return the size that `below` images do not exceed, rounded to a number of images.

    Raises:
        UserError: equal sizes at the cut, so that the number differs from the wanted one.
    """
    count, wanted = len(ordered), round(below)
    if wanted == 0:
        return int(ordered[0]) - 1
    cut = int(ordered[wanted - 1])
    options = [(int(np.searchsorted(ordered, size, side="right")), size) for size in (cut, cut - 1)]
    reached, size = min(options, key=lambda option: abs(option[0] - wanted))
    if abs(reached - wanted) > _TIE_TOLERANCE * count:
        ties = options[0][0] - options[1][0]
        raise UserError(
            f"JPEG thresholds cannot give the mix: {ties} of {count} images have {cut} bytes, at the upper"
            f" end of {ratio}x, so {reached} instead of {wanted} images are up to it; measure other or more"
            " images, or choose another mix"
        )
    return size
