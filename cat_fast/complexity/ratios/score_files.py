"""Counts of the scores in files that `cat-fast score` and other scorers write."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cat_fast.complexity.ratios.score_counts import ScoreCounts
from cat_fast.data.images.label_fields import given_labels
from cat_fast.data.text_files import parse_object, text_lines
from cat_fast.errors import UserError

_BATCH = 1 << 14


@dataclass
class ScoreFiles:
    """Counts of the integer and expected scores of a set of files."""

    scores: ScoreCounts = field(default_factory=ScoreCounts)
    expected: ScoreCounts = field(default_factory=ScoreCounts)
    """Expected scores; fewer than `scores` if files do not store them."""
    unscored: int = 0
    """Number of rows without a complexity score."""

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "ScoreFiles":
        """Count the scores in Parquet files, with columns "score" and "expected", and in JSON lines.

        Raises:
            UserError: a file cannot be read or has another form, or there are no scores.
        """
        found = cls()
        for path in paths:
            readers = {".parquet": _table, ".jsonl": _json_lines}
            if path.suffix not in readers:
                raise UserError(f"{path}: expected a .parquet or .jsonl file of scores")
            rows = readers[path.suffix](path)
            while batch := list(itertools.islice(rows, _BATCH)):
                found._add(batch)
        if not found.scores.total:
            raise UserError(
                f"the files contain no complexity scores in {found.unscored} rows; score the captions first"
            )
        return found

    def require_expected(self) -> ScoreCounts:
        """Return the counts of expected scores; raise UserError if scores have none."""
        if missing := self.scores.total - self.expected.total:
            raise UserError(
                f"{missing:.0f} of {self.scores.total:.0f} scores have no expected score, which a budget of"
                ' mean tokens divides; store it as "expected"'
            )
        return self.expected

    def _add(self, rows: list[dict[str, Any]]) -> None:
        scored = [row for row in rows if "score" in row]
        self.scores.add([row["score"] for row in scored])
        self.expected.add([row["expected"] for row in scored if "expected" in row])
        self.unscored += len(rows) - len(scored)


def _table(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the labels of each row; columns without labels are not read."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "score" not in names:
                raise UserError(f'{path}: expected a column "score", got {", ".join(names)}')
            columns = [name for name in ("score", "expected") if name in names]
            for batch in file.iter_batches(_BATCH, columns=columns):
                yield from (_labels(row, str(path)) for row in batch.to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as a Parquet file ({error})") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the labels of each line that is not blank."""
    for number, line in text_lines(path):
        where = f"{path}, line {number}"
        try:
            row = parse_object(line)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        yield _labels({name: row.get(name) for name in ("score", "expected")}, where)


def _labels(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return given_labels(row)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
