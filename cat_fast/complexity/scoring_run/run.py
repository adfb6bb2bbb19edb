"""Resumable scoring of captions from files of any size into one parquet file.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from cat_fast.complexity.ratio import RatioThresholds
from cat_fast.complexity.score import Score, Scorer, ScoringFailure
from cat_fast.complexity.scorers.loading import LANGUAGE_MODELS
from cat_fast.complexity.scoring_run.decision import require_budget, with_ratios
from cat_fast.complexity.scoring_run.inputs import PARTIAL, Inputs
from cat_fast.complexity.scoring_run.keys import KeysSeen
from cat_fast.complexity.scoring_run.known_rows import KnownRows, rows_to_keep
from cat_fast.complexity.scoring_run.samples import Input, Sample, UnusableInput
from cat_fast.complexity.scoring_run.score_file import (
    PART_SCHEMA,
    SCHEMA,
    SUFFIX,
    HalfWritten,
    ScoreSettings,
    Shard,
    read_part,
)
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.data.folder_lock import locked
from cat_fast.data.folder_settings import claim_folder
from cat_fast.data.text_files import valid_text
from cat_fast.errors import UserError

_ROWS_PER_GROUP = 8192
_BYTES_PER_GROUP = 1 << 26
"""Bytes of captions, after which a row group ends."""
_CHARACTERS_PER_PART = 1 << 24
"""A part with longer captions has fewer samples, which bounds the memory."""
REPEATED = "its key repeats that of an earlier sample"

OnProgress = Callable[[int, int], None]
"""Called with the numbers of samples scored now and kept from an earlier run, for each call of the scorer."""


@dataclass(frozen=True)
class CallSizes:
    """Numbers of samples that are scored and written together."""

    part: int = 8192
    """Samples per part: a killed run loses the scores of at most one."""
    call: int = 1024
    """Samples per call of the scorer, after each of which progress is reported."""


def sizes_for(name: str, escalated: bool = False) -> CallSizes:
    """Return the sizes for a scorer of `load_scorer`: seconds to minutes of work per part."""
    if escalated or name in LANGUAGE_MODELS:
        return CallSizes(128, 128)
    return CallSizes(2048, 128) if name == "accurate" else CallSizes(8192, 1024)


@dataclass
class ScoringResult:
    """Result of a scoring run; the rows are in the file."""

    path: Path
    seconds: float = 0.0
    rows: int = 0
    scored: int = 0
    """Samples scored by this run; the others were scored before, or cannot be."""
    failed: int = 0
    """Samples without a score."""
    problems: list[str] = field(default_factory=list)
    """One line per unusable input and half-written file, with its name."""


def score_set(
    inputs: Inputs,
    scorer: Scorer,
    out: Path,
    thresholds: RatioThresholds,
    *,
    mean_tokens: float | None = None,
    shard: Shard = Shard(),  # noqa: B008 # immutable
    sizes: CallSizes = CallSizes(),
    on_progress: OnProgress = lambda scored, kept: None,
) -> ScoringResult:
    """Score all samples and write the file of `shard`; see the module for how runs resume.

    A sample that cannot be scored, and one whose key repeats that of an earlier one, is a row with an error;
    an unusable input is a line of `ScoringResult.problems`. Neither affects the others.

    Args:
        out: file of all shards, ending in .parquet.
        mean_tokens: hard budget of the mean tokens per sample at 512 px (`with_ratios`).

    Raises:
        UserError: nothing can be scored; the file belongs to other samples or another scorer, is not one of
            scores, is in use by another process, or cannot be written; or the scorer cannot work at all.
    """
    if out.suffix != SUFFIX:
        raise UserError(f"--out {out}: expected a file name ending in {SUFFIX}")
    require_budget(mean_tokens)
    settings = ScoreSettings(
        scorer=scorer.name,
        version=scorer.version,
        prompt_hash=prompt_hash(scorer),
        shard=shard,
        thresholds=(thresholds.a, thresholds.b),
        mean_tokens=mean_tokens,
    )
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


def prompt_hash(scorer: Scorer) -> str | None:
    """Return the hash of a language model's prompt; None for a scorer without one."""
    for found in (scorer, getattr(scorer, "second", None)):
        if (prompt := getattr(found, "prompt", None)) is not None:
            return str(prompt.hash)
    return None


