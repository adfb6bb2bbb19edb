"""`cat-fast shard`: pack the images of an index into archives for training."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cat_fast.console import err, out, progress

_MAX_LISTED = 10
"""Maximum number of skipped images to list."""


def shard(
    index: Annotated[
        str,
        typer.Argument(
            help="An image index (JSON lines with path, and perhaps key, caption, has_text, has_faces, score,"
            " ratio, category), or `photographs` for the packaged training images.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Output folder for the shards.", show_default=False),
    ],
    per_shard: Annotated[
        int,
        typer.Option(help="Images per shard; aim at a few hundred MB for training over a network."),
    ] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the assignment of images to shards.")] = 0,
) -> None:
    """Pack the images of an index into webdataset shards, with a sidecar file of scores per shard.

    Writes shard-000000.tar with the unchanged image files, shard-000000.scores.jsonl, and so on. The index
    may have any length; it is not loaded into memory. To resume after an interruption, run the same command
    again. Delete a shard's .scores.jsonl to rewrite that shard.

    Train from the shards, in place or after copying them elsewhere:

        deepspeed --module cat_fast.train configs/tokenizer/cat_c16.yaml data.shards=DIR

        deepspeed --module cat_fast.train ... data.shards="s3://bucket/shard-{000000..037999}.tar"

    Examples:

        cat-fast shard photographs --out shards --per-shard 16

        cat-fast shard index.jsonl --out /data/shards
    """
    from cat_fast.complexity.ratios.image_ratios import PHOTOGRAPHS, load_index, score_records
    from cat_fast.data.shard_writer import IndexLines, write_shards
    from cat_fast.data.streams.formats.problems import ProblemLog

    records = load_index(index) if index == PHOTOGRAPHS else IndexLines(index, ProblemLog().report)
    missing: list[str] = []
    shards = 0
    with progress("images") as bar:
        task = bar.add_task("packing", total=len(records))
        for written in write_shards(records, folder, per_shard, seed, score_records):
            shards += 1
            missing += written.missing
            bar.advance(task, written.records)
    for line in missing[:_MAX_LISTED]:
        err.print(f"skipped: {escape(line)}", soft_wrap=True)
    if len(missing) > _MAX_LISTED:
        err.print(f"skipped: {len(missing) - _MAX_LISTED} more")
    out.print(
        f"{len(records) - len(missing)} images in {shards} shards in {escape(str(folder))}", soft_wrap=True
    )
    out.print(f"To train from them, set data.shards={escape(str(folder))}", soft_wrap=True)
    if missing:
        raise typer.Exit(1)
