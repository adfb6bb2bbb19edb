"""Rows that earlier runs have written, found by the numbers of their samples."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow

from cat_fast.complexity.scoring_run.outputs import DAMAGED, ScoreSettings, shard_files
from cat_fast.complexity.scoring_run.samples import Sample
from cat_fast.complexity.scoring_run.score_file import PART_SCHEMA, HalfWritten, ScoreFile
from cat_fast.errors import UserError

_ADVICE = "choose another --out, or delete it"


class KnownRows:
    """Rows of the file that a run writes, and for a run without a shard those of the files of shards.

    Args:
        out: file of all shards.
        report: receives one line per half-written file, which is renamed and so not read again.

    Raises:
        UserError: a file is not one of scores, or contains scores of another scorer.
    """

    def __init__(self, out: Path, settings: ScoreSettings, report: Callable[[str], None]) -> None:
        self.report = report
        path = settings.shard.path(out)
        paths = [path] if settings.shard.of > 1 else [path, *shard_files(out)]
        self.files = [file for file in map(self._open, paths) if file is not None]
        for file in self.files:
            _require_same_scorer(file, settings)

    def own(self, path: Path) -> ScoreFile | None:
        """Return the file at `path`, if it exists."""
        return next((file for file in self.files if file.path == path), None)

    def find(self, name: str, first: int, stop: int) -> tuple[list[int], pyarrow.Table]:
        """Return numbers and rows of the samples of an input from number `first` to before `stop`, in order.

        If several files have a row of a sample, one with a score is preferred.
        """
        numbers, tables = [np.zeros(0, dtype=np.int64)], [PART_SCHEMA.empty_table()]
        for file in list(self.files):
            try:
                found, table = file.find(name, first, stop)
            except HalfWritten:
                self._set_aside(file.path)
                self.files.remove(file)
                continue
            numbers.append(np.asarray(found, dtype=np.int64))
            tables.append(table)
        number, table = np.concatenate(numbers), pyarrow.concat_tables(tables)
        order = np.lexsort((table["error"].is_valid().to_numpy(), number))
        distinct, position = np.unique(number[order], return_index=True)
        return distinct.tolist(), table.take(order[position])

    def require_all(self, totals: Mapping[str, int]) -> None:
        """Check that no sample is missing that a file has a row of.

        Args:
            totals: number of samples per input, those of other shards included.

        Raises:
            UserError: samples are missing; names their input.
        """
        for file in self.files:
            shard = file.settings.shard
            for name, rows in file.rows.items():
                last = shard.first_number(name) + (rows - 1) * shard.of
                if rows and last >= totals.get(name, 0):
                    raise UserError(
                        f"{file.path} has {rows} rows of {name}, but samples of it are missing now; pass all"
                        f" inputs again, or {_ADVICE}"
                    )

    def _open(self, path: Path) -> ScoreFile | None:
        if not path.exists():
            return None
        try:
            return ScoreFile(path)
        except HalfWritten:
            self._set_aside(path)
            return None

    def _set_aside(self, path: Path) -> None:
        damaged = path.with_name(path.name + DAMAGED)
        try:
            path.replace(damaged)
        except OSError as error:
            raise UserError(f"{path}: half-written, and cannot be renamed ({error.strerror})") from error
        self.report(f"{path}: half-written; renamed to {damaged.name}, and its samples are scored again")


def rows_to_keep(
    samples: Sequence[tuple[int, Sample]], numbers: Sequence[int], rows: pyarrow.Table, path: Path
) -> list[int | None]:
    """Return the row of each sample that need not be scored again, None for the others.

    A sample with a score is kept, and so is one that cannot be scored for the same reason as before.

    Args:
        samples: numbers and samples.
        numbers: numbers of the samples of `rows`.
        path: file of the rows, for messages.

    Raises:
        UserError: a sample with a score has changed since.
    """
    names = ("key", "caption", "has_text", "has_faces", "source", "error")
    known = dict(zip(numbers, rows.select(names).to_pylist(), strict=True))
    index = {number: i for i, number in enumerate(numbers)}
    kept: list[int | None] = []
    for number, sample in samples:
        row = known.get(number)
        keep = row is not None and sample.error == row["error"] and sample.matches(row)
        if row is not None and row["error"] is None and not keep:
            raise UserError(
                f"{path} was made from other samples: {sample.key!r} has changed, or was {row['key']!r};"
                f" restore it, {_ADVICE}"
            )
        kept.append(index[number] if keep else None)
    return kept


def _require_same_scorer(file: ScoreFile, settings: ScoreSettings) -> None:
    mine, theirs = settings.of_scores, file.settings.of_scores
    differing = [
        f"{name} {theirs[name]}, not {mine[name]}"
        for name in mine
        if name != "shard" and theirs[name] != mine[name]
    ]
    if differing:
        raise UserError(f"{file.path} contains scores of another scorer ({', '.join(differing)}); {_ADVICE}")
