"""Sets of images: a folder of image files, or an .npz file of ADM's layout."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from cat_fast.data.images.io import find_images, image_to_bytes, load_image, resize_center_crop
from cat_fast.data.input_samples import file_stamp, hash_name
from cat_fast.errors import UserError
from cat_fast.evaluation.images import npz

CROPS = {
    "center": "largest centre square, one antialiased bicubic pass (Pillow)",
    "adm": "ADM's center_crop_arr: halved by a box filter, bicubic, centre square",
}
"""Ways to crop and scale images to a square, by name. They change FID by a tenth of a point and more."""


class Crop(NamedTuple):
    """Scaling of images to a square of `size` pixels by one of `CROPS`."""

    size: int
    mode: str = "center"


class ImageOrError(NamedTuple):
    """An image (3, H, W) uint8, or the reason why there is none."""

    name: str
    pixels: Tensor | None
    error: str = ""


class ImageSet(Protocol):
    """Images in a fixed order."""

    path: Path
    count: int
    size: tuple[int, int]
    """Height and width of all images."""

    def read(self, first: int, last: int) -> Iterator[ImageOrError]:
        """Yield the images with numbers in [first, last)."""
        ...

    def pick(self, numbers: Sequence[int]) -> Iterator[ImageOrError]:
        """Yield the images with these numbers, in ascending order."""
        ...

    def record(self) -> dict[str, Any]:
        """Return the identity of the set for results, as JSON."""
        ...

    def fingerprint(self) -> str:
        """Return a hash that changes with the images, without reading them."""
        ...


class FolderImages:
    """Image files of a folder and its subfolders, sorted by path.

    Grey images become RGB, alpha is composited on white, 16 bits are scaled to 8.

    Args:
        crop: how each image becomes a square; None takes images as they are, which then have one size.

    Raises:
        UserError: the folder contains no readable image.
    """

    def __init__(self, path: Path, crop: Crop | None = None) -> None:
        self.path, self.crop = path, crop
        self.files = find_images([path])
        self.count = len(self.files)
        self.size = (crop.size, crop.size) if crop else self._first_size()

    def read(self, first: int, last: int) -> Iterator[ImageOrError]:
        yield from self.pick(range(first, min(last, self.count)))

    def pick(self, numbers: Sequence[int]) -> Iterator[ImageOrError]:
        for number in numbers:
            yield self._load(self.files[number])

    def record(self) -> dict[str, Any]:
        return {
            "kind": "folder",
            "path": str(self.path),
            "count": self.count,
            "height": self.size[0],
            "width": self.size[1],
            "crop": CROPS[self.crop.mode] if self.crop else "none",
            "formats": dict(Counter(file.suffix.lower().removeprefix(".") for file in self.files)),
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        stamps = [(str(file.relative_to(self.path)), *file_stamp(str(file))) for file in self.files]
        return hash_name(repr((self.crop, stamps)))

    def _first_size(self) -> tuple[int, int]:
        for file in self.files:
            try:
                image = load_image(file)
            except UserError:
                continue
            return image.height, image.width
        raise UserError(f"{self.path}: none of its {self.count} images can be read")

    def _load(self, file: Path) -> ImageOrError:
        name = str(file.relative_to(self.path))
        try:
            image = load_image(file)
        except UserError as error:
            return ImageOrError(name, None, str(error))
        if self.crop:
            image = square(image, self.crop)
        elif (image.height, image.width) != self.size:
            height, width = self.size
            return ImageOrError(
                name,
                None,
                f"{image.width} x {image.height} px, but the first image has {width} x {height}; pass --crop"
                " SIZE to scale all to one size",
            )
        return ImageOrError(name, image_to_bytes(image))


class NpzImages:
    """Images of an .npz file, `arr_0` (N, H, W, 3) uint8.

    Raises:
        UserError: another layout or dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count, *size = npz.image_shape(path)
        self.size = (size[0], size[1])

    def read(self, first: int, last: int) -> Iterator[ImageOrError]:
        yield from self.pick(range(first, min(last, self.count)))

    def pick(self, numbers: Sequence[int]) -> Iterator[ImageOrError]:
        if not numbers:
            return
        wanted, last = set(numbers), numbers[-1]
        for number, pixels in enumerate(npz.read_images(self.path, numbers[0]), start=numbers[0]):
            if number in wanted:
                yield ImageOrError(f"image {number}", torch.from_numpy(pixels.copy()).permute(2, 0, 1))
            if number == last:
                return

    def record(self) -> dict[str, Any]:
        return {
            "kind": "npz",
            "path": str(self.path),
            "count": self.count,
            "height": self.size[0],
            "width": self.size[1],
            "crop": "unknown",
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        return hash_name(repr((self.count, self.size, file_stamp(str(self.path)))))


def square(image: Image.Image, crop: Crop) -> Image.Image:
    """Return the centre square of an RGB image, scaled to `crop.size`."""
    if crop.mode == "center":
        return resize_center_crop(image, crop.size)
    while min(image.size) >= 2 * crop.size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = crop.size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - crop.size) // 2, (image.height - crop.size) // 2
    return image.crop((left, top, left + crop.size, top + crop.size))


def open_images(path: Path, crop: Crop | None = None) -> ImageSet:
    """Open a folder of images or an .npz file.

    Raises:
        UserError: neither, or without usable images.
    """
    if path.is_dir():
        return FolderImages(path, crop)
    if path.suffix == ".npz":
        if crop:
            raise UserError(
                f"--crop {crop.size}: applies to folders; the images of {path} are cropped already"
            )
        return NpzImages(path)
    expected = "expected a folder of images or an .npz file with arr_0"
    raise UserError(
        f"{path}: no such file or folder; {expected}" if not path.exists() else f"{path}: {expected}"
    )
