"""`cat-fast plan`: estimate the cost and memory of a training run."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from cat_fast.cli.plan_budget import budget
from cat_fast.config import fill, read_yaml
from cat_fast.console import err, out, progress
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.data.sampling.cost_table import CostTable
    from cat_fast.training.config.settings import TokenizerRun
    from cat_fast.training.tokenizer.predict_memory import MemoryPlan

plan = typer.Typer(
    no_args_is_help=True,
    help="Estimate the cost and memory of a training run in advance, and fit thresholds of ratios.",
)
plan.command()(budget)

Config = Annotated[Path, typer.Argument(help="YAML file of a tokenizer run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]…",
        help="Configuration overrides, such as data.image_size=128.",
        show_default=False,
    ),
]


@plan.command()
def cost(
    config: Config,
    overrides: Overrides = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Cost table to write, for sampler.cost_table.", show_default=False
        ),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(
            metavar="N,N…",
            help="Batch sizes to measure, at least two. Default: sizes around data.batch_size.",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed steps per ratio and batch size, after one warm-up step.")
    ] = 5,
    count: Annotated[
        bool,
        typer.Option("--count", help="Count floating-point operations instead of measuring time."),
    ] = False,
) -> None:
    """Measure the cost of a training step at each ratio on this machine, for **sampler.mode: balanced**.

    Complete training steps of one rank are timed at the configured image size, on a GPU if available. An
    affine cost model, fixed + images x per image, is fitted to the medians.

    Examples:

        cat-fast plan cost configs/tokenizer/cat_c16.yaml --json costs.json

        cat-fast plan cost configs/tokenizer/cat_c16.yaml data.image_size=128 --batches 1,2,4
    """
    from cat_fast.training.tokenizer.measure_cost import (
        count_operations,
        default_batches,
        measure,
        num_timed_steps,
    )

    run = _read(config, overrides)
    if json_file:
        require_writable(json_file)
    if count:
        table = count_operations(run)
    else:
        sizes = _numbers(batches) if batches else default_batches(run.data.batch_size)
        with progress("steps") as bar:
            task = bar.add_task("measuring", total=num_timed_steps(run, sizes, repeats))
            load = os.getloadavg()[0]
            table = measure(
                run,
                sizes,
                repeats,
                on_step=lambda name: bar.update(task, advance=1, description=name),
            )
        table = table.with_facts(machine=_machine(), load_before=load, load_after=os.getloadavg()[0])
    out.print(_cost_table(table))
    if table.fit_error > 0.1:
        err.print(
            f"A measurement deviates by {table.fit_error:.0%} from the affine cost model. Measure again on an"
            " idle machine, or with batch sizes closer to those of the run."
        )
    if json_file:
        table.write(json_file)
        out.print(f"Written to {json_file}", markup=False, soft_wrap=True)


@plan.command()
def memory(
    config: Config,
    overrides: Overrides = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="A100-40, A100-80, H100-80, H200 or B200; may be repeated. Default: all of them."),
    ] = None,
    ranks: Annotated[
        int,
        typer.Option(min=0, help="Ranks that share the optimizer state; 0: the configured world_size, or 1."),
    ] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="JSON file to write.", show_default=False),
    ] = None,
) -> None:
    """Predict the peak memory of a training step by ratio and batch size, and the largest batch per GPU.

    No memory is allocated and no GPU is needed: live tensors are counted operator by operator. A tenth of
    each GPU's memory is reserved for uncounted allocations, such as library workspaces.

    Examples:

        cat-fast plan memory configs/tokenizer/cat_c16_64xA100.yaml

        cat-fast plan memory configs/tokenizer/cat_c16.yaml precision=bf16 --ranks 8 --gpu H100-80

        cat-fast plan memory configs/tokenizer/cat_c16.yaml gradient_checkpointing=true
    """
    from cat_fast.hardware import MEMORY_BYTES
    from cat_fast.training.tokenizer.predict_memory import HEADROOM, plan_memory

    run = _read(config, overrides)
    if unknown := sorted(set(gpu or ()) - MEMORY_BYTES.keys()):
        raise UserError(f"--gpu: expected one of {', '.join(MEMORY_BYTES)}, got {unknown[0]}")
    if json_file:
        require_writable(json_file)
    ranks = ranks or run.world_size or 1
    predicted = plan_memory(run, ranks)
    capacities = {name: MEMORY_BYTES[name] for name in gpu or MEMORY_BYTES}
    batches = sorted({1, 4, 16, run.data.batch_size})
    report = {
        "what": "predicted peak bytes per rank, counted on fake tensors; not measured on a GPU",
        "ranks": ranks,
        "precision": run.precision,
        "gradient_checkpointing": run.gradient_checkpointing,
        "side": run.data.image_size,
        "headroom": HEADROOM,
        "at_rest": dict(predicted.at_rest),
        "peak": {f: {n: predicted.peak(f, n) for n in batches} for f in predicted.steps},
        "largest_batch": {
            f: {name: predicted.largest_batch(f, size) for name, size in capacities.items()}
            for f in predicted.steps
        },
    }
    out.print(_memory_table(predicted, batches, capacities))
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in predicted.at_rest.items() if size)
    out.print(f"Predicted GiB per rank, {ranks} ranks. At rest: {parts}.", soft_wrap=True)
    if json_file:
        with atomic_write(json_file) as part:
            part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        out.print(f"Written to {json_file}", markup=False, soft_wrap=True)


@plan.command()
def jpeg(
    config: Config,
    overrides: Overrides = None,
    mix: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Shares of the ratios 8x, 16x and 32x, such as 0.1,0.48,0.42. Default: those of the same"
            " images by their scores and data.thresholds.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Maximum number of images to measure.")] = 10_000,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="JSON file to write.", show_default=False),
    ] = None,
) -> None:
    """Fit **data.jpeg_thresholds** to the images of a run, for ratios from JPEG sizes with a given mix.

    The JPEG baseline of a model should spend as many tokens as the model: fit its thresholds to the model's
    own mix of ratios. The published pair belongs to the paper's images.

    Examples:

        cat-fast plan jpeg configs/tokenizer/cat_c16_jpeg.yaml

        cat-fast plan jpeg configs/tokenizer/cat_c16_jpeg.yaml data.folder=DIR data.shards="" --mix
        0.1,0.48,0.42
    """
    from cat_fast.complexity import RATIOS
    from cat_fast.training.tokenizer.fit_jpeg import fit_jpeg_thresholds

    run = _read(config, overrides)
    shares = _shares(mix) if mix else None
    if json_file:
        require_writable(json_file)
    with progress("images") as bar:
        task = bar.add_task("measuring", total=None)
        fit = fit_jpeg_thresholds(run, shares, images, on_image=lambda: bar.advance(task))
    configured, fitted = run.data.size_thresholds, fit.thresholds
    table = Table("thresholds, bytes", *(f"{ratio}x" for ratio in RATIOS))
    table.add_row("", *(f"{fit.mix.get(ratio, 0):.1%}" for ratio in RATIOS))
    for pair, found in ((configured, fit.configured), (fitted, fit.fitted)):
        table.add_row(f"{pair.a},{pair.b}", *(f"{found[ratio]:.1%}" for ratio in RATIOS))
    table.caption = "wanted mix, and the mixes of the configured and the fitted thresholds"
    out.print(table)
    out.print(f"{fit.images} images: data.jpeg_thresholds=[{fitted.a},{fitted.b}]", markup=False)
    if json_file:
        report = asdict(fit) | {"data.jpeg_thresholds": [fitted.a, fitted.b]}
        with atomic_write(json_file) as part:
            part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        out.print(f"Written to {json_file}", markup=False, soft_wrap=True)


def _shares(text: str) -> dict[int, float]:
    from cat_fast.complexity import RATIOS

    try:
        return dict(zip(RATIOS, map(float, text.split(",")), strict=True))
    except ValueError:
        raise UserError(
            f"--mix: expected three shares, of 8x, 16x and 32x, such as 0.1,0.48,0.42, got {text!r}"
        ) from None


def _read(path: Path, overrides: Sequence[str] | None) -> "TokenizerRun":
    from cat_fast.training.config.settings import TokenizerRun

    values = read_yaml(path)
    if values.get("task") != "tokenizer":
        raise UserError(
            f"configuration {path}: expected task 'tokenizer', got {values.get('task')!r}; pass the YAML file"
            " of a tokenizer run"
        )
    return fill(TokenizerRun, values, list(overrides or ()), source=f"configuration {path}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--batches: expected comma-separated integers such as 2,4,8, got {text!r}") from None


def _machine() -> dict[str, Any]:
    from cat_fast.cli.info import environment

    found = environment()
    return {name: found[name] for name in ("cpu", "gpus", "python", "packages")}


def _cost_table(table: "CostTable") -> Table:
    seconds = table.unit == "seconds"
    unit, scale = ("ms", 1e3) if seconds else ("GFLOP", 1e-9)
    rows = Table("ratio", f"fixed, {unit}", f"per image, {unit}", "relative")
    cheapest = min(cost.per_image for cost in table.costs.values())
    for ratio, one in sorted(table.costs.items()):
        rows.add_row(
            f"{ratio}x",
            f"{one.fixed * scale:.4g}",
            f"{one.per_image * scale:.4g}",
            f"{one.per_image / cheapest:.2f}",
        )
    if not seconds:
        rows.caption = "counted operations, a fallback; no time was measured"
    elif len({one.images for one in table.measured}) == 2:
        rows.caption = "measured with two batch sizes; a third is needed to verify the affine model"
    else:
        rows.caption = f"measured; maximum error of the affine model {table.fit_error:.1%}"
    return rows


def _memory_table(predicted: "MemoryPlan", batches: Sequence[int], capacities: dict[str, float]) -> Table:
    names: dict[float, list[str]] = {}
    for name, size in capacities.items():
        names.setdefault(size, []).append(name)
    max_columns = [Column("\n".join(["max on", *group]), no_wrap=True) for group in names.values()]
    batch_columns = [Column(f"\n{n}", no_wrap=True, min_width=4) for n in batches]
    rows = Table(Column("ratio", no_wrap=True), *batch_columns, *max_columns)
    for ratio in predicted.steps:
        peaks = [_gib(predicted.peak(ratio, n)) for n in batches]
        rows.add_row(f"{ratio}x", *peaks, *(str(predicted.largest_batch(ratio, size)) for size in names))
    rows.caption = "peak GiB by images per rank, and the largest batch"
    return rows


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"
