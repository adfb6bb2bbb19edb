"""Time that data sheets of GPUs allow for every kernel and for training steps of the paper's runs.

    python -m benchmarks.roofline --json FILE [--markdown FILE] [--measured FILE]

No GPU is needed, and without one no figure is a measurement. "Bound" is the time that no implementation can
beat: compulsory bytes at the peak bandwidth, or multiplications at the peak of the matrix units, whichever
takes longer. "Predicted" is the time of our operators one after another at assumed shares of these peaks
(`benchmarks/data/gpus.json`). Launches, synchronization and communication are in neither. `--measured` reads
the JSON of `python -m benchmarks.gpu_check`, and fills in measured times and fractions of the bound: of all
kernels, and of the step `cat_xl.check`. Registers, occupancy and instructions of the compiled kernels come
from the newest committed gpu_static results.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bounds.data_sheets import FILE, Assumptions, DataSheet, read_sheets
from benchmarks.bounds.kernels import MIX, Work, works
from benchmarks.shared.committed import committed
from benchmarks.shared.harness import rounded
from cat_fast import console
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

RANKS = {"dit": 16, "vae": 64}
"""GPUs of the paper's runs."""
PAPER_IMAGES = 8
"""Images per GPU of the tokenizer's run."""
PAPER_TOKENS = 16_384
MEASURED_STEPS = {"cat_xl.check": "cat_xl_compiled.milliseconds"}
"""Figures of `benchmarks.gpu_check` by the step of the same work: one GPU, without ZeRO."""


def steps() -> dict[str, Any]:
    """Count the training steps of the paper's two runs, as `StepWork` by name."""
    from benchmarks.bounds.steps import dit_step, vae_step
    from benchmarks.packing import compose_lengths
    from benchmarks.shared.mixes import MIXES

    mixed = compose_lengths(MIXES["197"], PAPER_TOKENS)
    fixed = {8: [1024] * 16, 16: [256] * 64, 32: [64] * 256}
    found = {"cat_xl.mixed": dit_step("cat_xl.mixed", "cat_xl", mixed, RANKS["dit"])}
    for ratio, lengths in fixed.items():
        name = f"cat_xl.fixed_{ratio}x"
        found[name] = dit_step(name, "cat_xl", lengths, RANKS["dit"])
    found["cat_xl.check"] = dit_step("cat_xl.check", "cat_xl", MIX, 1)
    for ratio in (8, 16, 32):
        name = f"cat_c16.{ratio}x"
        found[name] = vae_step(name, "cat_c16", ratio, PAPER_IMAGES, RANKS["vae"])
    return found


def kernel_row(work: Work, sheets: Mapping[str, DataSheet], assumed: Assumptions) -> dict[str, Any]:
    """Return the work of one kernel and pass, and its times in milliseconds by GPU."""
    return {
        "op": work.op,
        "shape": work.shape,
        "dtype": work.dtype,
        "pass": work.which,
        "compulsory_bytes": work.compulsory,
        "moved_bytes": work.moved,
        "flops": work.flops,
        "executed_flops": work.executed,
        "flops_per_byte": work.intensity,
        "limited_by": {name: _limit(work.intensity, sheet, work.dtype) for name, sheet in sheets.items()},
        "bound_ms": {
            name: 1e3 * sheet.seconds(work.flops, work.compulsory, work.dtype)
            for name, sheet in sheets.items()
        },
        "predicted_ms": {
            name: 1e3
            * sheet.seconds(work.executed, work.moved, work.dtype, assumed.matrix_share, assumed.memory_share)
            for name, sheet in sheets.items()
        },
    }


def step_row(step: Any, sheets: Mapping[str, DataSheet], assumed: Assumptions) -> dict[str, Any]:
    """Return the work of a training step on one rank, and its times in milliseconds by GPU."""

    def predicted(sheet: DataSheet) -> float:
        shares = assumed.matrix_share, assumed.memory_share
        return sum(sheet.seconds(call.flops, call.moved, step.dtype, *shares) for call in step.calls)

    intensity = step.flops / step.compulsory
    return {
        "dtype": step.dtype,
        "images": step.images,
        "tokens": step.tokens,
        "parameters": dict(step.parameters),
        "flops": step.flops,
        "compulsory_bytes": step.compulsory,
        "moved_bytes": step.moved,
        "operators": len(step.calls),
        "by_kind": step.by_kind(),
        "flops_per_byte": intensity,
        "limited_by": {name: _limit(intensity, sheet, step.dtype) for name, sheet in sheets.items()},
        "bound_ms": {
            name: 1e3 * sheet.seconds(step.flops, step.compulsory, step.dtype)
            for name, sheet in sheets.items()
        },
        "predicted_ms": {name: 1e3 * predicted(sheet) for name, sheet in sheets.items()},
    }


def _limit(intensity: float, sheet: DataSheet, dtype: str) -> str:
    return "arithmetic" if intensity > sheet.ridge(dtype) else "memory"


