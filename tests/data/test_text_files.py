"""Text from outside: byte order marks, surrogates and JSON that is not an object."""

import gzip

import pytest

from cat_fast.data.text_files import escape_text, parse_object, read_text, text_lines, valid_text
from cat_fast.errors import UserError


def test_a_byte_order_mark_is_not_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfa caf\xc3\xa9\r\n\n \xef\xbb\xbf\nb\xe2\x80\xa8c\n")
    assert list(text_lines(file)) == [(1, "a café"), (4, "b\u2028c")]
    assert read_text(file).startswith("a café")


@pytest.mark.parametrize("content", [b"caf\xe9", "\ufeffa".encode("utf-16-le")])
def test_other_encodings_are_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 text .*; save it as UTF-8"):
        read_text(tmp_path / "a.txt")


def test_gzip(tmp_path):
    path = tmp_path / "captions.jsonl.gz"
    content = gzip.compress("é\nb".encode())
    path.write_bytes(content)
    assert list(text_lines(path)) == [(1, "é"), (2, "b")]
    for damaged in (content[:-9], b"plain", content[:12] + b"\xff" * 20):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"captions\.jsonl\.gz: damaged gzip file"):
            read_text(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_text(path)


@pytest.mark.parametrize("line", [b'{"a": 1}', b'\xef\xbb\xbf{"a": 1}\r\n', ' \ufeff {"a": 1}'])
def test_objects(line):
    assert parse_object(line) == {"a": 1}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"[1]", r"expected a JSON object, got \[1\]"),
        (b"", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_anything_else_is_refused(line, why):
    with pytest.raises(ValueError, match=why):
        parse_object(line)


def test_surrogates():
    assert valid_text("a \ud83d b") == "a \ufffd b"
    assert valid_text("\ud83d\ude00") == "\U0001f600"
    assert escape_text("caf\udce9") == "caf\\udce9"
    assert valid_text("Straße 東京 🗼") == escape_text("Straße 東京 🗼") == "Straße 東京 🗼"
