"""Comparison of figures with `benchmarks/expected.json`, which holds a tolerance for each kind."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_fast.data.files import write_json
from cat_fast.errors import UserError

FILE = Path(__file__).parents[1] / "expected.json"
LOSS, IMPROVEMENT, NEW, GONE, SAME = "loss", "improvement", "new", "gone", "same"
FAILURES = (LOSS, GONE, NEW)
"""Verdicts that fail the gate."""
UPDATE = "python -m benchmarks.quick --update"
OF_TESTS = ("collectives",)
"""Kinds of figures that tests compare, and `benchmarks.quick` does not count."""


@dataclass(frozen=True)
class Finding:
    """One figure next to its expectation."""

    name: str
    found: float | None
    """None if it is no longer counted."""
    expected: float | None
    """None if it is new."""
    tolerance: float
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """One of LOSS, IMPROVEMENT, NEW, GONE and SAME."""
        if self.expected is None:
            return NEW
        if self.found is None:
            return GONE
        sign = -1 if self.higher_is_better else 1
        change = sign * (self.found - self.expected)
        limit = self.tolerance * abs(self.expected)
        if change > limit:
            return LOSS
        return IMPROVEMENT if change < -limit else SAME

    def line(self) -> str:
        """Format the finding as text."""
        if self.expected is None:
            return f"new          {self.name}: {self.found:,.10g}; record it with {UPDATE}"
        if self.found is None:
            return f"gone         {self.name}: no longer counted, expected {self.expected:,.10g}"
        text = f"{self.verdict:<12} {self.name}: {self.found:,.10g}, expected {self.expected:,.10g}"
        return f"{text} within {self.tolerance:.1%}" if self.tolerance else text


def read(path: Path = FILE) -> dict[str, Any]:
    """Read the expectations.

    Raises:
        UserError: the file is missing or not valid.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(content[key], dict) for key in ("kinds", "figures", "compilers")):
            raise KeyError("kinds, figures and compilers")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; write it with {UPDATE}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a file written by {UPDATE} ({error})") from error
    return content


def compare(
    found: Mapping[str, float], content: Mapping[str, Any], *, complete: bool = False
) -> list[Finding]:
    """Return a finding per figure.

    Args:
        found: the figures, by name.
        content: the expectations.
        complete: True if all figures were counted: expected ones that are not found are then gone.

    Raises:
        UserError: the kind of a figure has no tolerance.
    """
    expected = content["figures"]
    gone = [name for name in expected if name not in found and _kind(name) not in OF_TESTS]
    return [
        *(_finding(name, value, expected.get(name), content) for name, value in found.items()),
        *(_finding(name, None, expected[name], content) for name in (gone if complete else ())),
    ]


def compare_kernels(
    rows: Iterable[Mapping[str, Any]], compiler: str, content: Mapping[str, Any]
) -> list[Finding]:
    """Return findings on registers and spills of compiled kernels, none for a compiler that is not listed.

    A kernel is gone if its case was compiled for its architecture without it, or no longer exists.
    """
    rows = list(rows)
    expected = content["compilers"].get(compiler)
    if expected is None:
        return []
    findings = []
    found = kernel_figures(rows)
    compiled = {f"{row['case']}:sm_{row['architecture']}" for row in rows}
    cases = {row["case"] for row in rows}
    for key, (registers, _) in expected.items():
        case, _, architecture = key.split(":")
        if key not in found and (f"{case}:{architecture}" in compiled or case not in cases):
            findings.append(_finding(f"registers.{key}", None, registers, content))
    for key, counts in found.items():
        known = expected.get(key, (None, None))
        for kind, value, before in zip(("registers", "spill_bytes"), counts, known, strict=True):
            findings.append(_finding(f"{kind}.{key}", value, before, content))
    return findings


def kernel_figures(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the most registers and spilled bytes of each kernel, by case, name and architecture."""
    found: dict[str, list[int]] = {}
    for row in rows:
        key = f"{row['case']}:{row['name']}:sm_{row['architecture']}"
        counts = [row["registers"], row["spill_bytes"]]
        found[key] = [max(pair) for pair in zip(found.get(key, (0, 0)), counts, strict=True)]
    return found


def update(
    content: dict[str, Any], figures: Mapping[str, float], *, complete: bool = False, path: Path = FILE
) -> None:
    """Write the expectations with new figures; the others stay unless all were counted."""
    stay = {k: v for k, v in content["figures"].items() if not complete or _kind(k) in OF_TESTS}
    merged = {**stay, **figures}
    write_json(path, {**content, "figures": dict(sorted(merged.items()))})


def _kind(name: str) -> str:
    return name.split(".")[0]


def _finding(name: str, value: float | None, expected: float | None, content: Mapping[str, Any]) -> Finding:
    kind = _kind(name)
    if kind not in content["kinds"]:
        raise UserError(f"{name}: expected.json has no tolerance for {kind}; add it to `kinds`")
    settings = content["kinds"][kind]
    return Finding(name, value, expected, settings["tolerance"], settings.get("higher_is_better", False))
