"""Scores and ratios of the images of an index."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from cat_fast.complexity.description import Description
from cat_fast.complexity.ratios.choose import choose_ratios
from cat_fast.complexity.ratios.jpeg_thresholds import JPEG_THRESHOLDS, JpegThresholds
from cat_fast.complexity.ratios.origin import scored_by
from cat_fast.complexity.ratios.policy import Label, RatioPolicy, ratio_of_image
from cat_fast.complexity.ratios.thresholds import RatioThresholds, default_thresholds
from cat_fast.complexity.score import Scorer, require_scores
from cat_fast.complexity.scorers.loading import bulk_scorer, default_scorer
from cat_fast.data.images.index import ImageRecord, read_index
from cat_fast.data.images.io import load_image
from cat_fast.data.photographs import Photograph, photographs
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.errors import UserError

PHOTOGRAPHS = "photographs"
RATIO_SIGNALS: dict[str, tuple[Label, ...]] = {"index": ("ratio",), "score": ("score",), "jpeg": ()}
"""Values of `data.ratios_from`, and the labels that each one uses."""


def index_photographs(
    images: Sequence[Photograph],
    scorer: Scorer | None = None,
    thresholds: RatioThresholds | None = None,
) -> list[ImageRecord]:
    """Return the index records of photographs, in order, with their scores and ratios."""
    descriptions = [_description(image) for image in images]
    scorer, thresholds = scorer or default_scorer(), thresholds or default_thresholds()
    results = choose_ratios(descriptions, scorer, thresholds)
    origin = scored_by(scorer, thresholds)
    return [
        ImageRecord(
            key=image.key,
            path=str(image.path),
            caption=image.caption,
            has_text=image.has_text,
            has_faces=image.has_faces,
            category=image.category,
            score=result.score,
            expected=result.expected,
            ratio=result.ratio,
            scored_by=origin,
        )
        for image, result in zip(images, results, strict=True)
    ]


def score_records(
    records: Sequence[ImageRecord],
    scorer: Scorer | None = None,
    thresholds: RatioThresholds | None = None,
) -> list[ImageRecord]:
    """Set missing scores and ratios, in order.

    A record without score and ratio is scored by its caption, if it has one; one without ratio gets that of
    its score. A ratio that is set is kept. The default scorer is `bulk_scorer()`.
    """
    scorer, thresholds = scorer or bulk_scorer(), thresholds or default_thresholds()
    captioned = [n for n, r in enumerate(records) if r.score is None and r.ratio is None and r.caption]
    descriptions = [_description(records[n]) for n in captioned]
    scores = require_scores(scorer, descriptions) if descriptions else []
    by_caption = dict(zip(captioned, scores, strict=True))
    own_origin = scored_by(scorer, thresholds)
    complete = []
    for number, record in enumerate(records):
        if scored := by_caption.get(number):
            record = replace(record, score=scored.score, expected=scored.expected, scored_by=own_origin)
        if record.ratio is None and record.score is not None:
            record = replace(record, ratio=thresholds.ratio_of(record))
        complete.append(record)
    return complete


def load_index(name: str) -> list[ImageRecord]:
    """Return the records of an index file, or for `photographs` the packaged training images.

    Records without score and ratio are scored by their captions.

    Raises:
        UserError: the file cannot be read, or is not an index.
    """
    if name == PHOTOGRAPHS:
        return index_photographs(photographs("train"), bulk_scorer())
    return score_records(read_index(name, ProblemLog().report))


def ratio_policy_for(signal: str, thresholds: RatioThresholds) -> RatioPolicy:
    """Return the policy for a key of RATIO_SIGNALS, with `thresholds` for scores."""
    return RatioPolicy(RATIO_SIGNALS[signal], thresholds, bulk_scorer())


def ratios_by_jpeg(
    records: Sequence[ImageRecord], thresholds: JpegThresholds = JPEG_THRESHOLDS
) -> list[int | None]:
    """Return each image's ratio by its JPEG size, None for images that cannot be read."""

    def ratio_of(record: ImageRecord) -> int | None:
        try:
            return ratio_of_image(load_image(record.path), thresholds)
        except UserError:
            return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(ratio_of, records))


def _description(image: Photograph | ImageRecord) -> Description:
    return Description(image.caption, image.has_text, image.has_faces)
