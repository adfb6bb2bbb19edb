"""Parquet files of scores: one row per sample, with the settings of the run in the file's metadata.

    key          string   key of the sample
    caption      string   null if the sample has no valid description, or pixels were scored
    has_text     bool     flags as given or described; null if unknown, so that the scorer inferred them
    has_faces    bool
    score        int32    1..9; null if the sample failed, like the columns that follow from it
    expected     float64  expected score before rounding
    confidence   float64  null if the scorer does not estimate it
    ratio        int32    8, 16 or 32
    tokens       int32    at 512 px and patch size 2
    scorer       string   name and version
    prompt_hash  string   null for scorers without a prompt
    reasons      string   null if the scorer gives none
    seconds      float64  mean time per sample of the call that scored it; null if it was not scored
    error        string   reason why the sample has no score; null if it has one
    source       string   hash of the image and of the labels given with it; null if a caption was given

Parts of an unfinished run have the same columns without ratio and tokens, which depend on all scores.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import pyarrow
import pyarrow.parquet

from cat_fast.complexity.scoring_run.outputs import ScoreSettings, Shard
from cat_fast.errors import UserError

PART_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("caption", pyarrow.string()),
        ("has_text", pyarrow.bool_()),
        ("has_faces", pyarrow.bool_()),
        ("score", pyarrow.int32()),
        ("expected", pyarrow.float64()),
        ("confidence", pyarrow.float64()),
        ("scorer", pyarrow.string()),
        ("prompt_hash", pyarrow.string()),
        ("reasons", pyarrow.string()),
        ("seconds", pyarrow.float64()),
        ("error", pyarrow.string()),
        ("source", pyarrow.string()),
    ]
)
_AFTER_CONFIDENCE = PART_SCHEMA.get_field_index("confidence") + 1
SCHEMA = PART_SCHEMA.insert(_AFTER_CONFIDENCE, pyarrow.field("tokens", pyarrow.int32())).insert(
    _AFTER_CONFIDENCE, pyarrow.field("ratio", pyarrow.int32())
)
_METADATA = b"cat_fast.scores"
_MAGIC = b"PAR1"
_BATCH = 1024


class NotScores(UserError):
    """Raised for a file that exists and is not a file of scores."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: exists and is not a file of scores; choose another --out, or delete it")


def metadata_of(settings: ScoreSettings, rows: Mapping[str, int]) -> dict[bytes, bytes]:
    """Return the metadata of a file with these settings.

    Args:
        rows: number of rows per input, in order.
    """
    content = {"format": 1} | asdict(settings) | {"inputs": list(rows.items())}
    return {_METADATA: json.dumps(content).encode()}


class HalfWritten(Exception):
    """Raised for a parquet file that was not written to its end, or is damaged."""


class ScoreFile:
    """An existing file of scores, of which one row group is in memory.

    Raises:
        HalfWritten: it was not written to its end.
        NotScores: it is another file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        try:
            stored = json.loads((self._file.schema_arrow.metadata or {})[_METADATA])
            self.settings = ScoreSettings(
                scorer=stored["scorer"],
                version=stored["version"],
                prompt_hash=stored["prompt_hash"],
                shard=Shard(*stored["shard"]),
                thresholds=tuple(stored["thresholds"]),
                mean_tokens=stored["mean_tokens"],
            )
            self.rows: dict[str, int] = dict(stored["inputs"])
            """Number of rows per input, in order."""
        except (KeyError, TypeError, ValueError) as error:
            raise NotScores(path) from error
        self._first_rows = dict(zip(self.rows, accumulate(self.rows.values(), initial=0), strict=False))
        groups = self._file.metadata
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]
        self._cached: tuple[int, pyarrow.Table] | None = None

    def find(self, name: str, first: int, stop: int) -> tuple[range, pyarrow.Table]:
        """Return the numbers and the rows of the samples of an input from number `first` to before `stop`.

        Raises:
            HalfWritten: they are damaged.
        """
        step = self.settings.shard.of
        start = self.settings.shard.first_number(name)
        rows = self.rows.get(name, 0)
        low, high = (min(max(-(-(number - start) // step), 0), rows) for number in (first, stop))
        before = self._first_rows.get(name, 0)
        table = self._read(before + low, before + high)
        return range(start + low * step, start + high * step, step), table

    def batches(self) -> Iterator[pyarrow.RecordBatch]:
        """Yield all rows, a batch at a time."""
        yield from self._file.iter_batches(_BATCH)

    def _read(self, first: int, stop: int) -> pyarrow.Table:
        """Return the columns of parts of rows [first, stop)."""
        pieces = [PART_SCHEMA.empty_table()]
        group = bisect_right(self._starts, first) - 1
        while first < stop:
            start = self._starts[group]
            piece = self._row_group(group).slice(first - start, min(stop, self._starts[group + 1]) - first)
            pieces.append(piece)
            first, group = first + len(piece), group + 1
        return pyarrow.concat_tables(pieces)

    def _row_group(self, group: int) -> pyarrow.Table:
        if self._cached is None or self._cached[0] != group:
            try:
                table = self._file.read_row_group(group, PART_SCHEMA.names)
            except (OSError, pyarrow.ArrowException) as error:
                raise HalfWritten from error
            self._cached = group, table.select(PART_SCHEMA.names).cast(PART_SCHEMA)
        return self._cached[1]


def read_part(path: Path) -> pyarrow.Table | None:
    """Return a part of an unfinished run; None if it is not written yet.

    Raises:
        HalfWritten: it was not written to its end.
    """
    if not path.exists():
        return None
    with _open(path) as file:
        try:
            return file.read(PART_SCHEMA.names)
        except (OSError, pyarrow.ArrowException) as error:
            raise HalfWritten from error


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        try:
            with path.open("rb") as file:
                start = file.read(len(_MAGIC))
        except OSError as unreadable:
            raise UserError(f"{path}: cannot be read ({unreadable.strerror or unreadable})") from error
        raise (HalfWritten if start in (b"", _MAGIC) else NotScores(path)) from error
