"""`cat-fast eval alignment`: agreement of images with their captions."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import DeviceOption, JsonOption, report_errors


def alignment(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Images, or folders.", show_default=False)
    ],
    scorer: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=WEIGHTS",
            help="pickscore=DIR, hpsv2=FILE or imagereward=DIR; may be repeated. Nothing is downloaded.",
            show_default=False,
        ),
    ],
    captions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Captions: one {"file": ..., "caption": ...} per line. Default: text files next to images.',
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Score how well images agree with their captions, by published preference models.

    Images that cannot be read are reported and left out (exit code 1).

    For the published comparison of re-rendered images, see `cat-fast eval table dual-alignment`.

    Example:

        cat-fast eval alignment images/ --captions captions.jsonl --scorer pickscore=PickScore_v1
    """
    from cat_fast.data.images.io import distinct_files, find_images

    files = distinct_files(find_images(images))

    from cat_fast.evaluation.alignment.run import captioned_images, measure
    from cat_fast.evaluation.alignment.scorers import open_scorer
    from cat_fast.inference.encoding.photo_descriptions import PhotoDescriptions, read_photo_captions

    rows = read_photo_captions(captions) if captions else None
    captioned = captioned_images(files, PhotoDescriptions(rows=rows))
    scorers = [open_scorer(spec, device) for spec in scorer]
    with console.progress("images") as bar:
        task = bar.add_task("scoring", total=len(captioned))
        result = measure(captioned, scorers, batch_size, seed, lambda count: bar.advance(task, count))
    if json_output:
        console.print_json(result)
    else:
        table = Table("scorer", "mean", "95 %")
        for name, figure in result["metrics"].items():
            low, high = figure["interval"]
            table.add_row(Text(name), f"{figure['value']:.3f}", f"{low:.3f} to {high:.3f}")
        console.out.print(table)
    report_errors(list(result["left_out"].values()), len(captioned), "scored")
