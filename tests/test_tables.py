"""The tables of the documents say what the committed results say."""

import importlib

import pytest

from benchmarks.documents.__main__ import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_made_from_the_results(name):
    module = importlib.import_module(f"benchmarks.documents.{name}")
    text = module.DOCUMENT.read_text(encoding="utf-8")
    assert module.filled(text) == text
