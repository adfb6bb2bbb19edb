"""Images of an evaluation: their shards, labels and scores."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cat_fast.complexity.ratios.image_ratios import PHOTOGRAPHS, index_photographs
from cat_fast.data.image_stamps import Stamp, image_stamps
from cat_fast.data.images.io import decode_image
from cat_fast.data.input_samples import hash_name
from cat_fast.data.photographs import photographs
from cat_fast.data.streams.formats.base import Entry, ShardSet, UnreadableShard
from cat_fast.data.streams.formats.image_files import RecordShards
from cat_fast.data.text_files import parse_object, text_lines
from cat_fast.errors import UserError
from cat_fast.evaluation.images.feature_files import Skipped
from cat_fast.evaluation.provenance import split_of
from cat_fast.evaluation.tokenizers.columns import Scored
from cat_fast.inference.encoding.shard_plan import open_images

SPLITS = ("validation", "test", "train", "unknown")


@dataclass
class Samples:
    """The images to evaluate, in a fixed order, without those that have no score although one is needed."""

    data: str
    split: str
    shards: ShardSet
    scored: list[Scored]
    places: list[tuple[int, int]]
    """Shard and number within it of each image."""
    skipped: list[Skipped]
    """Images without a score, and unreadable shards."""
    stamps: list[Stamp]
    """Stamp of the file of each image, or of its archive."""

    def read(self, first: int, last: int) -> Iterator[tuple[Scored, Image.Image | str]]:
        """Yield the images with numbers in [first, last) as RGB, or why they cannot be read."""
        entries: dict[tuple[int, int], Entry] = {}
        wanted = self.places[first:last]
        for shard in dict.fromkeys(index for index, _ in wanted):
            numbers = [number for index, number in wanted if index == shard]
            for entry in self.shards.open(shard).entries(min(numbers)):
                if entry.number > max(numbers):
                    break
                entries[shard, entry.number] = entry
        for scored, place in zip(self.scored[first:last], wanted, strict=True):
            entry = entries[place]
            try:
                yield scored, entry.damage or decode_image(entry.read())
            except (OSError, UserError) as error:
                yield scored, str(error)

    def fingerprint(self) -> str:
        """Return a hash of the images' identity and their scores."""
        return hash_name(repr((self.shards.fingerprint, self.scored)))


def open_samples(
    data: str, scores: Path | None, needs_scores: bool, split: str | None = None, limit: int | None = None
) -> Samples:
    """Open images and join them with their scores.

    Args:
        data: folder, archives or index, as for `cat-fast encode-shards`; or `photographs`, the held-out ones
            of the package.
        scores: file of `cat-fast score`, by key; None takes the scores of the labels.
        needs_scores: leave out images without a score.
        split: split of the images; None takes it from the path.
        limit: maximum number of images.

    Raises:
        UserError: an .npz file; the training split, unless `split` names it; no usable images.
    """
    if Path(data).suffix == ".npz":
        raise UserError(
            f"{data}: rFID compares reconstructions with their own originals. A reference file for generated"
            " images contains statistics of other images, often of the training split; pass --data with the"
            " images themselves"
        )
    is_packaged = data == PHOTOGRAPHS
    found_split = "validation" if is_packaged else split_of(Path(data)) if "://" not in data else "unknown"
    if found_split == "train" and split is None:
        raise UserError(
            f"{data}: this looks like a training split, but rFID is published for validation images; pass"
            " those, or --split train if this is intended, or --split validation if the name misleads"
        )
    given = read_scores(scores) if scores else {}
    shards: ShardSet = (
        RecordShards(index_photographs(photographs("held_out"))) if is_packaged else open_images(data)
    )
    scored: list[Scored] = []
    places: list[tuple[int, int]] = []
    skipped: list[Skipped] = []
    stamps: list[Stamp] = []
    seen: set[str] = set()
    for index, name in enumerate(shards.names):
        if limit is not None and len(scored) == limit:
            break
        try:
            stamp_of = image_stamps(shards, index)
            entries = list(shards.open(index).entries(0))
        except UnreadableShard as error:
            skipped.append(Skipped(name, f"the shard cannot be opened ({error})"))
            continue
        for entry in entries:
            if limit is not None and len(scored) == limit:
                break
            row = given.get(entry.key) or given.get(Path(entry.key).stem) or given.get(Path(entry.key).name)
            score, expected = row or (entry.labels.score, entry.labels.expected)
            if needs_scores and score is None:
                where = scores or "the labels"
                skipped.append(Skipped(entry.key, f"no score in {where}, which adaptive ratios need"))
                continue
            # archives may repeat each other's keys
            key = entry.key if entry.key not in seen else f"{name}:{entry.key}"
            seen.add(key)
            scored.append(Scored(key, score, expected))
            places.append((index, entry.number))
            stamps.append(stamp_of(entry))
    if not scored:
        why = f"; {skipped[0].name}: {skipped[0].why}" if skipped else ""
        raise UserError(f"{data}: no image can be evaluated{why}")
    return Samples(data, split or found_split, shards, scored, places, skipped, stamps)


def read_scores(path: Path) -> Mapping[str, tuple[int, float | None]]:
    """Return (score, expected score) by key of a Parquet or JSON-lines file of scores.

    Raises:
        UserError: another file, or rows without `key` and `score`.
    """
    found: dict[str, tuple[int, float | None]] = {}
    for row in _rows(path):
        key, score = row.get("key"), row.get("score")
        if not isinstance(key, str):
            raise UserError(f'{path}: expected rows with "key" and "score", as cat-fast score writes')
        if score is not None:
            if isinstance(score, bool) or not isinstance(score, int) or not 1 <= score <= 9:
                raise UserError(f"{path}: {key}: expected a score from 1 to 9, got {score!r}")
            found[key] = (score, row.get("expected"))
    if not found:
        raise UserError(f"{path}: contains no scores")
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        for number, line in text_lines(path):
            try:
                yield parse_object(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from error
        return
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        names = [name for name in ("key", "score", "expected") if name in table.column_names]
        yield from table.select(names).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as a Parquet file of scores ({error})") from error
