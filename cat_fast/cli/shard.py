"""`cat-fast shard`: an image index becomes archives to train from."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cat_fast.console import err, out, progress

_TOLD = 10


def shard(
    index: Annotated[
        str,
        typer.Argument(
            help="An image index (JSON lines with path, and perhaps key, caption, has_text, has_faces, score,"
            " ratio, category), or `photographs` for the training images that ship.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder for the shards.", show_default=False),
    ],
    per_shard: Annotated[
        int, typer.Option(help="Images a shard; for training from a network, some hundred MB are good.")
    ] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the order in which images are spread over the shards.")] = 0,
) -> None:
    """Pack the images of an index into webdataset shards, with their scores beside them.

    Writes shard-000000.tar with the files as they are, shard-000000.scores.jsonl, and so on. The index is
    not held in memory, and may have any length. Interrupted, the same command goes on where it stopped;
    delete a shard's .scores.jsonl to have it written again.

    Then train from them, here or from where they were copied to:

        deepspeed --module cat_fast.train configs/tokenizer/cat_c16.yaml data.shards=DIR

        deepspeed --module cat_fast.train ... data.shards="s3://bucket/shard-{000000..037999}.tar"

    Examples:

        cat-fast shard photographs --out shards --per-shard 16

        cat-fast shard index.jsonl --out /data/shards
    """
    from cat_fast.complexity.image_ratios import PHOTOGRAPHS, load_index, score_records
    from cat_fast.data.shard_writer import IndexLines, write_shards
    from cat_fast.data.streams.formats.problems import Problems

    records = load_index(index) if index == PHOTOGRAPHS else IndexLines(index, Problems().report)
    missing: list[str] = []
    shards = 0
    with progress("images") as bar:
        task = bar.add_task("packing", total=len(records))
        for written in write_shards(records, folder, per_shard, seed, score_records):
            shards += 1
            missing += written.missing
            bar.advance(task, written.records)
    for line in missing[:_TOLD]:
        err.print(f"left out: {escape(line)}", soft_wrap=True)
    if len(missing) > _TOLD:
        err.print(f"left out: {len(missing) - _TOLD} more")
    out.print(
        f"{len(records) - len(missing)} images in {shards} shards in {escape(str(folder))}", soft_wrap=True
    )
    out.print(f"Train from them with data.shards={escape(str(folder))}", soft_wrap=True)
    if missing:
        raise typer.Exit(1)
