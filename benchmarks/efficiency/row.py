"""Rows of published claims: published, counted, estimated, measured, and the reason of a difference."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared import committed
from cat_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A figure of a result."""

    value: float
    file: str
    key: str
    unit: str = ""
    """That of the claim if empty."""
    of: str = ""
    """Work that was measured, where it is not that of the claim."""
    expected: float | None = None
    """Figure counted for the measured work."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One claim."""

    claim: str
    unit: str
    published: float | str
    counted: float | None = None
    estimated: tuple[float, float] | None = None
    """Lowest and highest value, where the figure depends on more than architecture and mixes."""
    measured: Measured | None = None
    explanation: str = ""
    """Reason of the difference; empty if there is none."""


def counted_cell(row: Mapping[str, Any]) -> str:
    """Format the counted figure of a row, or the range of an estimate."""
    if row["counted"] is not None:
        return f"{row['counted']:.5g}"
    if row["estimated"] is None:
        return ""
    low, high = (f"{value:.3g}" for value in row["estimated"])
    return f"estimate, {low} to {high}"


def measured_cell(found: Mapping[str, Any] | None) -> str:
    """Format a measured figure, with the work that it is of and the figure expected of that work."""
    if found is None:
        return ""
    value = f"{found['value']:.4g}" + (f" {found['unit']}" if found["unit"] else "")
    expected = f"expected {found['expected']:.4g}" if found["expected"] is not None else ""
    notes = "; ".join(filter(None, [found["of"], expected]))
    return f"{value} ({notes})" if notes else value


class Results:
    """Newest results of benchmarks: those of a folder, else the committed ones; rough ones are ignored."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folders = [*([folder] if folder else []), committed.FOLDER]

    def files(self, model: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name and content of a benchmark's newest file of each folder.

        Raises:
            UserError: a file is invalid.
        """
        for folder in self.folders:
            path = committed.newest(folder.glob(f"{model}_*.json")).get(model)
            if path is not None and not committed.is_quick(content := committed.read(path)):
                yield path.name, content

    def read(self, model: str, *keys: str) -> tuple[str, dict[str, Any]]:
        """Return the name and content of the first file of a benchmark that has all of these figures.

        Raises:
            UserError: there is none, or a file is invalid.
        """
        reasons = []
        for name, content in self.files(model):
            try:
                for key in keys:
                    figure(content, key, name)
            except UserError as error:
                reasons.append(str(error))
            else:
                return name, content
        raise UserError("; ".join(reasons) or f"there are only results of --quick of {model}, or none")

    def measured(self, model: str, key: str, **more: Any) -> Measured:
        """Return a figure of a benchmark, at keys separated by slashes; `more` are fields of `Measured`.

        Raises:
            UserError: there is no such result or figure.
        """
        name, value = self.read(model, key)
        return Measured(value=figure(value, key, name), file=name, key=key, **more)


def figure(content: Mapping[str, Any], key: str, name: str) -> Any:
    """Return the value at keys separated by slashes.

    Raises:
        UserError: there is no such key, or it is of a case whose outputs were wrong.
    """
    value: Any = content
    for part in key.split("/"):
        if not isinstance(value, Mapping) or part not in value:
            raise UserError(f"{name} has no figure {key}")
        value = value[part]
        if isinstance(value, Mapping) and value.get("right") is False:
            raise UserError(f"{name} has no valid figure {key}: the outputs of the case were wrong")
    return value
