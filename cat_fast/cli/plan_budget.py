"""`cat-fast plan budget`: thresholds for a budget of tokens, from files of scores."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cat_fast.console import err, out
from cat_fast.data.files import atomic_write, require_writable

if TYPE_CHECKING:
    from cat_fast.complexity import Candidate


def budget(
    files: Annotated[
        list[Path],
        typer.Argument(
            help='Files of scores: .parquet from cat-fast score, or .jsonl with "score" and "expected".',
            show_default=False,
        ),
    ],
    target_ratio: Annotated[
        float, typer.Option(help="Fixed ratio whose cost the thresholds should meet, 8 to 32.")
    ] = 16,
    tolerance: Annotated[
        float, typer.Option(help="Largest relative distance of the average ratio from the target.")
    ] = 0.05,
    mean_tokens: Annotated[
        float | None,
        typer.Option(
            help="Also fit real-valued thresholds on the expected score to this many mean tokens per image.",
            show_default=False,
        ),
    ] = None,
    resolution: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 512,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="JSON file to write.", show_default=False),
    ] = None,
) -> None:
    """List the thresholds under which scored images cost as much as with a fixed ratio.

    All integer pairs within the tolerance are listed, the most diverse mix first, then the default pair.
    Several files, such as those of shards, count as one set. With **--mean-tokens**, real-valued thresholds
    meet a budget to within one image, without exceeding it on these images.

    Examples:

        cat-fast plan budget scores.parquet

        cat-fast plan budget shard-*.parquet --mean-tokens 197 --json budget.json
    """
    from cat_fast.complexity import Candidate, RatioThresholds, default_thresholds
    from cat_fast.complexity.ratios.score_files import ScoreFiles

    if json_file:
        require_writable(json_file)
    found = ScoreFiles.read(files)
    fitted = RatioThresholds.candidates(found.scores, target_ratio, resolution, tolerance)
    default = Candidate.measure(default_thresholds(), found.scores, resolution)
    real = None
    if mean_tokens is None:
        chosen = RatioThresholds.fit(found.scores, target_ratio, resolution, tolerance)
        conclusion = f"the most diverse thresholds are {chosen}"
    else:
        expected = found.require_expected()
        chosen = RatioThresholds.within_budget(expected, mean_tokens, resolution=resolution)
        real = Candidate.measure(chosen, expected, resolution)
        conclusion = f"thresholds {chosen} keep {mean_tokens:g} mean tokens"
    out.print(_table(fitted, default, real))
    out.print(f"{found.scores.total:,.0f} images: {conclusion}")
    if found.unscored:
        err.print(f"rows without a complexity score, which are not counted: {found.unscored:,}")
    if json_file:
        report = {
            "images": int(found.scores.total),
            "unscored": found.unscored,
            "target_ratio": target_ratio,
            "tolerance": tolerance,
            "resolution": resolution,
            "candidates": [_json(one) for one in fitted],
            "default": _json(default),
            "mean_tokens": mean_tokens,
            "within_budget": real and _json(real),
        }
        with atomic_write(json_file) as part:
            part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        out.print(f"Written to {json_file}", markup=False, soft_wrap=True)


def _table(fitted: "list[Candidate]", default: "Candidate", real: "Candidate | None") -> Table:
    table = Table("thresholds", *(f"{ratio}x" for ratio in default.mix), "average", "tokens", "entropy", "")
    rows = [(one, "") for one in fitted]
    rows += [(default, "default")] * (default.thresholds not in [one.thresholds for one in fitted])
    rows += [(real, "budget")] if real else []
    for one, note in rows:
        note = "default" if one.thresholds == default.thresholds else note
        shares = [f"{share:.1%}" for share in one.mix.values()]
        table.add_row(
            str(one.thresholds),
            *shares,
            f"{one.average_ratio:.2f}x",
            f"{one.mean_tokens:.1f}",
            f"{one.entropy:.3f}",
            note,
        )
    return table


def _json(candidate: "Candidate") -> dict[str, Any]:
    fields = asdict(candidate)
    return fields | {"thresholds": list(candidate.thresholds.values)}
