"""Image input and output: image files of common formats are loaded as 8-bit sRGB.

`load_image` -> `resize_center_crop` -> `image_to_tensor` reads an image, `tensor_to_image` converts it back;
`find_images` expands files and folders given by the user into a list of files.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from cat_fast.data.images.size import Size, height_and_width
from cat_fast.errors import UserError, one_line

if TYPE_CHECKING:  # importing torch takes seconds, and scoring images does not need it
    import torch

_AVIF = features.check("avif")
"""Not all builds of Pillow read AVIF."""
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
) | ({".avif"} if _AVIF else set())
OTHER_IMAGE_SUFFIXES = (
    frozenset({".avif", ".heic", ".heif", ".hif", ".jxl", ".jxr", ".jp2", ".j2k", ".jpx", ".psd", ".svg"})
    | frozenset({".eps", ".ico", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".dds", ".qoi"})
    | frozenset({".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"})
) - IMAGE_SUFFIXES
"""Extensions of images that cannot be read."""
MAX_PIXELS = 178_956_970
"""Default limit on width x height: Pillow's limit, 537 MB when decoded."""

# An explicit list keeps user files away from other plug-ins (EPS runs Ghostscript).
READABLE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *(["AVIF"] if _AVIF else []))
"""Pillow's names of the formats that are read."""
# Pillow allows 1 MB per compressed text or colour profile of a PNG: too little for editing histories, prompts
# and printer profiles. Its limit of 64 MB for all of them still applies.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
_LOG = logging.getLogger("cat_fast.data")
_SRGB = ImageCms.createProfile("sRGB")
_WHITE = (255, 255, 255, 255)


def load_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load an image as 8-bit sRGB, mode "RGB", as an image viewer displays it.

    EXIF orientation is applied. Colours are converted from an embedded ICC profile (CMYK, Display P3, ...) to
    sRGB. Grey and palette images become RGB, transparency is composited on white, 16-bit grey is scaled to 8
    bits. Only the first frame of an animation is used.

    Args:
        path: a JPEG, PNG or WebP file (BMP, GIF and TIFF work too, and AVIF if Pillow reads it).
        max_pixels: maximum width x height, checked in the header before decoding. Pillow's own limit
            (2 x `PIL.Image.MAX_IMAGE_PIXELS`) also applies.

    Raises:
        UserError: one line with the file name: it is missing, a folder, empty, not an image, damaged,
            truncated, or larger than `max_pixels`.
    """
    path = Path(path)
    try:
        _require_content(path)
        return _read(path, max_pixels)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:  # from the file system: Pillow's errors have become UserErrors
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load an image like `load_image`, from the content of a file.

    Raises:
        UserError: it is not an image, damaged, or larger than `max_pixels`.
    """
    if not data:
        raise UserError("the file is empty")
    return _read(io.BytesIO(data), max_pixels)


def resize_center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Return the largest centre crop of `image` with the aspect ratio of `size`, scaled to `size`.

    For a square, the framing equals scaling the short side to `size` and centre-cropping the long one. A
    single antialiased bicubic pass computes only the pixels that are kept, so a 1 x 100000 strip is not
    expensive. Smaller images are enlarged.
    """
    height, width = height_and_width(size)
    short = min(height, width)
    side = min(image.height * short / height, image.width * short / width)
    # Rounding must not move the box out of the image.
    crop_height = min(float(image.height), side * height / short)
    crop_width = min(float(image.width), side * width / short)
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    right, bottom = (image.width + crop_width) / 2, (image.height + crop_height) / 2
    return image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image to a (3, H, W) float32 tensor in [-1, 1]; 0 -> -1 and 255 -> 1."""
    return image_to_bytes(image).float().div_(127.5).sub_(1.0)


