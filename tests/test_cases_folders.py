"""The rows of tests/cases/README.md about file modes, started folders and the console."""

import io
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from cat_fast.cli.main import app
from tests.cli.conftest import assert_one_line_error, tiny_tokenizer
from tests.cli.conftest import cat_fast as cat_fast

CASES = Path(__file__).parent / "cases"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def cases(tmp_path):
    """Copy of the cases, since some tests change them."""
    return Path(shutil.copytree(CASES, tmp_path / "cases"))


def run(monkeypatch, stream, *args):
    """Run a command with another standard output; return exit code and standard error."""
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", errors)
    with pytest.raises(SystemExit) as ended:
        app([str(arg) for arg in args], prog_name="cat-fast")
    stream.close()  # flushes, as Python does at exit
    return ended.value.code, errors.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_lone_surrogate_is_printed_with_replacements(monkeypatch, encoding):
    raw = io.BytesIO()
    raw.close = lambda: None
    code, errors = run(
        monkeypatch,
        io.TextIOWrapper(raw, encoding=encoding),
        *("score", "--file", CASES / "lone_surrogate_caption.jsonl"),
    )
    assert (code, errors) == (0, "")
    assert b"caption" in raw.getvalue()


@pytest.mark.parametrize("kind", ["score", "encode"])
def test_a_full_output_is_one_line_and_the_exit_code_is_that_of_the_work(
    monkeypatch, tokenizer, tmp_path, kind
):
    args = ["score", "--file", CASES / "lone_surrogate_caption.jsonl"]
    if kind == "encode":
        args = [
            "encode",
            CASES / "p0.jpg",
            tmp_path / "none.jpg",
            "-c",
            tokenizer,
            "--size",
            64,
            "--ratio",
            16,
        ]
        args += ["-o", tmp_path / "x.safetensors"]
    code, errors = run(monkeypatch, open("/dev/full", "w"), *args)  # noqa: SIM115
    assert code == (0 if kind == "score" else 1)
    assert errors.count("standard output cannot be written (No space left on device)") == 1
    assert (tmp_path / "x.safetensors").exists() == (kind == "encode")


def test_a_latent_file_follows_the_umask(cat_fast, tokenizer, tmp_path):
    before = os.umask(0o022)
    try:
        out = tmp_path / "x.safetensors"
        command = ["encode", CASES / "p0.jpg", "-c", tokenizer, "-o", out, "--size", 64, "--ratio", 16]
        assert cat_fast(*command).exit_code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o644


def test_a_changed_ratio_of_the_same_length_is_refused(cat_fast, tokenizer, cases, tmp_path):
    command = ["encode-shards", cases / "stale.jsonl", "-c", tokenizer, "-o", tmp_path / "out", "--size", 64]
    assert cat_fast(*command).exit_code == 0
    shutil.copy(cases / "stale_b.jsonl", cases / "stale.jsonl")
    assert_one_line_error(cat_fast(*command), "started with other images", "restore them")


def test_a_sidecar_added_to_an_archive_is_refused(cat_fast, tokenizer, cases, tmp_path):
    archive = cases / "dot_slash.tar"
    sidecar = cases / "dot_slash.scores.jsonl"
    rows = sidecar.read_text()
    sidecar.unlink()
    command = ["encode-shards", archive, "-c", tokenizer, "-o", tmp_path / "out", "--size", 64]
    assert cat_fast(*command).exit_code == 0
    keys = [s[0] for s in json.loads((tmp_path / "out/shard-000000-0000.json").read_text())["samples"]]
    sidecar.write_text(rows.replace("000000", keys[0]) if keys[0] not in rows else rows)
    assert_one_line_error(cat_fast(*command), "started with other images", "its labels differ")


def test_a_changed_middle_row_is_refused(cat_fast, cases, tmp_path):
    out = tmp_path / "out"
    assert cat_fast("shard", cases / "plain.jsonl", "--out", out).exit_code == 0
    shutil.copy(cases / "plain2.jsonl", cases / "plain.jsonl")
    assert_one_line_error(cat_fast("shard", cases / "plain.jsonl", "--out", out), "started with other images")


def test_an_index_by_another_path_resumes(cat_fast, cases, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert cat_fast("shard", cases / "plain.jsonl", "--out", out).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    for folder, name in (
        (cases, "plain.jsonl"),
        (tmp_path, "cases/plain.jsonl"),
        (out, "../cases/plain.jsonl"),
    ):
        monkeypatch.chdir(folder)
        assert cat_fast("shard", name, "--out", out).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_missing_images_are_reported_by_the_second_run_too(cat_fast, cases, tmp_path):
    for _ in range(2):
        result = cat_fast("shard", cases / "missing_file.jsonl", "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert "2 images in 1 shards" in result.stdout
        assert result.stderr.count("skipped: ") >= 1
