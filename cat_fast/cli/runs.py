"""`cat-fast runs`: list training runs with their state and the command to resume them."""

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cat_fast import console
from cat_fast.errors import UserError
from cat_fast.training.health.run_status import RunSummary, find_runs

_STYLES = {"running": "green", "finished": "blue", "preempted": "yellow", "failed": "red", "killed": "red"}


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder to search recursively.")] = Path("runs"),
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List training runs: state, step, loss, last update, newest checkpoint, and the command to resume.

    A run is *running*, *finished*, *preempted* (stopped by a signal, after saving a checkpoint), *failed*
    (with the reason), or *killed* (exited without recording a reason).

    Examples:

        cat-fast runs

        cat-fast runs /scratch/me --json
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; pass the folder that contains the runs")
    found = find_runs(folder)
    if json_output:
        console.print_json([asdict(run) for run in found])
        return
    if not found:
        console.out.print(f"no runs in {folder}", markup=False, soft_wrap=True)
        return
    table = Table("run", "task", "state", "step", "loss", "updated", "checkpoint")
    for run in found:
        table.add_row(
            run.folder,
            run.task,
            Text(run.state, style=_STYLES.get(run.state, "")),
            f"{run.step} of {run.total_steps}" + (f", {run.skipped} skipped" if run.skipped else ""),
            "-" if run.loss is None else f"{run.loss:.4g}",
            f"{timedelta(seconds=round(run.age))} ago",
            Path(run.checkpoint).name or "-",
        )
    console.out.print(table)
    for run in found:
        _print_details(run)


def _print_details(run: RunSummary) -> None:
    if run.reason:
        console.out.print(f"{run.folder} is {run.state}: {run.reason}", markup=False, soft_wrap=True)
    if run.resume:
        console.out.print(f"  resume with: {run.resume}", markup=False, soft_wrap=True)
