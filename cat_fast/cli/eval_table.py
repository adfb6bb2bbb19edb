"""`cat-fast eval table`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cat_fast import console


def table(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Name of the table, or all. Default: list them.", show_default=False
        ),
    ] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[DATASET=]DIR",
            help="Folder of an evaluation of ours, and the published name of its data set, such as"
            " COCO=eval/coco; may be repeated.",
            show_default=False,
        ),
    ] = None,
    table_format: Annotated[
        str, typer.Option("--format", "-f", metavar="markdown|latex|csv|html", help="Format to print.")
    ] = "markdown",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write to a file instead.", show_default=False),
    ] = None,
) -> None:
    """Print a table of the paper: the published rows and ours.

    Sources that contradict each other are listed below the table, for CSV on standard error. Figures that
    cannot be compared, such as proxy-rFID-vgg16, and other data sets have columns of their own.

    Examples:

        cat-fast eval table

        cat-fast eval table reconstruction --runs COCO=eval/coco --runs ImageNet=eval/imagenet

        cat-fast eval table generation --runs ImageNet=eval/fid --format latex -o table.tex
    """
    from cat_fast.data.files import atomic_write
    from cat_fast.evaluation.published.formats import format_table, notes
    from cat_fast.evaluation.published.tables import find_table, published, read_run, with_runs

    if name is None:
        for known in published().values():
            console.out.print(Text(f"{known.name:<20} {known.title}"), soft_wrap=True)
        return
    found = [run for spec in runs or () for run in read_run(spec)]
    names = list(published()) if name == "all" else [name]
    tables = [with_runs(find_table(one), found) for one in names]
    text = "\n".join(format_table(one, table_format) for one in tables)
    if table_format == "csv":  # has no comments
        for one in tables:
            for note in notes(one):
                console.err.print(Text(f"{one.name}: {note}"), soft_wrap=True)
    if out is None:
        console.out.print(text, markup=False, soft_wrap=True, end="")
        return
    with atomic_write(out) as part:
        part.write_text(text, encoding="utf-8")
    console.out.print(Text(f"Written to {out}"), soft_wrap=True)
