"""Compact JSON of results."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shared.compact_json import WIDTH, to_text, write_compact

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_the_text_is_the_same_value(value):
    assert json.loads(to_text(value)) == value


def test_what_fits_is_on_one_line(tmp_path):
    rows = [{"case": number, "seconds": [0.1] * 10} for number in range(5)]
    long = list(range(WIDTH))
    write_compact(tmp_path / "a.json", {"rows": rows, "long": long, "by number": {1: 2}})
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert lines[:3] == ["{", ' "rows": [', f"  {json.dumps(rows[0])},"]
    assert lines[-2:] == [' "by number": {"1": 2}', "}"]
    assert len(lines) == 1 + 7 + (len(long) + 2) + 1 + 1


def test_an_infinite_value_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_compact(tmp_path / "a.json", {"seconds": float("inf")})
    assert list(tmp_path.iterdir()) == []
