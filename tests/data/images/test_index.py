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
    ["Eine Straße", "東京 🗼", "two\nlines", 'a "quoted" one', "a\u2028separator, \x85 and \x1c in it", ""],
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
        (without("path"), "the field path is missing"),
        (json.dumps(asdict(RECORD) | {"key": [7]}), "key: expected text, got [7]"),
        (json.dumps(asdict(RECORD) | {"score": "5"}), "score: expected an integer from 1 to 9, got '5'"),
        (json.dumps(asdict(RECORD) | {"ratio": [8]}), "ratio: expected an integer, got [8]"),
        (json.dumps(asdict(RECORD) | {"has_text": "false"}), "has_text: expected true or false, got 'false'"),
        (json.dumps(asdict(RECORD) | {"has_faces": 1}), "has_faces: expected true or false, got 1"),
        (json.dumps(asdict(RECORD) | {"caption": {"en": "a"}}), "caption: expected text"),
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


def test_only_a_path_is_needed_and_other_fields_are_ignored(tmp_path):
    path = tmp_path / "index.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"path": "a.jpg", "width": 9}\r\n\n  \n{"key": 7, "path": "b.jpg", "score": 5.63}'
    )
    reported = []
    records = read_index(path, lambda *report: reported.append(report))
    unset = {"caption": "", "has_text": None, "has_faces": None, "score": None, "ratio": None}
    assert records == [
        ImageRecord(key="a.jpg", path=str(tmp_path / "a.jpg"), **unset),
        ImageRecord(key="7", path=str(tmp_path / "b.jpg"), **unset),
    ]
    assert reported == [
        (f"image index {path}, line 4: score", "expected an integer from 1 to 9, got 5.63"),
    ]


def test_names_with_invalid_unicode_make_the_round_trip(tmp_path):
    records = [replace(RECORD, key="caf\udce9", path="/images/caf\udce9.jpg")]
    write_index(tmp_path / "index.jsonl", records)
    assert read_index(tmp_path / "index.jsonl") == records


def test_a_missing_or_binary_index_is_rejected(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_index(tmp_path / "index.jsonl")
    (tmp_path / "index.jsonl").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match="line 1: not UTF-8 text"):
        read_index(tmp_path / "index.jsonl")
    for content in (
        '{"path": "a.png"}\n'.encode("utf-16"),
        b"a.png\0\0\0ustar",
        b'\x04"M\x18d@\xa7\0x\n\n\n',
    ):
        (tmp_path / "index.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="expected JSON lines in UTF-8, got another kind of file"):
            read_index(tmp_path / "index.jsonl")
