"""Image input and output: image files of common formats are loaded as 8-bit sRGB.

`load_image` -> `resize_center_crop` -> `image_to_tensor` reads an image, `tensor_to_image` converts it back;
`find_images` expands files and folders given by the user into a list of files.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from cat_fast.errors import UserError, one_line

if TYPE_CHECKING:  # importing torch takes seconds, and scoring images does not need it
    import torch

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 178_956_970
"""Default limit on width x height: Pillow's limit, 537 MB when decoded."""

# An explicit list keeps user files away from other plug-ins (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_SRGB = ImageCms.createProfile("sRGB")
_WHITE = (255, 255, 255, 255)


def load_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load an image as 8-bit sRGB, mode "RGB", as an image viewer displays it.

    EXIF orientation is applied. Colours are converted from an embedded ICC profile (CMYK, Display P3, ...) to
    sRGB. Grey and palette images become RGB, transparency is composited on white, 16-bit grey is scaled to 8
    bits. Only the first frame of an animation is used.

    Args:
        path: a JPEG, PNG or WebP file (BMP, GIF and TIFF work too).
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


def resize_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the centre square of `image`, scaled to size x size pixels.

    The framing equals scaling the short side to `size` and centre-cropping the long one. A single antialiased
    Lanczos pass computes only the pixels that are kept, so a 1 x 100000 strip is not expensive. Images
    smaller than `size` are enlarged.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


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

    Folders are searched recursively by file extension, in sorted order; hidden files and folders are skipped.
    Duplicates are removed. Files are not opened: `load_image` reports those that are missing or damaged, so
    that the others can still be processed.

    Raises:
        UserError: `paths` is empty, or a folder contains no image.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            found[path] = None
            continue
        inside = sorted(_walk(path))
        if not inside:
            raise UserError(
                f"{path}: the folder contains no image; expected files ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )
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


def _walk(folder: Path) -> Iterable[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(parent, name)


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
            with Image.open(file, formats=_FORMATS) as image:
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
    """Scale 16-bit grey (modes I;16*, and I if the values fit) to "L"; Pillow's convert() would clip."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UserError("expected 8 or 16 bits per channel, got 32")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # round(v / 257)
    if "transparency" in image.info:  # one 16-bit grey level marks transparent pixels
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
