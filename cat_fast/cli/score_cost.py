"""`cat-fast score cost`: cost of scoring an image set, against what the saved tokens save."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cat_fast import console
from cat_fast.data.files import require_writable, write_json
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.complexity.scoring_run.cost import CostComparison, Prices


def cost(
    images: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of images; required.", show_default=False)
    ] = None,
    mean_tokens: Annotated[
        float,
        typer.Option(
            help="Mean tokens per image that the scores lead to. Default: the published training's."
        ),
    ] = 197.44,
    gpu_price: Annotated[float, typer.Option(help="Price of an H100-hour, in any currency.")] = 2.5,
    gpu_watts: Annotated[
        float, typer.Option(help="Power of an H100 in watts; 700 is its data sheet's.")
    ] = 700.0,
    core_price: Annotated[float, typer.Option(help="Price of an hour of one CPU core.")] = 0.04,
    core_watts: Annotated[float, typer.Option(help="Power of one CPU core in watts.")] = 6.0,
    peak_tflops: Annotated[
        float, typer.Option(help="Peak of the training GPU in TFLOP/s; 989 is an H100's in bfloat16.")
    ] = 989.0,
    mfu: Annotated[float, typer.Option(help="Share of the peak that training reaches.")] = 0.4,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="JSON file to write the results to.", show_default=False),
    ] = None,
) -> None:
    """Compare the cost of scoring images with the training compute that the saved tokens save.

    Times of language models are published ones, which contradict each other; those of the distilled scorers
    are measured now, on this machine. Prices, power and efficiency are assumptions: replace them by your own.
    Break-even is the number of epochs after which the generator's training has saved the price of scoring.

    To score the caption "cost", use cat-fast score --caption cost.

    Examples:

        cat-fast score cost --images 380000000

        cat-fast score cost --images 1281167 --mean-tokens 216 --gpu-price 1.9 --json cost.json
    """
    if images is None:
        raise UserError(
            'score cost: --images N is missing; to score the caption "cost", use'
            " cat-fast score --caption cost"
        )
    from cat_fast.complexity.scorers.loading import DISTILLED, load_scorer
    from cat_fast.complexity.scoring_run.cost import PUBLISHED_SPEEDS, Prices, compare_costs, measure_speed

    prices = Prices(
        gpu_hour=gpu_price,
        gpu_watts=gpu_watts,
        core_hour=core_price,
        core_watts=core_watts,
        peak_tflops=peak_tflops,
        mfu=mfu,
    )
    compare_costs(images, (), prices, mean_tokens)  # report invalid arguments before measuring
    if json_file:
        require_writable(json_file)
    measured = [measure_speed(name, load_scorer(name)) for name in DISTILLED]
    comparison = compare_costs(images, [*PUBLISHED_SPEEDS, *measured], prices, mean_tokens)
    if json_file:
        write_json(json_file, comparison.to_json(prices))
    _print(comparison, prices)
    if json_file:
        console.out.print(f"Written to {json_file}", markup=False, soft_wrap=True)


def _print(comparison: "CostComparison", prices: "Prices") -> None:
    from cat_fast.complexity.scoring_run.cost import (
        CAPTIONING_SECONDS,
        CONFLICTS,
        FIXED_TOKENS,
        published_epochs,
    )

    table = Table("scorer")
    for column in ("s/image", "hours", "kWh", "money", "epochs"):
        table.add_column(column, justify="right")
    for found in comparison.costs:
        speed, expense = found.speed, found.expense
        hours = expense.gpu_hours or expense.core_hours
        numbers = (expense.kwh, expense.money, found.epochs_by_money)
        table.add_row(
            speed.name, _number(speed.seconds), f"{_number(hours)} {speed.device}", *map(_number, numbers)
        )
    console.out.print(f"Scoring {comparison.images:,} images:")
    console.out.print(table)
    saved = comparison.saved_per_epoch
    share = 1 - comparison.mean_tokens / FIXED_TOKENS
    lines = [
        f"Saved per epoch of generator training (cat_xl, 512 px), with {comparison.mean_tokens:g} instead of"
        f" {FIXED_TOKENS} tokens per image ({share:.1%} fewer): {_number(saved.gpu_hours)} GPU-hours,"
        f" {_number(saved.kwh)} kWh, {_number(saved.money)} in money.",
        "Epochs: break-even, the money for scoring divided by the money saved per epoch. The published"
        f" training draws each image of ImageNet {published_epochs():.0f} times.",
        "Times of the distilled scorers are CPU time, measured now on this machine; the others are published"
        " for an H100.",
        "Distilled scorers and the LLM alone need a caption: where there are none, captioning adds about"
        f" {CAPTIONING_SECONDS:.2g} H100-seconds per image, by difference of the published times.",
        f"Assumptions: {prices.gpu_hour:g} per H100-hour of {prices.gpu_watts:g} W, {prices.core_hour:g} per"
        f" core-hour of {prices.core_watts:g} W, training at {prices.mfu:.0%} of {prices.peak_tflops:g}"
        " TFLOP/s.",
        *(f"Conflict of the sources: {conflict}" for conflict in CONFLICTS),
    ]
    for line in lines:
        console.out.print(line, markup=False)


def _number(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    if value == float("inf"):
        return "never"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else f"{value:.1e}"
