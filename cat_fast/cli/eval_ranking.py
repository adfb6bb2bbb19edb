"""`cat-fast eval ranking` and `cat-fast eval tally`: a user study by ranking."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import JsonOption
from cat_fast.errors import UserError


def ranking(
    originals: Annotated[
        Path, typer.Option("--originals", metavar="DIR", help="Original images.", show_default=False)
    ],
    method: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=DIR",
            help="Name of a method and its reconstructions, under the names of the originals; at least two.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Page to write.")] = Path("ranking.html"),
    question: Annotated[
        str, typer.Option(help="Question above each set.")
    ] = "Which image is most similar to the original?",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of sets.", show_default=False)
    ] = None,
) -> None:
    """Write a page on which people rank reconstructions by their similarity to the original.

    The page contains all images and needs no server; send it to participants. It shuffles sets and methods
    and names no method. Participants save their answers to a file, and `cat-fast eval tally` counts the
    files: with three methods, 3, 2 and 1 points.

    It works for the reconstructions of any tokenizer, so that people can also judge ratios of the adaptive
    one.

    Example:

        cat-fast eval ranking --originals photos --method ours=a --method jpeg=b -o study.html
    """
    from cat_fast.data.files import require_writable
    from cat_fast.evaluation.ranking.page import find_sets, write_page

    methods: dict[str, Path] = {}
    for spec in method:
        name, separator, folder = spec.partition("=")
        if not separator or not name or not folder:
            raise UserError(f"--method {spec}: expected NAME=DIR")
        if name in methods:
            raise UserError(f"--method {spec}: the name {name} occurs twice")
        methods[name] = Path(folder)
    require_writable(out)
    sets = find_sets(originals, methods, limit)
    write_page(out, sets, question)
    console.out.print(Text(f"{len(sets)} sets of {len(methods)} images in {out}"), soft_wrap=True)


def tally(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE.json...", help="Saved answers.", show_default=False)
    ],
    json_output: JsonOption = False,
) -> None:
    """Count the answers of a ranking study: mean points per method, with 95 % intervals over participants.

    The published study has 15 participants and 25 sets: `cat-fast eval table dual-study`.
    """
    from cat_fast.evaluation.ranking.tally import tally as count

    result = count(files)
    if json_output:
        console.print_json(result)
        return
    table = Table("method", "mean points", "95 %")
    for name, figures in sorted(result["methods"].items(), key=lambda item: -item[1]["points"]):
        low, high = figures["interval"]
        table.add_row(Text(name), f"{figures['points']:.2f}", f"{low:.2f} to {high:.2f}")
    console.out.print(table)
    console.out.print(f"{result['participants']} participants, {result['sets']} sets")
