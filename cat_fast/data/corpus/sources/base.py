"""Interface of a source, and what its images have in common."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageStat

from cat_fast.data.photographs import debian_files

SHORT_SIDE = 512
"""Larger images are reduced to this short side, pixels."""
_PLAIN = 6.0
"""Standard deviation of the levels, 0 to 255, below which an image shows nothing."""


@dataclass(frozen=True)
class CorpusImage:
    """An image of a source, before it is written."""

    name: str
    """File name without ending, unique within the source."""
    image: Image.Image
    caption: str
    group: str
    """Images of one group are variants of each other and share a split."""
    category: str = ""
    has_text: bool | None = None
    has_faces: bool | None = None
    split: str = ""
    """"train" or "held_out"; if empty, the hash of the group decides."""


Problem = Callable[[str, str], None]
"""Receives name and reason of each file that is left out."""


@dataclass(frozen=True)
class Source:
    """A kind of images, from one or more packages."""

    name: str
    packages: tuple[str, ...]
    """Names of the packages; the source is built from those that could be obtained, in this order."""
    patterns: tuple[str, ...]
    """Paths to unpack, for `unpack`."""
    images: Callable[[Path, Problem], Iterator[CorpusImage]]
    """Yields the images from the folder that the packages were unpacked to, in a fixed order."""
    licence: str
    shown: bool
    """True if the licence allows images and close variants of them in this project's files."""
    lossless: bool
    """Write PNG rather than JPEG files."""
    disk: int
    """Disk space of the unpacked packages and the written images together, bytes, rounded up."""
    version: int = 1
    """Increased when the images or captions change."""
    repeats: int = 1
    """Number of lines per image in train.jsonl, so that a few photographs count as much as many drawings."""


def is_shipped(path: Path, folder: Path) -> bool:
    """Return True for the file of a photograph of this project, which has its own split.

    Args:
        folder: the folder that contains a subfolder per unpacked package.
    """
    return "/".join(path.relative_to(folder).parts[1:]) in debian_files()


def is_plain(image: Image.Image) -> bool:
    """Return True if an image is almost one colour, such as a transparent wallpaper on white."""
    return max(ImageStat.Stat(image.resize((64, 64), Image.Resampling.BOX)).stddev) < _PLAIN


def reduced(image: Image.Image, short_side: int = SHORT_SIDE) -> Image.Image:
    """Return an image scaled to a short side in pixels if it is larger."""
    scale = short_side / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def squared(image: Image.Image) -> Image.Image:
    """Return an image padded with white to a centred square."""
    side = max(image.size)
    padded = Image.new("RGB", (side, side), "white")
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def words_of(stem: str) -> list[str]:
    """Return the words of a file name without numbers and single letters, in lower case."""
    parts = "".join(c if c.isalpha() else " " for c in stem).lower().split()
    return [part for part in parts if len(part) > 1]
