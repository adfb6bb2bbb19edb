"""Time that data sheets of GPUs allow for every kernel and for training steps of the paper's runs.

    python -m benchmarks.roofline --json FILE [--markdown FILE] [--measured FILE]

No GPU is needed, and without one no figure is a measurement. "Bound" is the time that no implementation can
beat that starts with cold caches and computes products directly: compulsory bytes at the peak bandwidth, or
multiplications at the peak of the matrix units, whichever takes longer. "Predicted" is the time of our
operators one after another at assumed shares of these peaks (`benchmarks/data/gpus.json`). Launches, casts
of weights, synchronization and communication are in neither. `--measured` reads the JSON of
`python -m benchmarks.gpu_check`, and fills in measured times and fractions of the bound: of all kernels, and
of the steps named `check`. Registers, occupancy and instructions of the compiled kernels come from the newest
committed gpu_static results.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bounds.data_sheets import FILE, Assumptions, DataSheet, name_of, read_sheets
from benchmarks.bounds.kernels import MIX, Work, works
from benchmarks.documents.tables import markdown
from benchmarks.shared import committed
from benchmarks.shared.compact_json import write_compact
from benchmarks.shared.harness import rounded
from benchmarks.static.report import read_kernels
from cat_fast import console
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

RANKS = {"dit": 16, "vae": 64}
"""GPUs of the paper's runs."""
PAPER_IMAGES = 8
"""Images per GPU of the tokenizer's run."""
CHECKED_RATIOS = (8, 16)
CHECK_OVERRIDES = ("discriminator.pretrained=",)
MEASURED_STEPS = {
    "cat_xl.check": "cat_xl_compiled.milliseconds",
    **{f"cat_c16.check_{ratio}x": f"vae_{ratio}x_bf16.milliseconds" for ratio in CHECKED_RATIOS},
}
"""Figures of `benchmarks.gpu_check` by the step of the same work: one GPU, without ZeRO."""
COMPILED_FOR = {80: "A100", 90: "H100, H200"}
"""GPUs by the architecture of compiled code."""
COMPILED_COLUMNS = ("op", "name", "architecture", "case", "registers", "occupancy", "instructions")


