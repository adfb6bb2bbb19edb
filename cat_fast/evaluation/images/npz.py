"""Image arrays of ADM's evaluation: `arr_0`, (N, H, W, 3) uint8, in an .npz file, read one image at a time.

`numpy.load` decompresses the complete array: 39 GB for 50,000 images of 512 px.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from cat_fast.errors import UserError, first_line

IMAGES = "arr_0"
_MAX_HEADER = 10_000


def array_header(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype] | None:
    """Return shape and dtype of an array, None if the file does not contain it.

    Raises:
        UserError: the file is missing or is not a valid .npz file.
    """
    with _open(path) as archive:
        if f"{key}.npy" not in archive.namelist():
            return None
        with archive.open(f"{key}.npy") as file:
            shape, fortran, dtype = _read_header(path, file)
        if fortran and len(shape) > 1:
            raise UserError(f"{path}: {key} is in Fortran order; save it with numpy.ascontiguousarray")
        return shape, dtype


def keys(path: Path) -> list[str]:
    """Return the names of the arrays in a file."""
    with _open(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def image_shape(path: Path) -> tuple[int, int, int]:
    """Return (N, height, width) of the images in a file.

    Raises:
        UserError: `arr_0` is missing, has another dtype or layout, or is empty.
    """
    found = array_header(path, IMAGES)
    if found is None:
        raise UserError(
            f"{path}: expected images (N, H, W, 3) uint8 as {IMAGES}, got the arrays"
            f" {', '.join(keys(path)) or 'none'}"
        )
    shape, dtype = found
    if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        raise UserError(f"{path}: {IMAGES} has shape {shape}: channels come last, as in (N, H, W, 3)")
    if len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{path}: expected images (N, H, W, 3) as {IMAGES}, got shape {shape}")
    if dtype != np.uint8:
        raise UserError(
            f"{path}: expected uint8 images in [0, 255] as {IMAGES}, got {dtype}; the way to round them"
            " changes FID, so round them before, and say how"
        )
    if not shape[0]:
        raise UserError(f"{path}: {IMAGES} contains no images")
    return shape[0], shape[1], shape[2]


def read_images(path: Path, first: int = 0) -> Iterator[np.ndarray]:
    """Yield the images of a file from number `first`, (H, W, 3) uint8 each.

    Raises:
        UserError: the file is damaged or shorter than its header.
    """
    count, height, width = image_shape(path)
    size = height * width * 3
    try:
        with _open(path) as archive, archive.open(f"{IMAGES}.npy") as file:
            _read_header(path, file)
            file.seek(size * first, 1)
            for number in range(first, count):
                data = file.read(size)
                if len(data) < size:
                    raise UserError(f"{path}: {IMAGES} ends at image {number} of {count}")
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)})") from error


def load_array(path: Path, key: str) -> np.ndarray | None:
    """Return a small array of a file, None if the file does not contain it; pickled objects are refused."""
    if array_header(path, key) is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return file[key]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {key} cannot be read ({first_line(error)})") from error


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a valid .npz file ({first_line(error)})") from error


def _read_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    reader: Any = np.lib.format
    try:
        version = reader.read_magic(file)
        read = reader.read_array_header_1_0 if version == (1, 0) else reader.read_array_header_2_0
        shape, fortran, dtype = read(file, max_header_size=_MAX_HEADER)
    except (ValueError, SyntaxError, EOFError) as error:
        raise UserError(f"{path}: not a valid .npz file ({first_line(error)})") from error
    if dtype.hasobject:
        raise UserError(f"{path}: contains pickled objects; expected plain arrays")
    return shape, fortran, dtype
