"""Names of results: MODEL_MACHINE_DATE.json, after the benchmark, where and when it ran."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cat_fast.errors import UserError

FOLDER = Path(__file__).parents[1] / "results"
NAME = re.compile(r"(?P<model>[a-z0-9_]+?)_(?P<machine>[a-z0-9.-]+)_(?P<date>\d{4}-\d{2}-\d{2})\.json")


def committed(model: str, folder: Path = FOLDER) -> Path:
    """Return the newest results of a benchmark, on any machine.

    Raises:
        UserError: there are none.
    """
    found = [path for path in folder.glob(f"{model}_*.json") if _parts(path)["model"] == model]
    if not found:
        raise UserError(f"{folder}: there are no results of {model}; run python -m benchmarks.{model}")
    return max(found, key=lambda path: (_parts(path)["date"], path.name))


def machine_slug(about: Mapping[str, Any]) -> str:
    """Return a short name of a machine that `machine.describe` described: GPUs, or processor and threads."""
    gpus = about.get("gpus") or []
    if gpus:
        first = gpus[0]["name"] if isinstance(gpus[0], Mapping) else gpus[0]
        return f"{len(gpus)}x{_slug(str(first))}" if len(gpus) > 1 else _slug(str(first))
    cpu = about["cpu"]
    return f"{_slug(cpu['processor'])}-{cpu['threads']}t"


def _slug(text: str) -> str:
    text = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b|@.*", "", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _parts(path: Path) -> dict[str, str]:
    match = NAME.fullmatch(path.name)
    return match.groupdict() if match else {"model": "", "date": ""}
