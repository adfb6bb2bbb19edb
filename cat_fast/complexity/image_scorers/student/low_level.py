"""Low-level features of an image: sizes as a JPEG at several resolutions, colours and edges."""

import io

import numpy as np
from PIL import Image

_SIDES = (32, 64, 128, 256)
_QUALITIES = (30, 75)
_STATISTICS_SIDE = 128
_EDGE = 0.1
"""Difference of neighbouring grey values, in [0, 1], that counts as an edge."""
_BORDER = 16
_LEVELS = 4
SIDE = _SIDES[-1]
"""Side of the centre square that the features are of."""
_SIZES = len(_SIDES) * (len(_QUALITIES) + 1)
COUNT = _SIZES + 15
"""Number of features."""
GROUPS = {
    "size as a JPEG": [*range(_SIZES)],
    "brightness and contrast": [_SIZES, _SIZES + 1, _SIZES + 4],
    "colours": [_SIZES + 2, _SIZES + 3, _SIZES + 9],
    "edges": [*range(_SIZES + 5, _SIZES + 9), *range(_SIZES + 10, COUNT)],
}
"""Indices of the features per property of the image."""


def low_level_features(square: Image.Image) -> np.ndarray:
    """Return the logarithms of all features of a square RGB image of `SIDE` pixels, float32 (COUNT,)."""
    found: list[float] = []
    for side in _SIDES:
        small = square.resize((side, side), Image.Resampling.BICUBIC) if side < SIDE else square
        found += [_jpeg_bytes(small, quality) for quality in _QUALITIES]
        found.append(_jpeg_bytes(small.convert("L"), 75))
    small = square.resize((_STATISTICS_SIDE, _STATISTICS_SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(small, dtype=np.float32) / 255
    hsv = np.asarray(small.convert("HSV"), dtype=np.float32) / 255
    found += [pixels.mean(), pixels.std(), hsv[..., 1].mean(), hsv[..., 1].std(), hsv[..., 2].std()]
    grey = pixels.mean(2)
    across, down = np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=0))
    found += [across.mean(), down.mean(), (across > _EDGE).mean(), (down > _EDGE).mean()]
    found.append(_colour_entropy(pixels))
    energy = np.zeros_like(grey)
    energy[:, 1:] += across
    energy[1:] += down
    quarter = _STATISTICS_SIDE // 4
    parts = (
        energy[quarter:-quarter, quarter:-quarter],
        *(energy[:_BORDER], energy[-_BORDER:], energy[:, :_BORDER], energy[:, -_BORDER:]),
    )
    found += [part.mean() for part in parts]
    return np.log(np.maximum(np.array(found, dtype=np.float32), 1e-6))


def _jpeg_bytes(image: Image.Image, quality: int) -> float:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return float(file.tell())


def _colour_entropy(pixels: np.ndarray) -> float:
    """Return the entropy of the colours, of `_LEVELS` levels per channel, in nats."""
    levels = (pixels.reshape(-1, 3) * (_LEVELS - 1e-3)).astype(np.int64)
    counts = np.bincount(levels @ np.array([_LEVELS**2, _LEVELS, 1]), minlength=_LEVELS**3)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