class _Run:
    """One run of `score_set`, which holds the lock of its folder."""

    def __init__(
        self,
        inputs: Inputs,
        scorer: Scorer,
        out: Path,
        folder: Path,
        settings: ScoreSettings,
        sizes: CallSizes,
        on_progress: OnProgress,
    ) -> None:
        self.inputs, self.scorer, self.folder, self.settings = inputs, scorer, folder, settings
        self.sizes, self.on_progress = sizes, on_progress
        self.result = ScoringResult(settings.shard.path(out), problems=list(inputs.problems))
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
        result.rows = sum(rows.values())
        own = self.known.own(result.path)
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
            if len(part) == self.sizes.part or characters >= _CHARACTERS_PER_PART:
                yield part
                part, characters = [], 0
        if part:
            yield part

    def _own_samples(self, source: Input) -> Iterator[tuple[int, Sample]]:
        shard = self.settings.shard
        first, number = shard.first_number(source.name), -1
        try:
            for number, sample in enumerate(source.samples()):
                if self.seen.add(sample.key) and sample.error is None:
                    sample = replace(sample, error=REPEATED)
                if (number - first) % shard.of == 0:
                    yield number, sample
        except UnusableInput as error:
            self.result.problems.append(f"{source.name}: {error}")
        else:
            if number < 0:
                self.result.problems.append(f"{source.name}: contains no captions")
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
        kept = rows_to_keep(samples, numbers, rows, path if stored is not None else self.result.path)
        new = [sample for (_, sample), row in zip(samples, kept, strict=True) if row is None]
        if new:
            # Kept rows, then new ones; each sample's row among them.
            rest = iter(range(len(rows), len(rows) + len(new)))
            order = [next(rest) if row is None else row for row in kept]
            self.on_progress(0, len(samples) - len(new))
            rows = pyarrow.concat_tables([rows, self._score(new)]).take(order)
            with atomic_write(path) as part:
                pyarrow.parquet.write_table(rows, part, compression="zstd")
        else:
            self.on_progress(0, len(samples))
        self.result.failed += len(rows) - rows["error"].null_count
        written = bool(new) or stored is not None
        self.parts.append(
            _Part(name, samples[0][0], samples[-1][0] + 1, len(rows), path if written else None)
        )

    def _read_part(self, path: Path) -> pyarrow.Table | None:
        try:
            return read_part(path)
        except HalfWritten:
            self.result.problems.append(f"{path}: half-written; its samples are scored again")
            return None

    def _score(self, samples: Sequence[Sample]) -> pyarrow.Table:
        """Return the rows of samples, in order; those with an error are not scored."""
        scorable = [sample.description for sample in samples if sample.error is None and sample.description]
        outcomes: list[tuple[Score | ScoringFailure, float]] = []
        for start in range(0, len(scorable), self.sizes.call):
            call = scorable[start : start + self.sizes.call]
            before = time.perf_counter()
            results = self.scorer.score_many(call)
            seconds = (time.perf_counter() - before) / len(call)
            outcomes += [(result, seconds) for _, result in zip(call, results, strict=True)]
            self.on_progress(len(call), 0)
        self.on_progress(0, len(samples) - len(scorable))
        outcome = iter(outcomes)
        rows = [self._row(sample, None if sample.error else next(outcome)) for sample in samples]
        self.result.scored += sum(isinstance(result, Score) for result, _ in outcomes)
        return pyarrow.Table.from_pylist(rows, PART_SCHEMA)

    def _row(self, sample: Sample, outcome: tuple[Score | ScoringFailure, float] | None) -> dict[str, Any]:
        key, caption, has_text, has_faces = sample.identity
        result, seconds = outcome or (ScoringFailure(sample.error or ""), None)
        row: dict[str, Any] = {
            "key": key,
            "caption": caption,
            "has_text": has_text,
            "has_faces": has_faces,
            "scorer": f"{self.settings.scorer} {self.settings.version}",
            "prompt_hash": self.settings.prompt_hash,
            "seconds": seconds,
        }
        if isinstance(result, ScoringFailure):
            return row | {"error": valid_text(result.error) or "the scorer gave no reason"}
        return row | {
            "score": result.score,
            "expected": result.expected,
            "confidence": result.confidence,
            "reasons": valid_text(result.reasons) or None,
        }

    def _write(self, thresholds: RatioThresholds, rows: dict[str, int]) -> None:
        """Write the file from the parts, with ratios, in row groups that do not depend on the parts."""
        schema = SCHEMA.with_metadata(self.settings.to_metadata(rows))
        complete = self.folder / "complete"  # so that a killed run leaves nothing outside this folder
        with (
            atomic_write(complete) as part,
            pyarrow.parquet.ParquetWriter(part, schema, compression="zstd") as writer,
        ):
            for group in _regroup(with_ratios(self._tables, thresholds, self.settings.mean_tokens)):
                writer.write_table(group, row_group_size=len(group))
        try:
            complete.replace(self.result.path)
        except OSError as error:
            raise UserError(f"{self.result.path}: cannot be written ({error.strerror or error})") from error

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
