"""Selection of images from an index, and one line per image and ratio."""

import json

import pytest

from cat_fast.data.images.index import ImageRecord, read_index, write_index
from cat_fast.data.images.selection import parse_ratios, parse_repeats, select_records
from cat_fast.errors import UserError


def record(key: str, caption: str = "", path: str = "a.png") -> ImageRecord:
    return ImageRecord(
        key=key, path=path, caption=caption, has_text=None, has_faces=None, score=3, ratio=32, category="c"
    )


RECORDS = [record("emoji/1f34e", "red apple, emoji"), record("emoji/1f44d-1f3fb"), record("stamps/cat")]


def test_keys_are_kept_and_dropped_by_pattern():
    found = select_records(RECORDS, keep=["emoji/*"], drop=["*1f3f[b-f]*"])
    assert found == RECORDS[:1]
    assert select_records(RECORDS) == RECORDS
    with pytest.raises(UserError, match=r"no key matches --keep flags/\*.* such as 'emoji/1f34e'"):
        select_records(RECORDS, keep=["flags/*"])


def test_a_line_per_ratio_and_every_other_caption_without_its_ending():
    found = select_records(
        RECORDS[:1], ratios=parse_ratios("8,16,16,32"), optional_ending=", emoji", keep_classes=False
    )
    assert [(r.key, r.ratio, r.caption) for r in found] == [
        ("emoji/1f34e@8x", 8, "red apple, emoji"),
        ("emoji/1f34e@16x", 16, "red apple"),
        ("emoji/1f34e@16x.2", 16, "red apple, emoji"),
        ("emoji/1f34e@32x", 32, "red apple"),
    ]
    assert {(r.score, r.category) for r in found} == {(None, "")}
    for text in ("8,x", "", "0"):
        with pytest.raises(UserError, match="expected positive integers"):
            parse_ratios(text)


def test_images_are_repeated_by_pattern_and_the_first_match_counts():
    repeats = parse_repeats(["emoji/1f34e=3", "emoji/*=2"])
    found = select_records(RECORDS, repeats=repeats)
    assert [r.key for r in found] == [
        "emoji/1f34e",
        "emoji/1f34e.2",
        "emoji/1f34e.3",
        "emoji/1f44d-1f3fb",
        "emoji/1f44d-1f3fb.2",
        "stamps/cat",
    ]
    assert {r.caption for r in found[:3]} == {"red apple, emoji"}
    with pytest.raises(UserError, match=r"none of the 3 selected keys matches 'flags/\*'"):
        select_records(RECORDS, repeats={"flags/*": 2})
    for text in ("emoji/*", "=2", "emoji/*=0", "emoji/*=x"):
        with pytest.raises(UserError, match="expected PATTERN=N"):
            parse_repeats([text])


def test_the_index_is_written_with_paths_from_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_text(
        json.dumps({"path": "images/a.png", "caption": "a"}) + "\n"
    )
    (found,) = read_index("corpus/train.jsonl")
    write_index("runs/part.jsonl", [found], relative=True)
    assert json.loads((tmp_path / "runs" / "part.jsonl").read_text())["path"] == "../corpus/images/a.png"
    (again,) = read_index("runs/part.jsonl")
    assert (tmp_path / again.path).resolve() == (tmp_path / "corpus" / "images" / "a.png").resolve()
