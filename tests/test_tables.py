"""The tables of the documents say what the committed results say."""

import importlib
from pathlib import Path

import pytest

KINDS = (
    "complexity",
    "dual",
    "efficiency",
    "evaluation",
    "generator",
    "image",
    "kernel",
    "model",
    "ratio",
    "scorer",
)
SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("name", [f"{kind}_tables" for kind in KINDS])
def test_tables_are_made_from_the_results(name, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module(name)
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.filled(text) == text
