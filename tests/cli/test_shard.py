"""`cat-fast shard`: from an image index to archives for training."""

import json

import pytest

from cat_fast.complexity.ratios.image_ratios import load_index
from cat_fast.data.images.index import ImageRecord, write_index
from tests.cli.conftest import assert_one_line_error


def test_photographs_are_packed_once(cat_fast, tmp_path):
    out = tmp_path / "shards"
    result = cat_fast("shard", "photographs", "--out", out, "--per-shard", 16)
    assert result.exit_code == 0, result.output
    records = load_index("photographs")
    assert f"{len(records)} images in 3 shards" in result.stdout
    assert f"data.shards={out}" in result.stdout
    rows = [
        json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()
    ]
    assert {row["key"] for row in rows} == {record.key.replace(".", "_") for record in records}
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert cat_fast("shard", "photographs", "--out", out, "--per-shard", 16).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written


def test_missing_images_are_reported_and_set_the_exit_code(cat_fast, tmp_path, photos):
    flags = {"caption": "a", "has_text": False, "has_faces": False, "score": 5, "ratio": 16}
    names = [*(p.name for p in sorted(photos.iterdir())), *(f"gone{n}.jpg" for n in range(12))]
    write_index(
        photos / "index.jsonl", [ImageRecord(key=f"k{n}", path=name, **flags) for n, name in enumerate(names)]
    )
    for _ in range(2):  # a complete folder reports them again
        result = cat_fast("shard", photos / "index.jsonl", "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert "3 images in 1 shards" in result.stdout
        assert result.stderr.count("skipped: ") == 11
        assert "skipped: 2 more" in result.stderr


@pytest.mark.parametrize("content", [None, ""])
def test_missing_or_empty_index_is_rejected_on_one_line(cat_fast, tmp_path, content):
    index = tmp_path / "index.jsonl"
    if content is not None:
        index.write_text(content)
    assert_one_line_error(cat_fast("shard", index, "--out", tmp_path / "out"), "ind")


@pytest.mark.parametrize(("option", "value"), [("--seed", -1), ("--per-shard", 0)])
def test_invalid_settings_leave_no_folder(cat_fast, tmp_path, option, value):
    index, out = tmp_path / "index.jsonl", tmp_path / "out"
    index.write_text('{"path": "a.png"}\n')
    assert_one_line_error(cat_fast("shard", index, "--out", out, option, value), "expected at least")
    assert not out.exists()
