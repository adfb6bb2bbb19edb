"""`cat-fast data`: data sets that can be built from public packages."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cat_fast.console import err, out, progress

data = typer.Typer(help="Build data sets from public packages.", no_args_is_help=True)


@data.callback()
def _data() -> None:
    """Build data sets from public packages."""


@data.command()
def corpus(
    folder: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder to write the corpus to.", show_default=False),
    ],
    given: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Folder of .deb files to take instead of downloading them with apt-get.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Build one source: emoji, stamps, clip_art, landscapes, nebulae, wallpapers or pages; may be"
            " repeated. Default: all.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Build a text-image corpus of about 10,000 images from pinned Debian packages.

    Emoji, stamps, clip art, landscapes, nebulae, wallpapers and pages of text, with captions. Writes
    train.jsonl and held_out.jsonl, which are image indices, and corpus.json with versions and licences.
    Packages are downloaded with apt-get as any user, checked by SHA-256 and unpacked into DIR. To continue
    after an interruption, run the same command again. A package that is gone or changed is left out and
    listed; exit code 1.

    Examples:

        cat-fast data corpus --out runs/corpus --only emoji

        cat-fast data corpus --out runs/corpus --from ~/debs

        deepspeed --module cat_fast.train configs/tokenizer/nano.yaml data.index=runs/corpus/train.jsonl
    """
    from cat_fast.data.corpus import SOURCES, build_corpus
    from cat_fast.data.corpus.build import disk_needed

    chosen = [SOURCES[name] for name in only or SOURCES if name in SOURCES]
    needed = disk_needed(chosen, downloads=given is None)
    err.print(f"needs at most {needed / 1e9:.1f} GB in {escape(str(folder))}", soft_wrap=True)
    with progress("images") as bar:
        task = bar.add_task("starting", total=None)
        report = build_corpus(
            folder,
            given=given,
            only=only or (),
            progress=lambda step, images: bar.update(task, description=step, advance=images),
        )
    table = Table("source", "licence")
    for column in ("train", "held out"):
        table.add_column(column, justify="right")
    for name, counts in report.images.items():
        table.add_row(name, report.licences[name], str(counts["train"]), str(counts["held_out"]))
    out.print(table)
    out.print(f"Written to {escape(str(folder))}", soft_wrap=True)
    for name, reason in report.left_out.items():
        err.print(f"left out: {escape(name)}: {escape(reason)}", soft_wrap=True)
    if report.left_out:
        raise typer.Exit(1)
