"""The tables of docs/kernels.md say what the committed results say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernel_tables_are_made_from_the_results():
    script = load("kernel_tables")
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.filled(text) == text


def test_the_tokenizers_table_is_what_the_models_count():
    script = load("model_tables")
    assert script.table() in script.DOCUMENT.read_text(encoding="utf-8")
