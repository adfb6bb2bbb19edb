"""Rows of scores: samples in calls of a scorer, with their scores or the reasons why they have none."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from cat_fast.complexity.description import Description
from cat_fast.complexity.image_score import ImageScorer
from cat_fast.complexity.image_scorers.loading import PIXEL_SCORERS
from cat_fast.complexity.score import Score, Scorer, ScoringFailure
from cat_fast.complexity.scorers.loading import LANGUAGE_MODELS
from cat_fast.complexity.scoring_run.keys import KeysSeen
from cat_fast.complexity.scoring_run.outputs import ScoreSettings
from cat_fast.complexity.scoring_run.samples import GivenImage, Sample
from cat_fast.data.images.io import decode_image
from cat_fast.data.text_files import valid_text
from cat_fast.errors import UserError, one_line

_DECODERS = 4
REPEATED = "its key repeats that of an earlier sample"

Row = dict[str, Any]
"""A row of `score_file`, without ratio and tokens."""
OnProgress = Callable[[int, int], None]
"""Called after each call of the scorer, with the numbers of samples scored now and kept from earlier."""


@dataclass(frozen=True)
class CallSizes:
    """Numbers of samples that are scored and written together."""

    part: int = 8192
    """Samples per part: a killed run loses the scores of at most one."""
    call: int = 1024
    """Samples per call of the scorer, after each of which progress is reported."""


def sizes_for(scorer: str | None, *, escalated: bool = False, captioner: str | None = None) -> CallSizes:
    """Return the sizes for the scorer and captioner of a run: at most minutes of work per part."""
    if captioner == "detectors":
        return CallSizes(128, 16)
    if captioner is not None or escalated or scorer in LANGUAGE_MODELS:
        return CallSizes(128, 128)
    if scorer in PIXEL_SCORERS:
        return CallSizes(1024, 64)
    return CallSizes(2048, 128) if scorer == "accurate" else CallSizes(8192, 1024)


@dataclass
class ScoringResult:
    """Counts of a run."""

    settings: ScoreSettings
    noun: str = "caption"
    """Kind of sample, "caption" or "image"."""
    seconds: float = 0.0
    rows: int = 0
    scored: int = 0
    """Samples scored by this run; the others were scored before, or cannot be."""
    failed: int = 0
    """Samples without a score."""
    problems: list[str] = field(default_factory=list)
    """One line per unusable input and half-written file, with its name."""


@dataclass(frozen=True)
class _Outcome:
    """Result of scoring a sample."""

    result: Score | ScoringFailure
    description: Description | None = None
    seconds: float | None = None
    source: str | None = None


class RowScorer:
    """Scorer of samples into rows.

    Args:
        scorer: scorer of captions, or of images; the samples are of the same kind.
        settings: settings of the scorer, of which each row has the names.
        call: samples per call of the scorer.
    """

    def __init__(
        self,
        scorer: Scorer | ImageScorer,
        settings: ScoreSettings,
        call: int = CallSizes.call,
        on_progress: OnProgress = lambda scored, kept: None,
    ) -> None:
        self.scorer, self.settings, self.call, self.on_progress = scorer, settings, call, on_progress
        self.scored = 0
        """Number of samples scored so far."""

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """Return the rows of samples, in order; those with an error are not scored."""
        scorable = [sample for sample in samples if sample.error is None]
        outcomes: list[_Outcome] = []
        for start in range(0, len(scorable), self.call):
            call = scorable[start : start + self.call]
            before = time.perf_counter()
            results = self._score_call(call)
            seconds = (time.perf_counter() - before) / len(call)
            outcomes += [replace(result, seconds=seconds) for result in results]
            self.on_progress(len(call), 0)
        self.on_progress(0, len(samples) - len(scorable))
        self.scored += sum(isinstance(outcome.result, Score) for outcome in outcomes)
        outcome = iter(outcomes)
        return [
            self._row(sample, _failed(sample) if sample.error is not None else next(outcome))
            for sample in samples
        ]

    def _score_call(self, samples: Sequence[Sample]) -> list[_Outcome]:
        if isinstance(self.scorer, ImageScorer):
            return _score_images(self.scorer, samples)
        descriptions = [sample.description for sample in samples if sample.description]
        results = self.scorer.score_many(descriptions)
        return [_Outcome(result, d) for d, result in zip(descriptions, results, strict=True)]

    def _row(self, sample: Sample, outcome: _Outcome) -> Row:
        description, result = outcome.description, outcome.result
        row: Row = {
            "key": sample.key,
            "caption": description and description.caption,
            "has_text": description and description.has_text,
            "has_faces": description and description.has_faces,
            "score": None,
            "expected": None,
            "confidence": None,
            "scorer": f"{self.settings.scorer} {self.settings.version}",
            "prompt_hash": self.settings.prompt_hash,
            "reasons": None,
            "seconds": outcome.seconds,
            "error": None,
            "source": outcome.source,
        }
        if isinstance(result, ScoringFailure):
            return row | {"error": valid_text(result.error) or "the scorer gave no reason"}
        return row | {
            "score": result.score,
            "expected": result.expected,
            "confidence": result.confidence,
            "reasons": valid_text(result.reasons) or None,
        }


def _failed(sample: Sample) -> _Outcome:
    return _Outcome(ScoringFailure(sample.error or ""), sample.description)


def _score_images(scorer: ImageScorer, samples: Sequence[Sample]) -> list[_Outcome]:
    """Read, decode and score images; those that cannot be read have a failure."""
    given = [sample.image for sample in samples if sample.image]
    with ThreadPoolExecutor(_DECODERS) as decoders:
        read = [*decoders.map(lambda image: _read_image(scorer, image), given)]
    usable = [i for i, image in enumerate(read) if not isinstance(image, ScoringFailure)]
    pixels = [image[0] for image in read if not isinstance(image, ScoringFailure)]
    results = scorer.score_images(pixels, [given[i].given for i in usable]) if pixels else []
    found = dict(zip(usable, results, strict=True))
    outcomes: list[_Outcome] = []
    for i, image in enumerate(read):
        if isinstance(image, ScoringFailure):
            outcomes.append(_Outcome(image))
            continue
        result, source = found[i], image[1]
        if isinstance(result, ScoringFailure):
            outcomes.append(_Outcome(result, source=source))
        else:
            outcomes.append(_Outcome(result.score, result.description, source=source))
    return outcomes


def _read_image(scorer: ImageScorer, image: GivenImage) -> tuple[Image.Image, str] | ScoringFailure:
    """Return the prepared image and its identity."""
    try:
        content = image.read()
        return scorer.prepare(decode_image(content)), image.identity(content)
    except OSError as error:
        return ScoringFailure(f"cannot be read ({error.strerror or error})")
    except UserError as error:
        return ScoringFailure(one_line(error))


def mark_repeated(samples: Iterable[Sample], seen: KeysSeen) -> Iterator[Sample]:
    """Yield samples, with an error if their key repeats one of `seen` or of these samples."""
    for sample in samples:
        repeated = seen.add(sample.key) and sample.error is None
        yield replace(sample, error=REPEATED) if repeated else sample
