"""Resumable scoring of captions or images from files of any size into one parquet file.

    scores.parquet             the result (`score_file`), written atomically once everything is scored
    scores.parquet.partial/    parts of an unfinished run, removed at the end
        settings.json          settings that the scores depend on
        IIIIIIIIIIII-KKKKKK.parquet    part K of an input, whose name has the hash I

A run may be killed at any time: when it is started again with the same arguments, it keeps the parts that are
complete and scores the rest. The file then has the same rows in the same order as that of an uninterrupted
run, equal in every column except `seconds`, and in the same row groups. Parts have fixed numbers of samples
and are scored in the same calls, so that batches do not depend on interruptions.

A run on a complete file retries the samples that failed and keeps the others. Inputs may be added, samples
appended, and inputs or samples that failed repaired; a change of anything that was scored is refused. Other
thresholds or another budget change the ratios and keep the scores.

Several processes or machines share the work as shards, each with a file of its own (`Shard.path`). A run
without a shard uses the rows of existing shard files and scores only what they lack: this merges them.
"""

import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from cat_fast.complexity.image_score import ImageScorer
from cat_fast.complexity.ratios.thresholds import RatioThresholds
from cat_fast.complexity.score import Scorer
from cat_fast.complexity.scoring_run.decision import TOKENS, decide, require_enough
from cat_fast.complexity.scoring_run.inputs import Inputs
from cat_fast.complexity.scoring_run.keys import KeysSeen
from cat_fast.complexity.scoring_run.known_rows import KnownRows, rows_to_keep
from cat_fast.complexity.scoring_run.outputs import PARTIAL, SUFFIX, ScoreSettings, Shard
from cat_fast.complexity.scoring_run.rows import (
    CallSizes,
    OnProgress,
    Row,
    RowScorer,
    ScoringResult,
    mark_repeated,
)
from cat_fast.complexity.scoring_run.samples import Input, Sample, UnusableInput
from cat_fast.complexity.scoring_run.score_file import (
    PART_SCHEMA,
    SCHEMA,
    HalfWritten,
    metadata_of,
    read_part,
)
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.data.folder_lock import locked
from cat_fast.data.folder_settings import claim_folder
from cat_fast.errors import UserError

_ROWS_PER_GROUP = 8192
_BYTES_PER_GROUP = 1 << 26
"""Bytes of captions, after which a row group ends."""
_CHARACTERS_PER_PART = 1 << 24
"""A part with longer captions has fewer samples, which bounds the memory."""
_TOKENS = np.zeros(max(TOKENS) + 1, dtype=np.int32)
_TOKENS[list(TOKENS)] = list(TOKENS.values())


def score_set(
    inputs: Inputs,
    scorer: Scorer | ImageScorer,
    out: Path,
    thresholds: RatioThresholds,
    *,
    mean_tokens: float | None = None,
    shard: Shard = Shard(),  # noqa: B008 # immutable
    sizes: CallSizes = CallSizes(),  # noqa: B008 # immutable
    on_progress: OnProgress = lambda scored, kept: None,
) -> ScoringResult:
    """Score all samples and write the file of `shard`; see the module for how runs resume.

    A sample that cannot be scored, and one whose key repeats that of an earlier one, is a row with an error;
    an unusable input is a line of `ScoringResult.problems`. Neither affects the others.

    Args:
        out: file of all shards, ending in .parquet.
        mean_tokens: hard budget of the mean tokens per sample at 512 px (`decide`).

    Raises:
        UserError: nothing can be scored; the file belongs to other samples or another scorer, is not one of
            scores, is in use by another process, or cannot be written; or the scorer cannot work at all.
    """
    if out.suffix != SUFFIX:
        raise UserError(f"--out {out}: expected a file name ending in {SUFFIX}")
    require_enough(mean_tokens)
    settings = ScoreSettings.of(scorer, thresholds, mean_tokens, shard)
    path = shard.path(out)
    require_writable(path)
    folder = path.with_name(path.name + PARTIAL)
    start = time.perf_counter()
    with locked(folder, "scoring"):
        try:
            run = _Run(inputs, scorer, out, folder, settings, sizes, on_progress)
            claim_folder(folder / "settings.json", settings.of_scores | {"part": sizes.part}, "scores")
            result = run.finish(thresholds)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note("complete parts are kept; run the same command again to score the rest")
            raise
        finally:
            if not any(folder.glob(f"*{SUFFIX}")):
                shutil.rmtree(folder, ignore_errors=True)
    result.seconds = time.perf_counter() - start
    return result


