"""Reconstruction errors and signals of images, one at a time, in a file from which a run resumes."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import torch

from cat_fast.complexity import jpeg_bytes
from cat_fast.complexity.signals.jpeg_size import JPEG_SIDE
from cat_fast.complexity.signals.reconstruction_error import Distance, Reconstruct, reconstruction_errors
from cat_fast.data.image_stamps import image_stamps
from cat_fast.data.images.io import decode_image, image_to_bytes, image_to_tensor, resize_center_crop
from cat_fast.data.row_file import RowFile
from cat_fast.data.streams.formats.base import ShardSet, UnreadableShard
from cat_fast.data.text_files import escape_text
from cat_fast.errors import UserError, one_line


class Measurement(TypedDict):
    """Measurements of an image; all None but `error` if it cannot be read."""

    key: str
    stamp: list[int | str | None]
    """Stamp of the image's file, or of its archive."""
    mse: dict[str, float] | None
    """Mean squared error per ratio, of pixels in [0, 1]."""
    lpips: dict[str, float] | None
    """Perceptual distance per ratio."""
    signal_mse: float | None
    """Mean squared error of the model of the signals."""
    signal_lpips: float | None
    jpeg_bytes: int | None
    error: str | None


class Models(NamedTuple):
    """Models of the study."""

    at: Mapping[int, Reconstruct]
    """Reconstruction per ratio, which decides f*."""
    signal: Reconstruct
    """Reconstruction whose errors are metrics of complexity; the paper's is sd-vae-ft-mse."""
    distance: Distance


def measure_image(content: bytes, models: Models, size: int, device: torch.device) -> dict[str, Any]:
    """Return the measurements of an encoded image, without its key.

    Args:
        size: side in pixels of the centre square that is reconstructed; the JPEG size is that of 512 px.

    Raises:
        UserError: it is not an image, or is damaged.
    """
    image = decode_image(content)
    x = image_to_tensor(resize_center_crop(image, size))[None].to(device)
    at = {ratio: reconstruction_errors(x, model, models.distance) for ratio, model in models.at.items()}
    same = next((at[ratio] for ratio, model in models.at.items() if model is models.signal), None)
    signal = same or reconstruction_errors(x, models.signal, models.distance)
    return {
        "mse": {str(ratio): errors.mse.item() for ratio, errors in at.items()},
        "lpips": {str(ratio): errors.distance.item() for ratio, errors in at.items()},
        "signal_mse": signal.mse.item(),
        "signal_lpips": signal.distance.item(),
        "jpeg_bytes": jpeg_bytes(image_to_bytes(resize_center_crop(image, JPEG_SIDE))),
        "error": None,
    }


def measure_all(
    images: ShardSet,
    path: Path,
    measure: Callable[[bytes], dict[str, Any]],
    limit: int | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Measure all images; return the measurements in order.

    Measurements are appended to `path`, one JSON line per image. Images that it contains already are not
    measured again, except those that could not be read, or whose file has changed.

    Args:
        limit: number of images after which to stop; None for all.
        on_done: called after each image.
    """
    rows = RowFile(path)
    known = {row["key"]: row for row in rows.read() if row["error"] is None}
    found: list[Measurement] = []
    for key, stamp, read in image_readers(images):
        if limit is not None and len(found) == limit:
            break
        row = known.get(key)
        if row is None or row.get("stamp") != stamp:
            row = {"key": key, "stamp": stamp} | _measured(read, measure)
            rows.append(row)
        found.append(cast(Measurement, row))
        on_done()
    return found


def _measured(read: Callable[[], bytes] | str, measure: Callable[[bytes], dict[str, Any]]) -> dict[str, Any]:
    try:
        if isinstance(read, str):
            raise UserError(read)
        return measure(read())
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
    except UserError as error:
        why = one_line(error)
    return dict.fromkeys(("mse", "lpips", "signal_mse", "signal_lpips", "jpeg_bytes")) | {"error": why}


def image_readers(
    images: ShardSet,
) -> Iterator[tuple[str, list[int | str | None], Callable[[], bytes] | str]]:
    """Yield key, stamp of its file or archive, and reader of each image, or the reason why it is unusable."""
    for index, name in enumerate(images.names):
        try:
            stamp_of, shard = image_stamps(images, index), images.open(index)
        except UnreadableShard as error:
            yield name, [None, None], f"cannot be opened ({one_line(error)})"
            continue
        for entry in shard.entries(0):
            yield escape_text(entry.key), [*stamp_of(entry)], entry.damage or entry.read
