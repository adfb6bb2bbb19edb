"""Files of results: MODEL_MACHINE_DATE.json, after the benchmark, where and when it ran."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.shared.harness import QUICK
from cat_fast.errors import UserError

FOLDER = Path(__file__).parents[1] / "results"
NAME = re.compile(r"(?P<model>[a-z0-9_]+?)_(?P<machine>[a-z0-9.-]+)_(?P<date>\d{4}-\d{2}-\d{2})\.json")


def committed(model: str, folder: Path = FOLDER) -> Path:
    """Return the newest results of a benchmark, on any machine.

    Raises:
        UserError: there are none.
    """
    found = newest(folder.glob(f"{model}_*.json")).get(model)
    if found is None:
        raise UserError(f"{folder}: there are no results of {model}; run python -m benchmarks.{model}")
    return found


def newest(files: Iterable[Path]) -> dict[str, Path]:
    """Return the newest results of each benchmark, by the model in their names; other files are ignored."""
    named = [path for path in files if NAME.fullmatch(path.name)]
    ordered = sorted(named, key=lambda path: (_parts(path)["date"], path.name))
    return {_parts(path)["model"]: path for path in ordered}


def read(path: Path) -> dict[str, Any]:
    """Read the results of a benchmark.

    Raises:
        UserError: the file is missing, not a JSON object, or from a dry run.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: it is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    if content.get("dry"):
        raise UserError(f"{path}: figures of a dry run are not measurements; run the check on a GPU")
    return content


def arguments_of(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the arguments of the suite that `benchmarks.run` wrote into results; others have none."""
    return tuple((content.get("about") or {}).get("arguments", ()))


def is_quick(content: Mapping[str, Any]) -> bool:
    """Return True for rough results, those of --quick."""
    about = content.get("about") or {}
    pairs = about.get("effort", {}).get("min_pairs")
    return bool(about.get("quick")) or pairs == QUICK.min_pairs


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
