"""Scoring runs: resumed after any interruption, shared by processes, repaired, and refused if others'."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pyarrow.parquet
import pytest

from cat_fast.complexity import RatioThresholds
from cat_fast.complexity.scoring_run import keys, run
from cat_fast.complexity.scoring_run.inputs import open_inputs
from cat_fast.complexity.scoring_run.outputs import Shard
from cat_fast.complexity.scoring_run.rows import REPEATED, CallSizes
from cat_fast.errors import UserError
from tests.complexity.scoring_run.stub import SIZES, StubScorer, rows, score

ROOT = Path(__file__).parents[3]
CAPTIONS = [f"caption {'x' * (i % 23)} {i}" for i in range(50)]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.jsonl"
    path.write_text(
        "".join(json.dumps({"key": f"k{i}", "caption": c}) + "\n" for i, c in enumerate(CAPTIONS))
    )
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "scores.parquet"


def test_a_row_per_sample_in_order(captions: Path, out: Path) -> None:
    result = score(out, captions)
    assert (result.rows, result.scored, result.failed, result.problems) == (50, 50, 0, [])
    found = rows(out)
    assert [row["key"] for row in found] == [f"k{i}" for i in range(50)]
    assert [row["caption"] for row in found] == CAPTIONS
    assert all(row["tokens"] == {8: 1024, 16: 256, 32: 64}[row["ratio"]] for row in found)
    assert [row["ratio"] for row in found] == RatioThresholds(4, 7).ratios(row["score"] for row in found)
    assert {row["scorer"] for row in found} == {"stub 1"}
    assert all(s > 0 for s in pyarrow.parquet.read_table(out)["seconds"].to_pylist())
    assert [path.name for path in out.parent.iterdir()] == ["scores.parquet"]  # nothing else remains


def test_a_folder_called_images_is_another_input_than_single_images(out: Path, tmp_path: Path) -> None:
    photo = (ROOT / "tests" / "cases" / "p0.jpg").read_bytes()
    for name in ("images/a", "images/b", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jpg").write_bytes(photo)
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}")
    for _ in range(2):
        result = score(out, tmp_path / "images", tmp_path / "c.jpg")
        assert (result.rows, result.failed, result.problems) == (3, 0, [])
    captions = [row["caption"] for row in rows(out)]
    assert captions == ["caption of images/a", "caption of images/b", "caption of c"]


_SLOW = """
import sys
from pathlib import Path
from tests.complexity.scoring_run.stub import StubScorer, score
score(Path(sys.argv[1]), sys.argv[2], scorer=StubScorer(seconds=0.03))
"""


def test_a_killed_run_resumes_to_the_same_file(captions: Path, out: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, out, captions],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    partial = out.with_name("scores.parquet.partial")
    deadline = time.monotonic() + 60
    while len(list(partial.glob("*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.read_bytes() for path in partial.glob("*.parquet")}
    assert len(kept) >= 2
    assert not out.exists()

    scorer = StubScorer()
    result = score(out, captions, scorer=scorer)
    assert result.scored == sum(map(len, scorer.calls)) == 50 - 8 * len(kept)
    whole = tmp_path / "whole.parquet"
    score(whole, captions)
    assert rows(out) == rows(whole)
    resumed, uninterrupted = (pyarrow.parquet.ParquetFile(path).metadata for path in (out, whole))
    assert resumed.num_row_groups == uninterrupted.num_row_groups
    assert not partial.exists()


def test_an_exception_keeps_complete_parts_and_calls_stay_the_same(captions: Path, out: Path) -> None:
    whole = StubScorer()
    score(out.with_name("whole.parquet"), captions, scorer=whole)

    class Interrupted(StubScorer):
        def score_many(self, descriptions):
            if len(self.calls) == 7:
                raise KeyboardInterrupt
            return super().score_many(descriptions)

    first, second = Interrupted(), StubScorer()
    with pytest.raises(KeyboardInterrupt) as caught:
        score(out, captions, scorer=first)
    assert "run the same command again" in caught.value.__notes__[0]
    score(out, captions, scorer=second)
    assert first.calls[:6] + second.calls == whole.calls  # the calls of complete parts, then all others


def test_a_complete_file_is_left_alone(captions: Path, out: Path) -> None:
    score(out, captions)
    before, scorer = out.stat().st_mtime_ns, StubScorer()
    result = score(out, captions, scorer=scorer)
    assert (result.rows, result.scored, scorer.calls) == (50, 0, [])
    assert out.stat().st_mtime_ns == before


@pytest.mark.parametrize(("shards", "count"), [(2, 50), (3, 50), (8, 2)])
def test_shards_together_equal_one_run(
    captions: Path, out: Path, tmp_path: Path, shards: int, count: int
) -> None:
    captions.write_text("".join(captions.read_text().splitlines(keepends=True)[:count]))
    more = [tmp_path / f"{i}.txt" for i in range(3)]
    for path in more:
        path.write_text(f"one caption of {path.name}\n")
    parts = [Shard(i, shards) for i in range(shards)]
    for part in reversed(parts):  # in any order
        score(out, captions, *more, shard=part)
    paths = [part.path(out) for part in parts]
    assert len({*paths}) == shards
    assert not out.exists()
    whole = tmp_path / "whole.parquet"
    score(whole, captions, *more)
    read_apart = [row for path in paths for row in rows(path)]
    assert sorted(read_apart, key=lambda row: row["key"]) == sorted(rows(whole), key=lambda row: row["key"])

    scorer = StubScorer()
    score(out, captions, *more, scorer=scorer)  # merges
    assert scorer.calls == []
    assert rows(out) == rows(whole)


def test_a_merge_scores_what_a_missing_shard_lacks(captions: Path, out: Path, tmp_path: Path) -> None:
    for i in (0, 2):
        score(out, captions, shard=Shard(i, 3))
    missing = 50 - sum(len(rows(Shard(i, 3).path(out))) for i in (0, 2))
    assert score(out, captions).scored == missing > 10
    score(tmp_path / "whole.parquet", captions)
    assert rows(out) == rows(tmp_path / "whole.parquet")


def test_failed_samples_are_rows_and_retried(captions: Path, out: Path, tmp_path: Path) -> None:
    result = score(out, captions, scorer=StubScorer(failing=[CAPTIONS[7], CAPTIONS[25]]))
    failed = [row for row in rows(out) if row["error"]]
    assert result.failed == len(failed) == 2
    assert failed[0]["key"] == "k7"
    assert failed[0]["error"] == "the model answered nonsense"
    assert failed[0]["score"] is failed[0]["ratio"] is failed[0]["tokens"] is None
    scorer = StubScorer()
    result = score(out, captions, scorer=scorer)
    assert (result.scored, result.failed) == (2, 0)
    assert scorer.calls == [[CAPTIONS[7]], [CAPTIONS[25]]]
    score(tmp_path / "whole.parquet", captions)
    assert rows(out) == rows(tmp_path / "whole.parquet")


def test_repeated_keys_are_named_also_across_files_and_shards(tmp_path: Path, out: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"key": "a", "caption": "one"}\n{"key": "a", "caption": "two"}\n')
    second.write_text('{"key": 7, "caption": "three"}\n{"id": "a", "caption": "four"}\n')
    assert score(out, first, second).failed == 2
    assert [(row["key"], row["caption"], row["error"]) for row in rows(out)] == [
        ("a", "one", None),
        ("a", "two", REPEATED),
        ("7", "three", None),
        ("a", "four", REPEATED),
    ]
    sharded = out.with_name("sharded.parquet")
    assert sum(score(sharded, first, second, shard=Shard(i, 2)).failed for i in range(2)) == 2
    assert score(out, first, second).scored == 0  # stays an error, without scoring again


def test_repaired_inputs_are_added_without_scoring_the_rest(tmp_path: Path, out: Path) -> None:
    first, second, third = (tmp_path / name for name in ("a.jsonl", "b.parquet", "c.jsonl"))
    first.write_text('{"caption": "one"}\nbroken\n')
    second.write_bytes(b"PAR1 and no more")
    third.write_text('{"caption": "three"}\n')
    result = score(out, first, second, third)
    assert (result.rows, result.scored, result.failed) == (3, 2, 1)
    assert len(result.problems) == 1
    assert result.problems[0].startswith("b.parquet: cannot be read")
    first.write_text('{"caption": "one"}\n{"caption": "repaired"}\n{"caption": "appended"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["two"]}), second)
    scorer = StubScorer()
    result = score(out, first, second, third, scorer=scorer)
    assert (result.rows, result.failed, result.problems) == (5, 0, [])
    assert scorer.calls == [["repaired", "appended"], ["two"]]
    assert [row["caption"] for row in rows(out)] == ["one", "repaired", "appended", "two", "three"]


@pytest.mark.parametrize("unfinished", [False, True])
def test_changed_samples_are_refused(captions: Path, out: Path, unfinished: bool) -> None:
    if unfinished:
        with pytest.raises(KeyboardInterrupt):
            score(out, captions, on_progress=_interrupt_after(30))
    else:
        score(out, captions)
    lines = captions.read_text().splitlines(keepends=True)
    lines[2] = '{"key": "k2", "caption": "another caption"}\n'
    captions.write_text("".join(lines))
    with pytest.raises(UserError, match="made from other samples: 'k2' has changed"):
        score(out, captions)
    captions.write_text("".join(lines[:2]))
    with pytest.raises(UserError, match=r"samples of (it are missing|captions.jsonl than there are)"):
        score(out, captions)


def test_another_scorer_is_refused_and_other_thresholds_keep_the_scores(captions: Path, out: Path) -> None:
    score(out, captions)
    other = StubScorer()
    other.version = "2"
    with pytest.raises(UserError, match="scores of another scorer \\(version 1, not 2\\)"):
        score(out, captions, scorer=other)
    before, scorer = rows(out), StubScorer()
    score(out, captions, scorer=scorer, thresholds=RatioThresholds(0, 0))
    assert scorer.calls == []
    assert {row["ratio"] for row in rows(out)} == {8}
    score(out, captions)
    assert rows(out) == before


@pytest.mark.parametrize("budget", [64, 197, 255.5, 256, 1024])
def test_a_budget_is_met_to_within_one_image(captions: Path, out: Path, budget: float) -> None:
    score(out, captions, mean_tokens=budget, scorer=StubScorer(failing=[CAPTIONS[7]]))
    scored = [row for row in rows(out) if row["error"] is None]
    total = sum(row["tokens"] for row in scored)
    assert budget * len(scored) - 192 < total <= budget * len(scored)
    ordered = sorted(scored, key=lambda row: -row["expected"])  # ties favour earlier samples
    assert [row["ratio"] for row in ordered] == sorted(row["ratio"] for row in ordered)


def test_a_budget_below_the_smallest_image_is_refused_before_scoring(captions: Path, out: Path) -> None:
    scorer = StubScorer()
    with pytest.raises(UserError, match="expected at least 64"):
        score(out, captions, mean_tokens=63, scorer=scorer)
    assert scorer.calls == []


@pytest.mark.parametrize("length", [0, 4, 2000, -1])
def test_a_half_written_file_is_named_and_its_samples_scored(captions: Path, out: Path, length: int) -> None:
    score(out, captions)
    whole = rows(out)
    content = out.read_bytes()
    out.write_bytes(content[:length])
    result = score(out, captions)
    assert len(result.problems) == 1
    assert result.problems[0].startswith(f"{out}: half-written; renamed to scores.parquet.damaged")
    assert out.with_name("scores.parquet.damaged").read_bytes() == content[:length]
    assert rows(out) == whole
    assert score(out, captions).problems == []


def test_a_half_written_part_is_named_and_scored_again(captions: Path, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        score(out, captions, on_progress=_interrupt_after(30))
    part = min(out.with_name("scores.parquet.partial").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    result = score(out, captions)
    assert result.problems == [f"{part}: half-written; its samples are scored again"]
    assert len(rows(out)) == 50


def test_other_files_are_never_overwritten(captions: Path, out: Path) -> None:
    out.parent.mkdir()
    for content in (b"notes", None):
        if content:
            out.write_bytes(content)
        else:
            pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), out)
        before = out.read_bytes()
        with pytest.raises(UserError, match="exists and is not a file of scores"):
            score(out, captions)
        assert out.read_bytes() == before
    with pytest.raises(UserError, match=r"expected a file name ending in \.parquet"):
        score(out.with_suffix(".csv"), captions)


def test_an_unwritable_folder_is_one_line(captions: Path, tmp_path: Path) -> None:
    scorer = StubScorer()
    for out in (captions / "scores.parquet", Path("/proc/scores.parquet")):
        with pytest.raises(UserError, match="cannot be written"):
            score(out, captions, scorer=scorer)
    assert scorer.calls == []


def test_a_full_disk_is_one_line_and_keeps_complete_parts(captions: Path, out: Path) -> None:
    lines = captions.read_text().splitlines()
    lines.append(json.dumps({"caption": "".join(map(chr, range(0x4E00, 0x8E00)))}))  # hard to compress
    captions.write_text("\n".join(lines))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written") as caught:
            score(out, captions)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    scorer = StubScorer()
    score(out, captions, scorer=scorer)
    assert sum(map(len, scorer.calls)) == 51 - 6 * SIZES.part
    assert len(rows(out)) == 51


def test_a_second_process_is_refused(captions: Path, out: Path) -> None:
    class Second(StubScorer):
        def score_many(self, descriptions):
            with pytest.raises(UserError, match="is scoring here"):
                score(out, captions)
            return super().score_many(descriptions)

    assert score(out, captions, scorer=Second(), sizes=CallSizes(64, 64)).scored == 50


def test_a_scorer_that_cannot_work_leaves_nothing(captions: Path, out: Path) -> None:
    class Missing(StubScorer):
        def score_many(self, descriptions):
            raise UserError("the endpoint is missing")

    with pytest.raises(UserError, match="the endpoint is missing"):
        score(out, captions, scorer=Missing())
    assert list(out.parent.iterdir()) == []


def test_a_scorer_that_stops_working_names_what_is_kept(captions: Path, out: Path) -> None:
    class Unplugged(StubScorer):
        def score_many(self, descriptions):
            if len(self.calls) == 7:
                raise UserError("no answer")
            return super().score_many(descriptions)

    with pytest.raises(UserError, match="no answer; what was scored before is kept"):
        score(out, captions, scorer=Unplugged())
    assert score(out, captions).scored == 50 - 2 * SIZES.part


def test_memory_does_not_grow_with_the_set(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_RECENT", 64)
    monkeypatch.setattr(run, "_ROWS_PER_GROUP", 64)

    class Forgetful(StubScorer):
        def score_many(self, descriptions):
            self.calls.clear()
            return super().score_many(descriptions)

    def peak(samples: int) -> int:
        path = tmp_path / f"{samples}.txt"
        path.write_text("".join(f"a caption of number {i}\n" for i in range(samples)))
        tracemalloc.start()
        try:
            sizes = CallSizes(part=64, call=64)
            score(out.with_name(f"{samples}.parquet"), path, scorer=Forgetful(), sizes=sizes)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(64)  # imports
    few, many = 400, 2000
    growth = -peak(few) + peak(many)
    assert growth < 64 * (many - few)  # hashes of keys; a caption or a row is longer


def test_empty_inputs_are_named(captions: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    result = score(out, tmp_path / "empty.txt", captions, tmp_path / "blank.jsonl")
    empty = f"{tmp_path}/empty.txt: the file is empty"
    assert result.problems == [empty, "blank.jsonl: contains no captions"]
    assert result.scored == 50
    with pytest.raises(UserError, match=r"nothing to score: blank\.jsonl: contains no captions"):
        score(out.with_name("other.parquet"), tmp_path / "blank.jsonl")
    with pytest.raises(UserError, match=r"empty\.txt: the file is empty"):
        open_inputs([str(tmp_path / "empty.txt")])
    assert [path.name for path in out.parent.iterdir()] == ["scores.parquet"]


def test_the_scores_of_an_archive_are_its_sidecar(tmp_path: Path) -> None:
    from cat_fast.data.streams.formats.config import StreamConfig
    from cat_fast.data.streams.formats.problems import ProblemLog
    from cat_fast.data.streams.formats.remote import Remote
    from cat_fast.data.streams.formats.tar import TarShards

    archive = tmp_path / "pax_global.tar"
    archive.write_bytes((ROOT / "tests/cases/pax_global.tar").read_bytes())
    sidecar = tmp_path / "pax_global.scores.parquet"
    score(sidecar, archive)
    problems = ProblemLog()
    (labels,) = [TarShards([str(archive)], Remote(StreamConfig(), problems), problems).labels(0)]
    assert labels
    assert [(label.score, label.ratio) for label in labels] == [
        (row["score"], row["ratio"]) for row in rows(sidecar)
    ]
    assert score(sidecar, archive).scored == 0  # its captions are those of the archive


def _interrupt_after(samples: int):
    done = 0

    def on_progress(scored: int, kept: int) -> None:
        nonlocal done
        done += scored + kept
        if done >= samples:
            raise KeyboardInterrupt

    return on_progress
