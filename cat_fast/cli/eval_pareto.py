"""`cat-fast eval pareto`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import JsonOption
from cat_fast.errors import UserError


def pareto(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder of `cat-fast eval reconstruction`, with fixed ratios among its rules.",
            show_default=False,
        ),
    ],
    json_output: JsonOption = False,
) -> None:
    """Compare all score thresholds, fixed ratios and token budgets: tokens, FLOPs and distortion.

    The evaluation contains every reconstruction that a rule could choose, so no model runs. A point is
    dominated if another one is at least as good in tokens, FLOPs and the metric, and better in one of them.
    Writes pareto.json and pareto.png to DIR. A rule (a, b) gives scores up to a 32x, and those above b 8x.

    Examples:

        cat-fast eval reconstruction --data val -t DIR --ratios 8,16,32 --scores scores.parquet -o eval

        cat-fast eval pareto eval
    """
    from cat_fast.cli.eval_reconstruction import RESULT
    from cat_fast.data.files import atomic_write, write_json
    from cat_fast.evaluation.tokenizers.pareto import merge_equal, plot, sweep

    try:
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run / RESULT}: cannot be read; run cat-fast eval reconstruction first") from error
    points = sweep(result, run / "images.parquet")
    kept = {key: result[key] for key in ("data", "tokenizers", "networks", "versions")}
    content = {"evaluation": "pareto", **kept, "points": [point.to_json() for point in points]}
    write_json(run / "pareto.json", content)
    with atomic_write(run / "pareto.png") as part:
        plot(points, part, "{images} images of {size} px".format(**result["data"]))
    if json_output:
        console.print_json(content)
        return
    for metric in points[0].metrics:
        best = [point for point in points if not point.dominated[metric]]
        table = Table("tokenizer", "rule", "tokens", "GFLOP", metric)
        for point, count in merge_equal(best, metric):
            rule = point.rule if count == 1 else f"{point.rule} and {count - 1} equal"
            gflop = "-" if point.flops is None else f"{point.flops / 1e9:.4g}"
            table.add_row(point.tokenizer, rule, f"{point.tokens:.4g}", gflop, f"{point.metrics[metric]:.4g}")
        table.caption = f"{len(best)} of {len(points)} rules are not dominated"
        console.out.print(table)
    console.out.print(Text(f"Written to {run / 'pareto.json'} and {run / 'pareto.png'}"), soft_wrap=True)
