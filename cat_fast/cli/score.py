"""`cat-fast score`: complexity scores of captions, with the resulting ratios and token counts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cat_fast import console
from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.complexity import ComplexityResult, Description


def score(
    captions: Annotated[
        list[str] | None, typer.Argument(help="Captions to score.", show_default=False)
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help='Class label, scored as "this is an image of LABEL"; may be repeated.', show_default=False
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="File of captions: .txt with one caption per line, or .jsonl with one object per line with"
            ' "caption" and optionally "has_text" and "has_faces".',
            show_default=False,
        ),
    ] = None,
    has_text: Annotated[
        bool | None,
        typer.Option(
            "--has-text/--no-text",
            help="The images contain text or numbers, or do not; .jsonl rows can override it."
            " Default: inferred from each caption.",
            show_default=False,
        ),
    ] = None,
    has_faces: Annotated[
        bool | None,
        typer.Option(
            "--has-faces/--no-faces",
            help="The images contain faces, or do not; .jsonl rows can override it."
            " Default: inferred from each caption.",
            show_default=False,
        ),
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Scores up to A get 32x, above B 8x, between them 16x. Default: the published 4,7.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="JSON file to write the results to.", show_default=False),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show the largest effects on each score, and the rubric."),
    ] = False,
) -> None:
    """Score the complexity of captions from 1 to 9 and choose each image's compression ratio.

    Scores come from the packaged scorer, a small linear model on the caption's words and the flags. Token
    counts are for 512 px images: 1024 at 8x, 256 at 16x, 64 at 32x.

    Examples:

        cat-fast score "a plane in a clear sky" "a crowded market hall"

        cat-fast score "a newspaper front page" --has-text --explain

        cat-fast score --label "goldfish" --label "grocery store" --thresholds 4,7

        cat-fast score --file captions.jsonl --json scores.json
    """
    from cat_fast.complexity import (
        Description,
        RatioThresholds,
        choose_ratios,
        default_scorer,
        default_thresholds,
        read_descriptions,
        rubric_text,
        scored_by,
        summarize,
    )

    chosen = RatioThresholds.parse(thresholds) if thresholds is not None else default_thresholds()
    descriptions = [Description(caption, has_text, has_faces) for caption in captions or []]
    descriptions += [Description.from_label(name, has_text, has_faces) for name in label or []]
    descriptions += read_descriptions(file, has_text, has_faces) if file else []
    if not descriptions:
        raise UserError("nothing to score: pass captions, --label or --file (see cat-fast score --help)")

    results = choose_ratios(descriptions, thresholds=chosen)
    summary = summarize(results)
    if json_file:
        report = asdict(scored_by(default_scorer(), chosen)) | summary
        with atomic_write(json_file) as part:
            part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    console.out.print(_table(results, explain))
    mix = ", ".join(f"{ratio}x {share:.0%}" for ratio, share in summary["mix"].items())
    console.out.print(
        f"{len(results)} caption{'s' * (len(results) > 1)}: {mix}; {_cost(summary)}; thresholds {chosen}",
    )
    if json_file:
        console.out.print(f"Written to {json_file}", markup=False)
    if explain:
        console.out.print(f"\n{rubric_text()}", markup=False)


def _table(results: "list[ComplexityResult]", explain: bool) -> Table:
    table = Table("caption", "flags")
    for column in ("score", "ratio", "tokens"):
        table.add_column(column, justify="right")
    if explain:
        table.add_column("largest effects")
    for result in results:
        description = result.description
        flags = ["text"] * bool(description.has_text) + ["faces"] * bool(description.has_faces)
        cells = [description.caption, " ".join(flags)]
        cells += [str(result.score), f"{result.ratio}x", str(result.tokens())]
        cells += [_largest_effects(description)] if explain else []
        table.add_row(*map(Text, cells))  # Text, so that brackets in a caption are not parsed as markup
    return table


def _cost(summary: dict[str, Any]) -> str:
    mean, fixed = summary["mean_tokens"], summary["fixed_16x_tokens"]
    return f"mean {mean:.1f} tokens against {fixed} at a fixed 16x ({mean / fixed - 1:+.1%})"


def _largest_effects(description: "Description") -> str:
    """Format the three features with the largest effect on the score, leaving out unreadable ones."""
    from cat_fast.complexity import default_scorer

    parts = default_scorer().contributions(description)
    readable = [(name, value) for name, value in parts if not name.startswith(("letters", "length"))]
    return ", ".join(f"{name} {value:+.2f}" for name, value in readable[:3])
