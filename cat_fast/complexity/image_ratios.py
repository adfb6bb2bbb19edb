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


def ratios_by_jpeg(records: Sequence[ImageRecord]) -> list[int | None]:
    """Return the ratio of each image as `ratio_of_file` does, None for those that cannot be read."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_ratio_by_jpeg, (record.path for record in records)))


def ratio_of_file(data: bytes) -> int:
    """Return an encoded image's ratio by its size as a JPEG: the centre square at 512 px, compressed once.

    Raises:
        UserError: the bytes are no whole picture.
    """
    return _ratio_by_pixels(decode_image(data))


def _ratio_by_jpeg(path: str) -> int | None:
    try:
        return _ratio_by_pixels(load_image(path))
    except UserError:
        return None


def _ratio_by_pixels(picture: Image) -> int:
    return jpeg_ratio(pil_to_tensor(resize_center_crop(picture, JPEG_SIDE)))
