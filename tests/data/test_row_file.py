"""Rows that survive a killed run."""

import pytest

from cat_fast.data.row_file import RowFile
from cat_fast.errors import UserError


def test_a_cut_row_is_dropped_and_not_continued(tmp_path):
    rows = RowFile(tmp_path / "new" / "rows.jsonl")
    assert rows.read() == []
    rows.append({"a": "\u2028\xe9"})
    rows.append({"a": 2})
    whole = rows.path.read_bytes()
    for cut in range(len(whole)):
        rows.path.write_bytes(whole[:cut])
        kept = rows.read()
        assert kept == [{"a": "\u2028\xe9"}, {"a": 2}][: whole[:cut].count(b"\n")]
        rows.append({"a": 3})
        assert rows.read() == [*kept, {"a": 3}]


def test_unusable_files_are_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n{\n")
    with pytest.raises(UserError, match=r"rows\.jsonl: not valid JSON lines"):
        RowFile(tmp_path / "rows.jsonl").read()
    with pytest.raises(UserError, match="cannot be read"):
        RowFile(tmp_path).read()
    with pytest.raises(UserError, match="cannot be written"):
        RowFile(tmp_path / "rows.jsonl" / "x").append({})
