"""Published tables from tables.json, extended by the results of our evaluations.

A result is a folder with a file of `RESULTS`, and the name of its data set. Its figures are entered under the
published columns of that data set; other data sets, and stand-in metrics such as `proxy-rFID-vgg16`, get
columns of their own, so that nothing incomparable shares a column.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from cat_fast.errors import UserError

RESULTS = {
    "reconstruction.json": "reconstruction",
    "generation.json": "generation",
    "classification.json": "classification",
    "study.json": "complexity",
    "dual.json": "dual",
}
"""Kind of evaluation by the name of its file."""
Value = float | str | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table."""

    name: str
    values: Sequence[Value]
    is_published: bool


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its source."""

    name: str
    title: str
    source: str
    evaluation: str
    """Kind of evaluation that fills it: reconstruction, generation, classification, complexity or dual."""
    columns: Sequence[str]
    rows: Sequence[Row]
    conflicts: Sequence[str]
    """Where the sources contradict each other or their own figures."""
    command: str
    """Command that measures our row."""
    rules: Sequence[str] | None = None
    """Rules of reconstructions that the table compares; None takes all."""

    @property
    def has_ours(self) -> bool:
        return not all(row.is_published for row in self.rows)

    @property
    def has_comparable(self) -> bool:
        """True if a row of ours has a figure in a published column."""
        return any(
            any(row.is_published and row.values[column] is not None for row in self.rows)
            and any(not row.is_published and row.values[column] is not None for row in self.rows)
            for column in range(len(self.columns))
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """A result of ours."""

    dataset: str
    path: Path
    result: Mapping[str, Any]


@cache
def published() -> dict[str, Table]:
    """Return all published tables by name."""
    content = json.loads((files(__package__) / "tables.json").read_text(encoding="utf-8"))
    return {
        name: Table(
            name=name,
            **{
                key: entry[key]
                for key in ("title", "source", "evaluation", "columns", "conflicts", "command")
            },
            rules=entry.get("rules"),
            rows=[Row(name=row["name"], values=row["values"], is_published=True) for row in entry["rows"]],
        )
        for name, entry in content["tables"].items()
    }


def find_table(name: str) -> Table:
    """Return a published table; raise UserError, with all names, if there is none of this name."""
    tables = published()
    if name not in tables:
        raise UserError(f"table {name!r}: expected one of {', '.join(tables)}")
    return tables[name]


def read_run(spec: str) -> list[Run]:
    """Return the results in a folder.

    Args:
        spec: DATASET=DIR, or DIR, whose data set is named after the evaluated folder.

    Raises:
        UserError: the folder contains no result, or one that is not valid JSON.
    """
    dataset, separator, folder = spec.partition("=")
    if not separator or "/" in dataset:
        dataset, folder = "", spec
    path = Path(folder)
    found = []
    for name, kind in RESULTS.items():
        if not (path / name).is_file():
            continue
        try:
            result = json.loads((path / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path / name}: is not valid JSON ({error})") from error
        result = {"evaluation": kind, **result}
        found.append(Run(dataset=dataset or _dataset_of(result), path=path, result=result))
    if not found:
        raise UserError(f"{folder}: contains no result; expected {' or '.join(RESULTS)}, of cat-fast eval")
    return found


def with_runs(table: Table, runs: Sequence[Run]) -> Table:
    """Return a table with a row per column of each result of its kind."""
    columns = list(table.columns)
    ours: dict[str, dict[str, Value]] = {}
    for run in runs:
        if run.result.get("evaluation") != table.evaluation:
            continue
        for name, figures in _figures(run, table).items():
            if not figures:
                continue
            cells = ours.setdefault(f"this project, {name}", {})
            for column, value in figures.items():
                known = {one.lower(): one for one in columns}
                column = known.get(column.lower(), column)
                if column not in columns:
                    columns.append(column)
                cells[column] = value
    width = len(columns)
    rows = [
        Row(
            name=row.name,
            values=[*row.values, *[None] * (width - len(row.values))],
            is_published=True,
        )
        for row in table.rows
    ]
    rows += [
        Row(name=name, values=[cells.get(column) for column in columns], is_published=False)
        for name, cells in ours.items()
    ]
    return Table(**{**vars(table), "columns": columns, "rows": rows})


def _figures(run: Run, table: Table) -> dict[str, dict[str, Value]]:
    """Return the figures of a result for a table, by row and column."""
    if table.evaluation == "reconstruction":
        return {
            name: _reconstruction(run.dataset, column, table)
            for name, column in run.result["columns"].items()
            if table.rules is None or column["rule"] in table.rules
        }
    if table.evaluation == "generation":
        names = ("FID", "sFID", "IS", "precision", "recall")
        prefix = f"{run.dataset} " if table.name == "coco" else ""
        return {
            run.dataset: {
                f"{prefix}{metric}": value
                for metric, value in run.result["metrics"].items()
                if any(name in metric.split("-") for name in names) and not metric.endswith("-std")
            }
        }
    if table.evaluation == "complexity":
        return _complexity(run, table)
    if table.evaluation == "dual":
        return _dual(run, table)
    found: dict[str, dict[str, Value]] = {}
    for row in run.result.get("rows", ()):
        task = run.result["task"]
        name = row["name"] if row["head"] == "flattened" else f"{row['name']}, {row['head']} head"
        found[name] = {f"{run.dataset} {task} %": 100 * row["accuracy"]["value"]}
    return found


def _reconstruction(dataset: str, column: Mapping[str, Any], table: Table) -> dict[str, Value]:
    wanted = {known.split()[-1] for known in table.columns}
    found: dict[str, Value] = {}
    for metric, figure in column["metrics"].items():
        kinds = {"rFID": "rFID" in metric, "LPIPS": "lpips" in metric, "PSNR": metric == "PSNR"}
        kinds["OCR-confidence"] = metric == "OCR-confidence"
        kind = next((name for name, matches in kinds.items() if matches), None)
        if kind in wanted and isinstance(figure, Mapping):
            published_name = metric in ("rFID", "PSNR", "lpips_vgg", "OCR-confidence")
            found[f"{dataset} {kind if published_name else metric}"] = figure["value"]
    if "rate" in wanted:
        for choice, share in column["distribution"].items():
            found[f"{dataset} {choice}x %"] = 100 * share
        found[f"{dataset} latent side"] = column["rms_side"]
        found[f"{dataset} rate"] = column["average_rate"]
    if "GMAC" in wanted and column["flops"] is not None:
        found[f"{dataset} latent side"] = column["rms_side"]
        found[f"{dataset} GMAC"] = column["flops"] / 2e9
    return found


def _complexity(run: Run, table: Table) -> dict[str, dict[str, Value]]:
    """Return the correlation of each metric; the tables of scorers and their cost have other figures."""
    if table.name != "complexity":
        return {}
    return {
        metric: {f"{run.dataset} Pearson r": figures["pearson"]["value"]}
        for metric, figures in run.result["metrics"].items()
    }


def _dual(run: Run, table: Table) -> dict[str, dict[str, Value]]:
    """Return the figures of methods with tokens; the published data set is not stated, so ours are named."""
    if table.name != "dual-reconstruction":
        return {}
    return {
        name: {
            f"{run.dataset} SSIM": figures["ssim"]["value"],
            f"{run.dataset} PSNR": figures["psnr"]["value"],
            "tokens": figures["tokens"],
        }
        for name, figures in run.result["methods"].items()
        if figures["tokens"] and figures["images"]
    }


def _dataset_of(result: Mapping[str, Any]) -> str:
    for key, entry in (("data", "path"), ("reference", "path"), ("settings", "images")):
        if isinstance(result.get(key), Mapping):
            path = Path(str(result[key].get(entry, "")))
            return path.parent.name if path.name in ("val", "train", "test", "validation") else path.stem
    return "unknown data"