def image_to_bytes(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image to a contiguous (3, H, W) uint8 tensor."""
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def tensor_to_image(x: torch.Tensor) -> Image.Image:
    """Convert a (3, H, W) tensor in [-1, 1] to an RGB image: the inverse of `image_to_tensor`.

    Any floating dtype is accepted. Values are clipped to [-1, 1] and rounded to the nearest of 256 levels.

    Raises:
        ValueError: `x` is not (3, H, W), or contains NaN or infinity.
    """
    import torch

    if x.ndim != 3 or x.shape[0] != 3:
        raise ValueError(f"expected a (3, H, W) tensor, got {tuple(x.shape)}")
    levels = (x.detach().float().cpu() + 1.0) * 127.5
    if not torch.isfinite(levels).all():
        raise ValueError("the image contains NaN or infinite values")
    pixels_HWC = levels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels_HWC.contiguous().numpy())


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the image files in `paths`: files as given, folders replaced by the images in them.

    Folders are searched recursively by file extension, in sorted order, also through symbolic links; hidden
    files and folders are skipped, and images of other formats too, with a warning that counts them.
    Duplicates are removed. Files are not opened: `load_image` reports those that are missing or damaged, so
    that the others can still be processed.

    Raises:
        UserError: `paths` is empty, or a folder contains no image or cannot be read.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            found[path] = None
            continue
        files = list(walk_files(path))
        inside = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)
        skipped = Counter(
            file.suffix.lower() for file in files if file.suffix.lower() in OTHER_IMAGE_SUFFIXES
        )
        others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
        if not inside:
            raise UserError(
                f"{path}: the folder contains no image; expected files ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}" + (f", got {others}" if others else "")
            )
        if others:
            _LOG.warning("data: %s: images are skipped: %s; convert them to JPEG or PNG", path, others)
        found.update(dict.fromkeys(inside))
    if not found:
        raise UserError("no image given; give at least one file or folder")
    return list(found)


def distinct_files(paths: Iterable[Path]) -> list[Path]:
    """Return paths without repeated files, which may be spelled differently, absolute or symbolic links."""
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def walk_files(folder: Path, parents: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, in no order, except hidden ones.

    Symbolic links are followed, but not into a loop: `parents` identifies the folders around this one.

    Raises:
        UserError: a folder cannot be read.
    """
    try:
        status = folder.stat()
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from error
    identity = status.st_dev, status.st_ino
    if identity in parents:
        _LOG.warning("data: %s is skipped: it is a symbolic link to a folder around it", folder)
        return
    for entry in entries:
        path = Path(entry)
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and path.is_dir()):
            yield from walk_files(path, (*parents, identity))
        elif entry.is_symlink() and not path.exists() and path.suffix.lower() not in IMAGE_SUFFIXES:
            _LOG.warning("data: %s is skipped: its target is missing", path)
        else:
            yield path


def _require_content(path: Path) -> None:
    if path.is_dir():
        raise UserError("is a folder; expected an image file")
    if not path.exists():
        raise UserError("no such file")
    if not path.is_file():
        raise UserError("not a regular file; expected an image file")
    with path.open("rb") as file:
        if not file.read(1):
            raise UserError("the file is empty")


def _read(file: Path | io.BytesIO, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        # Ignore warnings about recoverable damage, and about sizes that max_pixels allows.
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=READABLE_FORMATS) as image:
                _require_size(image, max_pixels)
                image.load()
                return _flatten(_to_srgb(_apply_orientation(image)))
        except UserError:
            raise
        except Image.DecompressionBombError as error:
            ceiling = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise UserError(f"more pixels than {_limit(ceiling)}") from error
        except UnidentifiedImageError as error:
            raise UserError("not an image in a known format; expected a JPEG, PNG or WebP file") from error
        except Exception as error:  # decoders raise many types on damaged data
            raise UserError(f"the image is damaged or truncated ({one_line(error)})") from error


def _require_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise UserError(f"{image.width} x {image.height} pixels is more than {_limit(max_pixels)}")


def _limit(pixels: int) -> str:
    return f"the limit of {pixels / 1e6:.3g} million; scale the image down first"


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # ignore unreadable EXIF; the pixels are intact
        return image


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colours of an image with an ICC profile to sRGB; return other images unchanged."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    out_mode = "RGBA" if image.mode == "RGBA" else "RGB"
    if image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        return image
    try:
        converted = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), _SRGB, outputMode=out_mode
        )
    except (ImageCms.PyCMSError, OSError):  # a damaged profile, or one for another colour space
        return image
    return image if converted is None else converted


def _flatten(image: Image.Image) -> Image.Image:
    """Convert any 8- or 16-bit mode to "RGB", compositing transparent parts on white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_to_8_bit(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey (modes I;16*) to "L"; Pillow's convert() would clip."""
    if image.mode in ("I", "F"):  # their values have no common scale
        raise UserError("expected 8 or 16 bits per channel, got 32")
    values = np.asarray(image)
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # round(v / 257)
    if "transparency" in image.info:  # one 16-bit grey level marks transparent pixels
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
