"""Fit of `data.jpeg_thresholds` to the images of a run and a mix of ratios."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from cat_fast.complexity.ratios.image_ratios import load_index, ratio_policy_for
from cat_fast.complexity.ratios.jpeg_thresholds import JpegThresholds
from cat_fast.complexity.ratios.mix import ratio_mix, require_mix
from cat_fast.complexity.ratios.policy import jpeg_image
from cat_fast.complexity.signals.jpeg_size import jpeg_bytes
from cat_fast.data.images.io import decode_image
from cat_fast.data.streams.formats.base import Entry, ShardSet, UnreadableShard
from cat_fast.data.streams.formats.image_files import RecordShards
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.plan import spread
from cat_fast.errors import UserError
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.tokenizer.image_source import open_shards

_SHARDS = 64


@dataclass(frozen=True, kw_only=True)
class JpegFit:
    """Fitted thresholds, with the mixes of ratios of the images that they were fitted to."""

    thresholds: JpegThresholds
    images: int
    mix: dict[int, float]
    """Mix that was asked for."""
    fitted: dict[int, float]
    """Mix under the fitted thresholds."""
    configured: dict[int, float]
    """Mix under the configured thresholds, `data.jpeg_thresholds`."""


def fit_jpeg_thresholds(
    config: TokenizerRun,
    mix: Mapping[int, float] | None,
    images: int,
    on_image: Callable[[], None] = lambda: None,
) -> JpegFit:
    """Fit thresholds to the JPEG sizes of at most `images` images, spread over the shards of a run.

    Args:
        mix: shares of the ratios; None takes those of the same images by their scores and `data.thresholds`.

    Raises:
        UserError: the images have no scores and no mix is given, or `JpegThresholds.fit` refuses.
    """
    if mix is not None:
        require_mix(mix)
    problems = ProblemLog()
    shards = _shards(config, problems)
    policy = ratio_policy_for("score", config.data.score_thresholds)
    sizes: list[int] = []
    ratios: list[int] = []
    with ThreadPoolExecutor() as pool:
        for entry, size in pool.map(_measure, _entries(shards, images, problems)):
            on_image()
            ratio = policy.ratio_from_labels(entry.labels)
            if isinstance(size, UserError):
                problems.report(entry.key, str(size))
            elif mix is not None or ratio is not None:
                sizes.append(size)
                ratios += [] if ratio is None else [ratio]
    if mix is None:
        if not ratios:
            raise UserError("the images have no scores to take the mix of ratios from; give it with --mix")
        mix = ratio_mix(ratios)
    thresholds = JpegThresholds.fit(sizes, mix)
    return JpegFit(
        thresholds=thresholds,
        images=len(sizes),
        mix=dict(mix),
        fitted=ratio_mix(map(thresholds.ratio, sizes)),
        configured=ratio_mix(map(config.data.size_thresholds.ratio, sizes)),
    )


def _shards(config: TokenizerRun, problems: ProblemLog) -> ShardSet:
    data = config.data
    return RecordShards(load_index(data.index)) if data.index_in_memory else open_shards(data, problems)


def _entries(shards: ShardSet, images: int, problems: ProblemLog) -> Iterator[Entry]:
    chosen = spread(len(shards.names), _SHARDS)
    left = images
    for number, index in enumerate(chosen):
        try:
            entries = shards.open(index).entries(0)
        except UnreadableShard as error:
            problems.report(f"shard {shards.names[index]}", str(error))
            continue
        for entry in islice(entries, -(-left // (len(chosen) - number))):
            left -= 1
            yield entry


def _measure(entry: Entry) -> tuple[Entry, int | UserError]:
    try:
        if entry.damage:
            raise UserError(entry.damage)
        return entry, jpeg_bytes(jpeg_image(decode_image(entry.read())))
    except (OSError, UserError) as error:
        return entry, UserError(str(error))
