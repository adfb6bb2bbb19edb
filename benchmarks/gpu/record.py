"""Results of `gpu_check`: appended to results.jsonl as they are measured, then gathered into one JSON.

Only the standard library is imported, so that results can be gathered whatever is installed.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
PASSED, FAILED, SKIPPED, TIMEOUT, NOT_REACHED = "passed", "failed", "skipped", "timeout", "not reached"
STATES = (PASSED, FAILED, SKIPPED, TIMEOUT, NOT_REACHED)


@dataclass(frozen=True)
class Recorder:
    """Appends the figures of one block to a file; a killed process loses only the figure it measures."""

    path: Path
    block: str
    dry: bool

    def figure(self, name: str, value: float | None, unit: str, **details: Any) -> None:
        """Append a figure; `details` are JSON values such as the backend that ran."""
        self._append({"kind": "figure", "name": name, "value": value, "unit": unit, **details})

    def skipped(self, name: str, reason: str) -> None:
        """Append the reason for which a figure is missing."""
        self._append({"kind": "skipped", "name": name, "reason": reason})

    def state(self, state: str, seconds: float, reason: str | None = None) -> None:
        """Append the end of the block."""
        self._append({"kind": "state", "state": state, "seconds": round(seconds, 2), "reason": reason})

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps({"block": self.block, "dry": self.dry, **entry}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)  # one write, so that lines of several processes do not mix
            file.flush()
            os.fsync(file.fileno())


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file of results; a line that was cut by a kill is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def gather(entries: Iterable[Mapping[str, Any]], expected: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """Return figures and states by block. Later entries replace earlier ones of the same name.

    Args:
        expected: names of the figures of each block; every one of them is in the result, with a value or a
            reason.
    """
    states: dict[str, dict[str, Any]] = {}
    figures: dict[str, dict[str, dict[str, Any]]] = {block: {} for block in expected}
    for entry in entries:
        block = entry["block"]
        if entry["kind"] == "state":
            states[block] = {name: entry[name] for name in ("state", "seconds", "reason")}
        else:
            kept = {key: value for key, value in entry.items() if key not in ("block", "kind", "name", "dry")}
            figures.setdefault(block, {})[entry["name"]] = {"value": None} | kept
    blocks = {}
    for block, names in expected.items():
        found = figures[block]
        state = states.get(block, {"state": NOT_REACHED, "seconds": 0.0, "reason": "it was not started"})
        missing = {"value": None, "reason": f"the block {state['state']}: {state['reason']}"}
        blocks[block] = state | {"figures": {**dict.fromkeys(names, missing), **found}}
    return blocks


def require_measured(content: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Return the content of a check's JSON.

    Raises:
        ValueError: its figures are those of a dry run, which are not measurements.
    """
    if content.get("dry", True):
        raise ValueError(f"{source}: figures of a dry run are not measurements; run the check on a GPU")
    return content
