"""Pictures with their descriptions -> an image index with scores and ratios."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL.Image import Image
from torchvision.transforms.functional import pil_to_tensor

from cat_fast.complexity.choose import Scorer, choose_ratios
from cat_fast.complexity.description import Description
from cat_fast.complexity.jpeg_size import JPEG_SIDE, jpeg_ratio
from cat_fast.complexity.ratio import RatioThresholds
from cat_fast.data.images.index import ImageRecord, read_index
from cat_fast.data.images.io import decode_image, load_image, resize_center_crop
from cat_fast.data.photographs import Photograph, photographs
from cat_fast.errors import UserError

PHOTOGRAPHS = "photographs"
RATIO_SIGNALS = ("index", "score", "jpeg")


def index_photographs(
    pictures: Sequence[Photograph],
    scorer: Scorer | None = None,
    thresholds: RatioThresholds | None = None,
) -> list[ImageRecord]:
    """Score described pictures and choose their ratios, in order."""
    descriptions = [Description(p.caption, p.has_text, p.has_faces) for p in pictures]
    results = choose_ratios(descriptions, scorer, thresholds)
    return [
        ImageRecord(
            key=picture.key,
            path=str(picture.path),
            caption=picture.caption,
            has_text=picture.has_text,
            has_faces=picture.has_faces,
            category=picture.category,
            score=result.score,
            ratio=result.ratio,
        )
        for picture, result in zip(pictures, results, strict=True)
    ]


def load_index(name: str) -> list[ImageRecord]:
    """The image index file `name`, or with the name `photographs` the training pictures that ship.

    Raises:
        UserError: no such file, or one that is no index.
    """
    return index_photographs(photographs("train")) if name == PHOTOGRAPHS else read_index(name)


def ratios_of(records: Sequence[ImageRecord], signal: str, thresholds: RatioThresholds) -> list[int]:
    """The ratio of each picture by one of RATIO_SIGNALS; `thresholds` are those of scores.

    By `jpeg` each picture is read, cut to its centre square at 512 px and compressed once.

    Raises:
        UserError: a picture has no such signal.
    """
    if signal == "score":
        return thresholds.ratios(record.score for record in records)
    if signal == "jpeg":
        with ThreadPoolExecutor() as pool:
            return list(pool.map(_ratio_by_jpeg, (record.path for record in records)))
    for record in records:
        if record.ratio is None:  # JSON may say so
            raise UserError(f"{record.key}: the index names no ratio; data.ratios_from=jpeg judges by size")
    return [record.ratio for record in records]


def ratio_of_file(data: bytes) -> int:
    """The ratio of an encoded picture by its size as a JPEG, as `ratios_of` judges with `jpeg`.

    Raises:
        UserError: the bytes are no whole picture.
    """
    return _ratio_by_pixels(decode_image(data))


def _ratio_by_jpeg(path: str) -> int:
    return _ratio_by_pixels(load_image(path))


def _ratio_by_pixels(picture: Image) -> int:
    return jpeg_ratio(pil_to_tensor(resize_center_crop(picture, JPEG_SIDE)))