def steps() -> dict[str, Any]:
    """Count the training steps of the paper's two runs, as `StepWork` by name."""
    from benchmarks.bounds.steps import dit_step, vae_step
    from benchmarks.packing import compose_lengths
    from benchmarks.shared.mixes import MAX_TOKENS, MIXES, TOKENS

    mixed = compose_lengths(MIXES["197"], MAX_TOKENS)
    fixed = {ratio: [tokens] * (MAX_TOKENS // tokens) for ratio, tokens in TOKENS.items()}
    found = {"cat_xl.mixed": dit_step("cat_xl.mixed", "cat_xl", mixed, RANKS["dit"])}
    for ratio, lengths in fixed.items():
        name = f"cat_xl.fixed_{ratio}x"
        found[name] = dit_step(name, "cat_xl", lengths, RANKS["dit"])
    found["cat_xl.check"] = dit_step("cat_xl.check", "cat_xl", MIX, 1)
    for ratio in (8, 16, 32):
        name = f"cat_c16.{ratio}x"
        found[name] = vae_step(name, "cat_c16", ratio, PAPER_IMAGES, RANKS["vae"])
    for ratio in CHECKED_RATIOS:
        name = f"cat_c16.check_{ratio}x"
        found[name] = vae_step(name, "cat_c16", ratio, PAPER_IMAGES, 1, CHECK_OVERRIDES)
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
        "flops_per_byte": step.flops / step.compulsory,
        "bound_ms": {name: 1e3 * max(step.bound_seconds(sheet)) for name, sheet in sheets.items()},
        "predicted_ms": {
            name: 1e3 * step.predicted_seconds(sheet, assumed) for name, sheet in sheets.items()
        },
    }


def compiled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each kernel of gpu_static for each architecture, at the case with the most registers."""
    worst: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        op = row["case"].split(".")[0]
        key = op, row["name"], row["architecture"]
        if key not in worst or row["registers"] > worst[key]["registers"]:
            given = {"op": op, **row}
            worst[key] = {column: given[column] for column in COMPILED_COLUMNS}
    kernels = list(dict.fromkeys(key[:2] for key in worst))
    return sorted(
        worst.values(), key=lambda row: (kernels.index((row["op"], row["name"])), row["architecture"])
    )


def add_measured(report: dict[str, Any], content: Mapping[str, Any], source: str) -> None:
    """Add measured milliseconds and the fraction of the bound to the rows of a report, in place.

    Raises:
        UserError: the file is of another benchmark, its GPU has no data sheet, or it has no figure of a row.
    """
    if not isinstance(content.get("blocks"), Mapping):
        raise UserError(f"{source}: expected the gpu_check.json of python -m benchmarks.gpu_check")
    gpu = str(content.get("machine", {}).get("gpu", ""))
    sheets, _ = read_sheets()
    name = name_of(gpu, sheets)
    if name is None:
        known = ", ".join(f"{key} ({sheet.cuda_name})" for key, sheet in sheets.items())
        raise UserError(f"{source}: no data sheet of {gpu or 'its GPU'}; expected one of {known}")
    figures = {
        figure: values
        for block in ("kernels", "steps")
        for figure, values in content["blocks"].get(block, {}).get("figures", {}).items()
    }
    added = 0
    for row in report["kernels"]:
        figure = figures.get(f"{row['op']}.{row['pass']}.milliseconds", {})
        if figure.get("value") and _same(figure, dtype=row["dtype"], shape=row["shape"]):
            row |= _measured(row, name, figure["value"])
            added += 1
    for key, row in report["steps"].items():
        figure = figures.get(MEASURED_STEPS.get(key, ""), {})
        work = {"images": row["images"], "parameters": sum(row["parameters"].values())}
        if figure.get("value") and _same(figure, **work):
            row |= _measured(row, name, figure["value"])
            added += 1
    if not added:
        raise UserError(f"{source}: no figure has the sizes of a kernel or step of this report")
    report["measured_on"] = gpu


def _same(figure: Mapping[str, Any], **work: Any) -> bool:
    return all(figure.get(key) == value for key, value in work.items())


def _measured(row: Mapping[str, Any], name: str, milliseconds: float) -> dict[str, Any]:
    return {"measured_ms": {name: milliseconds}, "of_bound": {name: row["bound_ms"][name] / milliseconds}}


def build() -> dict[str, Any]:
    """Return the complete report without measured figures."""
    sheets, assumed = read_sheets()
    static = committed.committed("gpu_static")
    return {
        "about": {
            "benchmark": "roofline",
            "measured": "nothing: bounds and predictions from data sheets",
            "data_sheets": FILE.name,
            "assumptions": vars(assumed),
            "gpu_static": static.name,
        },
        "gpus": {name: vars(sheet) for name, sheet in sheets.items()},
        "kernels": [kernel_row(work, sheets, assumed) for work in works()],
        "compiled": compiled(read_kernels(static)),
        "steps": {name: step_row(step, sheets, assumed) for name, step in steps().items()},
    }


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report as Markdown: one table of kernels and one of steps."""
    gpus = list(report["gpus"])
    columns = [f"{gpu} {what}, ms" for gpu in gpus for what in ("bound", "predicted")]
    measured = "measured_on" in report
    columns += ["measured, ms", "of the bound"] if measured else []
    yield from markdown(
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
    ).splitlines()
    yield ""
    yield from markdown(
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
    ).splitlines()


def compiled_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of the compiled kernels."""
    yield from markdown(
        ["kernel", "GPU", "case", "registers", "occupancy", "instructions"],
        [
            [
                f"`{row['op']}` `{row['name']}`",
                COMPILED_FOR[row["architecture"]],
                row["case"],
                f"{row['registers']}",
                f"{row['occupancy']:.0%}",
                instruction_shares(row["instructions"]),
            ]
            for row in report["compiled"]
        ],
    ).splitlines()


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
        content = committed.read(given.measured) if given.measured else None
        report = build()
        if content is not None:
            add_measured(report, content, str(given.measured))
    except UserError as error:
        console.print_error(error)
        return 2
    text = "\n".join([*lines(report), "", *compiled_lines(report)]) + "\n"
    print(text, end="")
    if given.json:
        write_compact(given.json, rounded(report))
    if given.markdown:
        with atomic_write(given.markdown) as part:
            part.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
