"""Rows of published claims: published, counted, measured, and the reason of a difference."""

import json
from dataclasses import dataclass

from benchmarks.shared.committed import committed
from cat_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A figure of a committed result."""

    value: float
    file: str
    key: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One claim."""

    claim: str
    unit: str
    published: float | str
    counted: float
    measured: Measured | None = None
    explanation: str = ""
    """Reason of the difference; empty if there is none."""


def measured(model: str, key: str) -> Measured:
    """Return a figure of the newest committed result of a benchmark.

    Raises:
        UserError: there is no such result or figure.
    """
    path = committed(model)
    content = json.loads(path.read_text(encoding="utf-8"))
    if key not in content:
        raise UserError(f"{path.name} has no figure {key}")
    return Measured(value=content[key], file=path.name, key=key)
