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


@data.command()
def select(
    index: Annotated[
        Path, typer.Argument(metavar="INDEX", help="Image index to read (JSON lines).", show_default=False)
    ],
    written: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Image index to write.", show_default=False)
    ],
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Keep images whose key matches, such as 'emoji/*'; may be repeated. Default: all.",
            show_default=False,
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave out images whose key matches; may be repeated.",
            show_default=False,
        ),
    ] = None,
    ratios: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Write a line per image and ratio, such as 8,16,16,32, in which 16x occurs twice. Default:"
            " one line per image, as it is.",
            show_default=False,
        ),
    ] = "",
    optional_ending: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Ending of captions that every other line of an image omits, such as ', emoji'.",
            show_default=False,
        ),
    ] = "",
    no_classes: Annotated[
        bool, typer.Option("--no-classes", help="Leave out the class of each image.")
    ] = False,
    repeat: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=N",
            help="Write N lines of each image whose key matches, such as 'photographs/*=8', for N views per"
            " epoch; may be repeated, and the first match counts.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a part of an image index, with one line per image and ratio if wanted.

    A generator that is to draw every image at every ratio is trained on such an index (`cat-fast
    encode-shards INDEX`).

    Examples:

        cat-fast data select corpus/train.jsonl -o emoji.jsonl --keep 'emoji/*' --ratios 8,16,32
    """
    from cat_fast.data.images.index import read_index, write_index
    from cat_fast.data.images.selection import parse_ratios, parse_repeats, select_records

    records = select_records(
        read_index(index, lambda where, why: err.print(f"{escape(where)}: {escape(why)}", soft_wrap=True)),
        keep=keep or ["*"],
        drop=drop or [],
        ratios=parse_ratios(ratios) if ratios else [],
        optional_ending=optional_ending,
        keep_classes=not no_classes,
        repeats=parse_repeats(repeat or []),
    )
    write_index(written, records, relative=True)
    out.print(f"{len(records)} lines written to {escape(str(written))}", soft_wrap=True)
