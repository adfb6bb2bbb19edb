"""Photographs in and out: any ordinary image file becomes 8-bit sRGB as a person sees it.

`load_image` -> `resize_center_crop` -> `image_to_tensor` is the way in, `tensor_to_image` the way back;
`find_images` turns what a user typed (files, folders) into a list of files.
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

if TYPE_CHECKING:  # torch takes seconds to import, and scoring an image needs none of it
    import torch

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 178_956_970
"""Default limit on width x height: Pillow's own ceiling, 537 MB once decoded."""

# Named, so that no other plug-in (EPS runs Ghostscript) ever sees a user's file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_SRGB = ImageCms.createProfile("sRGB")
_WHITE = (255, 255, 255, 255)


def load_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image as 8-bit sRGB, mode "RGB", the way a viewer shows it.

    EXIF orientation is applied; an embedded ICC profile (CMYK, Display P3, ...) is converted to sRGB;
    grey and palette images become RGB; transparency is laid on white; 16-bit grey is scaled to 8 bits;
    of an animation the first frame is taken.

    Args:
        path: a JPEG, PNG or WebP file (BMP, GIF and TIFF work too).
        max_pixels: largest width x height accepted, checked against the header before anything is
            decoded. Pillow's own ceiling (2 x `PIL.Image.MAX_IMAGE_PIXELS`) holds besides.

    Raises:
        UserError: one line naming the file, when it is missing, a folder, empty, not an image,
            damaged, cut short, or larger than `max_pixels`.
    """
    path = Path(path)
    try:
        _require_content(path)
        return _read(path, max_pixels)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:  # of the file itself: Pillow's own complaints are UserErrors by now
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`load_image` of a file's bytes.

    Raises:
        UserError: they are no image, a damaged one, or one larger than `max_pixels`.
    """
    if not data:
        raise UserError("the file is empty")
    return _read(io.BytesIO(data), max_pixels)


def resize_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of `image`, scaled to size x size pixels.

    The same framing as scaling the short side to `size` and cropping the middle of the long one, in one
    antialiased Lanczos pass that never computes the pixels thrown away (so that a 1 x 100000 strip costs
    no more than any other image). Images smaller than `size` are enlarged.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]; 0 -> -1 and 255 -> 1."""
    return image_to_bytes(image).float().div_(127.5).sub_(1.0)


def image_to_bytes(image: Image.Image) -> torch.Tensor:
    """RGB image -> its (3, H, W) uint8 pixels, contiguous."""
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def tensor_to_image(x: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], any floating dtype -> RGB image; the inverse of `image_to_tensor`.

    Values outside [-1, 1] are clipped, the rest rounded to the nearest of 256 levels.

    Raises:
        ValueError: `x` is not (3, H, W), or holds NaN or infinity.
    """
    import torch

    if x.ndim != 3 or x.shape[0] != 3:
        raise ValueError(f"expected a (3, H, W) tensor, got {tuple(x.shape)}")
    levels = (x.detach().float().cpu() + 1.0) * 127.5
    if not torch.isfinite(levels).all():
        raise ValueError("the image holds NaN or infinite values")
    pixels_HWC = levels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels_HWC.contiguous().numpy())


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The image files behind `paths`: files as given, folders replaced by the images in them.

    Folders are searched with their subfolders, by file extension, in sorted order; hidden files and
    folders are left out. A file named twice is taken once. Files are not opened: one that is missing or
    broken is `load_image`'s to report, so that it does not keep the others from being read.

    Raises:
        UserError: nothing was given, or a folder holds no image.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            found[path] = None
            continue
        inside = sorted(_walk(path))
        if not inside:
            raise UserError(
                f"{path}: the folder holds no image; expected files ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        found.update(dict.fromkeys(inside))
    if not found:
        raise UserError("no image given; name at least one file or folder")
    return list(found)


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
        # Damage that does not cost the image, and sizes that max_pixels allows, are no news to the user.
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
            raise UserError("not an image that can be read; expected a JPEG, PNG or WebP file") from error
        except Exception as error:  # decoders raise anything at all on damaged bytes
            raise UserError(f"the image is damaged or cut short ({one_line(error)})") from error


def _require_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise UserError(f"{image.width} x {image.height} pixels is more than {_limit(max_pixels)}")


def _limit(pixels: int) -> str:
    return f"the limit of {pixels / 1e6:.3g} million; scale the image down first"


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF says nothing about which way is up; the pixels are fine
        return image


def _to_srgb(image: Image.Image) -> Image.Image:
    """Converts the colours of an image that carries an ICC profile; others are returned as they are."""
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
    except (ImageCms.PyCMSError, OSError):  # a damaged profile, or one of another colour space
        return image
    return image if converted is None else converted


def _flatten(image: Image.Image) -> Image.Image:
    """Any 8- or 16-bit mode -> "RGB", with transparent parts on white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_to_8_bit(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (modes I;16*, and I where the values fit) -> "L"; Pillow's own convert() only clips."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UserError("32-bit pixels; expected 8 or 16 bits a channel")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # round(v / 257)
    if "transparency" in image.info:  # one 16-bit grey level stands for "nothing here"
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
