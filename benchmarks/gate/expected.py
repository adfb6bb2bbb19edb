"""Comparison of figures with `benchmarks/expected.json`, which holds a tolerance for each kind."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_fast.data.files import write_json
from cat_fast.errors import UserError

FILE = Path(__file__).parents[1] / "expected.json"
LOSS, IMPROVEMENT, NEW, SAME = "loss", "improvement", "new", "same"
UPDATE = "python -m benchmarks.quick --update"


@dataclass(frozen=True)
class Finding:
    """One figure next to its expectation."""

    name: str
    found: float
    expected: float | None
    tolerance: float
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """One of LOSS, IMPROVEMENT, NEW and SAME."""
        if self.expected is None:
            return NEW
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


def compare(found: Mapping[str, float], content: Mapping[str, Any]) -> list[Finding]:
    """Return a finding per figure.

    Raises:
        UserError: the kind of a figure has no tolerance.
    """
    return [_finding(name, value, content["figures"].get(name), content) for name, value in found.items()]


def compare_kernels(
    rows: Iterable[Mapping[str, Any]], compiler: str, content: Mapping[str, Any]
) -> list[Finding]:
    """Return findings on registers and spills of compiled kernels, none for a compiler that is not listed."""
    expected = content["compilers"].get(compiler)
    if expected is None:
        return []
    findings = []
    for key, counts in kernel_figures(rows).items():
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


def update(content: dict[str, Any], figures: Mapping[str, float], path: Path = FILE) -> None:
    """Write the expectations with new figures; the others stay."""
    merged = {**content["figures"], **figures}
    write_json(path, {**content, "figures": dict(sorted(merged.items()))})


def _finding(name: str, value: float, expected: float | None, content: Mapping[str, Any]) -> Finding:
    kind = name.split(".")[0]
    if kind not in content["kinds"]:
        raise UserError(f"{name}: expected.json has no tolerance for {kind}; add it to `kinds`")
    settings = content["kinds"][kind]
    return Finding(name, value, expected, settings["tolerance"], settings.get("higher_is_better", False))
