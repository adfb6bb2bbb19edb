"""The image index: round trips, and errors with line numbers."""

import json
from dataclasses import asdict, replace

import pytest

from cat_fast.data.images.index import ImageRecord, read_index, write_index
from cat_fast.data.ratio_origin import ScoredBy
from cat_fast.errors import UserError

RECORD = ImageRecord(
    key="a", path="/images/a.jpg", caption="A plane", has_text=False, has_faces=True, score=2, ratio=32
)


@pytest.mark.parametrize(
    "caption",
    ["Eine Straße", "東京 🗼", "two\nlines", 'a "quoted" one', "a\u2028separator, \x85 and \x1c", "", " "],
)
def test_records_make_the_round_trip(tmp_path, caption):
    by = ScoredBy("embedded", "01", (2, 6))
    records = [
        replace(RECORD, caption=caption),
        replace(RECORD, key="b", ratio=8, category="text", scored_by=by),
    ]
    write_index(tmp_path / "index.jsonl", records)
    assert read_index(tmp_path / "index.jsonl") == records


def test_an_index_may_be_empty(tmp_path):
    write_index(tmp_path / "index.jsonl", [])
    assert read_index(tmp_path / "index.jsonl") == []


def test_the_file_is_one_line_of_readable_json_per_image(tmp_path):
    write_index(tmp_path / "index.jsonl", [replace(RECORD, caption="Straße")] * 2)
    lines = (tmp_path / "index.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert "Straße" in lines[0]
    assert json.loads(lines[0])["ratio"] == 32


def test_paths_are_relative_to_the_index(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    write_index(folder / "index.jsonl", [replace(RECORD, path="images/a.jpg"), RECORD])
    paths = [r.path for r in read_index(folder / "index.jsonl")]
    assert paths == [str(folder / "images" / "a.jpg"), "/images/a.jpg"]


def without(name: str) -> str:
    return json.dumps({k: v for k, v in asdict(RECORD).items() if k != name})


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"key": "b", ', "line 3"),
        ("[1, 2]", "line 3"),
        ("", "line 3"),
        (without("ratio"), "ratio"),
        (json.dumps(asdict(RECORD) | {"colour": "red"}), "colour"),
        (json.dumps(asdict(RECORD) | {"key": 7}), "expected a string, got 7"),
        (json.dumps(asdict(RECORD) | {"scored_by": {"scorer": "x"}}), "scored_by"),
        (json.dumps(asdict(RECORD) | {"path": None}), "expected a string, got None"),
        (json.dumps(asdict(RECORD) | {"score": float("inf")}), "expected an integer, got inf"),
        (json.dumps(asdict(RECORD) | {"ratio": [8]}), "expected an integer, got [8]"),
    ],
)
def test_an_invalid_line_is_reported_with_its_number(tmp_path, line, word):
    path = tmp_path / "index.jsonl"
    good = json.dumps(asdict(RECORD))
    path.write_text("\n".join([good, good, line, good]) + "\n")
    with pytest.raises(UserError, match="line 3") as caught:
        read_index(path)
    assert str(path) in str(caught.value)
    assert word in str(caught.value)


def test_a_missing_or_binary_index_is_rejected(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_index(tmp_path / "index.jsonl")
    (tmp_path / "index.jsonl").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match="got binary data"):
        read_index(tmp_path / "index.jsonl")
