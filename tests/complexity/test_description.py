"""Descriptions and caption files: valid content is read, invalid content is rejected with a clear message."""

import json
from pathlib import Path

import pytest

from cat_fast.complexity import Description, read_descriptions
from cat_fast.errors import UserError


@pytest.mark.parametrize("caption", ["", "  \n", None, 7])
def test_description_requires_a_caption(caption: object) -> None:
    with pytest.raises(UserError, match="non-empty text"):
        Description(caption)  # type: ignore[arg-type]


def test_lone_surrogates_of_a_caption_are_replaced() -> None:
    assert Description("nice \ud83d").caption == "nice \ufffd"
    assert Description("Straße 🗼").caption == "Straße 🗼"


def test_flags_must_be_bools() -> None:
    with pytest.raises(UserError, match="has_faces must be true, false or null"):
        Description("a cat", has_faces="no")  # type: ignore[arg-type]


def test_label_is_worded_as_in_class_conditional_generation() -> None:
    described = Description.from_label(" golden retriever ", has_faces=True)
    assert described == Description("this is an image of golden retriever", has_faces=True)
    with pytest.raises(UserError, match="golden retriever"):
        Description.from_label(" ")


def test_text_file_has_one_caption_per_line(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("\ufeffa café, seen from across the street\n\n  a dog \n", encoding="utf-8")
    assert read_descriptions(file, has_text=True) == [
        Description("a café, seen from across the street", has_text=True),
        Description("a dog", has_text=True),
    ]


def test_row_overrides_the_default_flags(tmp_path: Path) -> None:
    file = tmp_path / "captions.jsonl"
    rows = [{"caption": "one\u2028line"}, {"caption": "b", "has_text": False}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_descriptions(file, has_text=True) == [
        Description("one\u2028line", has_text=True),
        Description("b", has_text=False),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"caption": "a"}\n{"caption": }', "line 2: not valid JSON"),
        ("a.jsonl", b'["a"]', "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": "a"}', "line 1: a caption must be non-empty"),
        ("a.jsonl", b'{"caption": "a", "has_text": "yes"}', "line 1: has_text: expected true or false"),
        ("a.txt", b"\n \n", "no captions"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.csv", b"a", r"\.jsonl or \.txt"),
    ],
)
def test_invalid_file_is_rejected_with_location_and_reason(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_descriptions(tmp_path / name)


def test_missing_file_or_folder_is_rejected(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path / "folder.jsonl"):
        (tmp_path / "folder.jsonl").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="cannot be read"):
            read_descriptions(path)