def compiled(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the compiled kernels of gpu_static by operator: registers, occupancy and instructions."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kept = ("case", "name", "architecture", "registers", "spill_bytes", "occupancy", "instructions")
        found.setdefault(row["case"].split(".")[0], []).append({key: row.get(key) for key in kept})
    return found


def add_measured(report: dict[str, Any], content: Mapping[str, Any], source: str) -> None:
    """Add measured milliseconds and the fraction of the bound to the rows of a report, in place.

    Raises:
        UserError: the file is of a dry run, has no GPU with a data sheet, or has no figure of a row.
    """
    if content.get("dry", False):
        raise UserError(f"{source}: figures of a dry run are not measurements; run the check on a GPU")
    gpu = str(content.get("machine", {}).get("gpu", ""))
    name = next((known for known in report["gpus"] if known in gpu), None)
    if name is None:
        known = ", ".join(report["gpus"])
        raise UserError(f"{source}: no data sheet of {gpu or 'its GPU'}; expected one of {known}")
    blocks = content.get("blocks", {})
    figures = {
        figure: values
        for block in ("kernels", "steps")
        for figure, values in blocks.get(block, {}).get("figures", {}).items()
    }
    added = 0
    for row in report["kernels"]:
        figure = figures.get(f"{row['op']}.{row['pass']}.milliseconds", {})
        if figure.get("value") and figure.get("dtype") == row["dtype"]:
            row |= _measured(row, name, figure["value"])
            added += 1
    for key, row in report["steps"].items():
        figure = figures.get(MEASURED_STEPS.get(key, ""), {})
        if figure.get("value"):
            row |= _measured(row, name, figure["value"])
            added += 1
    if not added:
        raise UserError(f"{source}: no figure belongs to a kernel or step of this report")
    report["measured_on"] = gpu


def _measured(row: Mapping[str, Any], name: str, milliseconds: float) -> dict[str, Any]:
    return {"measured_ms": {name: milliseconds}, "of_bound": {name: row["bound_ms"][name] / milliseconds}}


def build() -> dict[str, Any]:
    """Return the complete report without measured figures."""
    sheets, assumed = read_sheets()
    static = json.loads(committed("gpu_static").read_text(encoding="utf-8"))
    return {
        "about": {
            "benchmark": "roofline",
            "measured": "nothing: bounds and predictions from data sheets",
            "data_sheets": FILE.name,
            "assumptions": vars(assumed),
            "gpu_static": committed("gpu_static").name,
        },
        "gpus": {name: vars(sheet) for name, sheet in sheets.items()},
        "kernels": [kernel_row(work, sheets, assumed) for work in works()],
        "compiled": compiled(static["kernels"]),
        "steps": {name: step_row(step, sheets, assumed) for name, step in steps().items()},
    }


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report as Markdown: one table of kernels and one of steps."""
    gpus = list(report["gpus"])
    columns = [f"{gpu} {what}, ms" for gpu in gpus for what in ("bound", "predicted")]
    measured = "measured_on" in report
    columns += ["measured, ms", "of the bound"] if measured else []
    yield from _table(
        ["kernel", "shape", "pass", "FLOPs per byte", *columns],
        [
            [
                f"`{row['op']}` {row['dtype']}",
                row["shape"],
                row["pass"].replace("_", " + "),
                f"{row['flops_per_byte']:.3g}",
                *_times(row, gpus, measured),
            ]
            for row in report["kernels"]
        ],
    )
    yield ""
    yield from _table(
        ["step of one rank", "images", "TFLOPs", "GB unfused", "FLOPs per byte", *columns],
        [
            [
                f"`{name}` {row['dtype']}",
                f"{row['images']}",
                f"{row['flops'] / 1e12:.3g}",
                f"{row['moved_bytes'] / 1e9:.3g}",
                f"{row['flops_per_byte']:.3g}",
                *_times(row, gpus, measured),
            ]
            for name, row in report["steps"].items()
        ],
    )


def compiled_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of the compiled kernels, each at the case with the most registers, for sm_90."""
    worst: dict[tuple[str, str], Mapping[str, Any]] = {}
    for op, rows in report["compiled"].items():
        for row in rows:
            if row["architecture"] != 90:
                continue
            known = worst.setdefault((op, row["name"]), row)
            if row["registers"] > known["registers"]:
                worst[op, row["name"]] = row
    yield from _table(
        ["kernel", "case", "registers", "occupancy", "instructions"],
        [
            [
                f"`{op}` `{name}`",
                row["case"],
                f"{row['registers']}",
                f"{row['occupancy']:.0%}",
                instruction_shares(row["instructions"]),
            ]
            for (op, name), row in worst.items()
        ],
    )


def instruction_shares(counts: Mapping[str, int] | None) -> str:
    """Format the classes of instructions by their shares, the largest first, without those below 1 %."""
    if counts is None:
        return "not counted"
    total = sum(counts.values())
    shares = {kind: count / total for kind, count in counts.items() if count >= 0.01 * total}
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{kind} {share:.0%}" for kind, share in ordered)


def _times(row: Mapping[str, Any], gpus: Sequence[str], measured: bool) -> list[str]:
    cells = [f"{row[what][gpu]:.3g}" for gpu in gpus for what in ("bound_ms", "predicted_ms")]
    if measured:
        times, shares = row.get("measured_ms", {}), row.get("of_bound", {})
        cells += [
            ", ".join(f"{value:.3g}" for value in times.values()),
            ", ".join(f"{value:.0%}" for value in shares.values()),
        ]
    return cells


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for line in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(line)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, print and write the report. Return 2 for invalid usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="JSON of benchmarks.gpu_check")
    given = parser.parse_args(arguments)
    try:
        for path in filter(None, (given.json, given.markdown)):
            require_writable(path)
        content = _read(given.measured) if given.measured else None
        report = build()
        if content is not None:
            add_measured(report, content, str(given.measured))
    except UserError as error:
        console.print_error(error)
        return 2
    text = "\n".join([*lines(report), "", *compiled_lines(report)]) + "\n"
    print(text, end="")
    if given.json:
        with atomic_write(given.json) as part:
            part.write_text(json.dumps(rounded(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if given.markdown:
        with atomic_write(given.markdown) as part:
            part.write_text(text, encoding="utf-8")
    return 0


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--measured {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--measured {path}: it is not valid JSON ({error})") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