class _Run:
    """One run of `score_set`, which holds the lock of its folder."""

    def __init__(
        self,
        inputs: Inputs,
        scorer: Scorer | ImageScorer,
        out: Path,
        folder: Path,
        settings: ScoreSettings,
        sizes: CallSizes,
        on_progress: OnProgress,
    ) -> None:
        self.inputs, self.folder, self.settings = inputs, folder, settings
        self.scorer = RowScorer(scorer, settings, sizes.call, on_progress)
        self.part_size, self.on_progress = sizes.part, on_progress
        self.path = settings.shard.path(out)
        noun = "image" if isinstance(scorer, ImageScorer) else "caption"
        self.result = ScoringResult(settings, noun, problems=list(inputs.problems))
        self.known = KnownRows(out, settings, self.result.problems.append)
        self.seen = KeysSeen()
        self.totals: dict[str, int] = {}
        """Number of samples per input, those of other shards included."""
        self.parts: list[_Part] = []

    def finish(self, thresholds: RatioThresholds) -> ScoringResult:
        """Score what is missing, then write the file unless it is complete."""
        result = self.result
        for source in self.inputs:
            for number, samples in enumerate(self._split(source)):
                self._finish_part(source.name, number, samples)
        if not any(self.totals.values()):
            raise UserError("nothing to score: " + "; ".join(result.problems))
        self.known.require_all(self.totals)
        rows: dict[str, int] = {}
        for part in self.parts:
            rows[part.name] = rows.get(part.name, 0) + part.rows
        result.rows, result.scored = sum(rows.values()), self.scorer.scored
        own = self.known.own(self.path)
        complete = (
            own is not None and own.settings == self.settings and [*own.rows.items()] == [*rows.items()]
        )
        if not complete or any(part.path for part in self.parts):
            self._write(thresholds, rows)
            shutil.rmtree(self.folder, ignore_errors=True)
        return result

    def _split(self, source: Input) -> Iterator[list[tuple[int, Sample]]]:
        """Yield this shard's samples of an input with their numbers, a part at a time."""
        part: list[tuple[int, Sample]] = []
        characters = 0
        for number, sample in self._own_samples(source):
            part.append((number, sample))
            characters += len(sample.description.caption) if sample.description else 0
            if len(part) == self.part_size or characters >= _CHARACTERS_PER_PART:
                yield part
                part, characters = [], 0
        if part:
            yield part

    def _own_samples(self, source: Input) -> Iterator[tuple[int, Sample]]:
        shard = self.settings.shard
        first, number = shard.first_number(source.name), -1
        try:
            for number, sample in enumerate(mark_repeated(source.samples(), self.seen)):
                if (number - first) % shard.of == 0:
                    yield number, sample
        except UnusableInput as error:
            self.result.problems.append(f"{source.name}: {error}")
        else:
            if number < 0:
                self.result.problems.append(f"{source.name}: contains no {self.result.noun}s")
        self.totals[source.name] = number + 1

    def _finish_part(self, name: str, number: int, samples: list[tuple[int, Sample]]) -> None:
        """Score the samples of a part that have no score yet, and write it if there are any."""
        digest = hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
        path = self.folder / f"{digest}-{number:06d}{SUFFIX}"
        stored = self._read_part(path)
        if stored is not None and len(stored) > len(samples):
            raise UserError(
                f"{self.folder} has scores of more samples of {name} than there are now; restore them, or"
                " delete that folder"
            )
        if stored is not None:
            numbers, rows = [n for n, _ in samples[: len(stored)]], stored
        else:
            numbers, rows = self.known.find(name, samples[0][0], samples[-1][0] + 1)
        kept = rows_to_keep(samples, numbers, rows, path if stored is not None else self.path)
        new = [sample for (_, sample), row in zip(samples, kept, strict=True) if row is None]
        if new:
            # Kept rows, then new ones; each sample's row among them.
            rest = iter(range(len(rows), len(rows) + len(new)))
            order = [next(rest) if row is None else row for row in kept]
            self.on_progress(0, len(samples) - len(new))
            scored = pyarrow.Table.from_pylist(self._score(new), PART_SCHEMA)
            rows = pyarrow.concat_tables([rows, scored]).take(order)
            with atomic_write(path) as part:
                pyarrow.parquet.write_table(rows, part, compression="zstd")
        else:
            self.on_progress(0, len(samples))
        self.result.failed += len(rows) - rows["error"].null_count
        written = bool(new) or stored is not None
        self.parts.append(
            _Part(name, samples[0][0], samples[-1][0] + 1, len(rows), path if written else None)
        )

    def _score(self, samples: list[Sample]) -> list[Row]:
        try:
            return self.scorer.score(samples)
        except UserError as error:
            if not any(part.path for part in self.parts):
                raise
            raise UserError(
                f"{error}; what was scored before is kept: run the same command again to score the rest"
            ) from error

    def _read_part(self, path: Path) -> pyarrow.Table | None:
        try:
            return read_part(path)
        except HalfWritten:
            self.result.problems.append(f"{path}: half-written; its samples are scored again")
            return None

    def _write(self, thresholds: RatioThresholds, rows: dict[str, int]) -> None:
        """Write the file from the parts, with ratios, in row groups that do not depend on the parts."""
        schema = SCHEMA.with_metadata(metadata_of(self.settings, rows))
        complete = self.folder / "complete"  # so that a killed run leaves nothing outside this folder
        with (
            atomic_write(complete) as part,
            pyarrow.parquet.ParquetWriter(part, schema, compression="zstd") as writer,
        ):
            for group in _regroup(self._with_ratios(thresholds)):
                writer.write_table(group, row_group_size=len(group))
        try:
            complete.replace(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def _with_ratios(self, thresholds: RatioThresholds) -> Iterator[pyarrow.Table]:
        """Yield the rows of all parts with their ratios and tokens, as tables of `SCHEMA`."""
        budget = self.settings.mean_tokens
        budgeted = None
        if budget is not None:
            pairs = [_scores_of(table) for table in (PART_SCHEMA.empty_table(), *self._tables())]
            scores, expected = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
            budgeted = decide(scores, expected, thresholds, budget)
        done = 0
        for table in self._tables():
            scores, expected = _scores_of(table)
            if budgeted is None:
                chosen = decide(scores, expected, thresholds)
            else:
                chosen = budgeted[done : done + len(scores)]
                done += len(scores)
            missing = table["score"].is_null().to_numpy()
            for name, values in (("ratio", chosen), ("tokens", _TOKENS[chosen])):
                column = np.zeros(len(table), dtype=np.int32)
                column[~missing] = values
                table = table.append_column(name, pyarrow.array(column, mask=missing))
            yield table.select(SCHEMA.names).cast(SCHEMA)

    def _tables(self) -> Iterator[pyarrow.Table]:
        for part in self.parts:
            stored = None if part.path is None else read_part(part.path)
            yield self.known.find(part.name, part.first, part.stop)[1] if stored is None else stored


class _Part(NamedTuple):
    """Samples `first` to before `stop` of an input, those of this shard."""

    name: str
    first: int
    stop: int
    rows: int
    path: Path | None
    """File of the part; None if earlier runs have written all its rows elsewhere."""


def _scores_of(table: pyarrow.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores and expected scores of the rows that have them."""
    scored = table.filter(table["score"].is_valid())
    return scored["score"].to_numpy(), scored["expected"].to_numpy()


def _regroup(tables: Iterator[pyarrow.Table]) -> Iterator[pyarrow.Table]:
    """Yield the rows in tables of `_ROWS_PER_GROUP`, fewer at the end and where captions are long."""
    pending: list[pyarrow.Table] = []
    count = length = 0
    for table in tables:
        while count + len(table) >= _ROWS_PER_GROUP:
            rest = _ROWS_PER_GROUP - count
            yield pyarrow.concat_tables([*pending, table.slice(0, rest)])
            table, pending, count, length = table.slice(rest), [], 0, 0
        pending.append(table)
        count += len(table)
        length += pyarrow.compute.sum(pyarrow.compute.binary_length(table["caption"])).as_py() or 0
        if length >= _BYTES_PER_GROUP:
            yield pyarrow.concat_tables(pending)
            pending, count, length = [], 0, 0
    if count:
        yield pyarrow.concat_tables(pending)
