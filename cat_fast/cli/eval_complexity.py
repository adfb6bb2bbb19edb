"""`cat-fast eval complexity`: the paper's study of complexity on any set of images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cat_fast import console
from cat_fast.data.files import require_writable
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.data.streams.formats.base import ShardSet


def complexity(
    images: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|INDEX|SHARDS|photographs",
            help="Images: a folder, an image index, archives, or the packaged photographs.",
            show_default=False,
        ),
    ],
    scores: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]FILE",
            help="File of cat-fast score for these images; repeat it to compare captioners and scorers. The"
            " first one is the score under study.",
            show_default=False,
        ),
    ],
    checkpoint: Annotated[
        list[str],
        typer.Option(
            metavar="FOLDER|FILE",
            help="Tokenizer that decides the best ratio of each image; repeat it for several with one ratio"
            " each, such as LDM's VAEs at 8x, 16x and 32x.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the report; resumes.")
    ] = Path("runs/complexity"),
    signal: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|FILE",
            help="Autoencoder whose errors are compared as metrics, such as sd-vae-ft-mse. Default: the"
            " tokenizer at its smallest ratio.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=32, help="Side in pixels of the reconstructed squares.")] = 512,
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Thresholds of the scores. Default: the published 4,7.", show_default=False
        ),
    ] = None,
    distance: Annotated[
        str,
        typer.Option(help="Perceptual distance: lpips_vgg, st_lpips_alex ...; auto: lpips_vgg if cached."),
    ] = "auto",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of images; default: all.", show_default=False)
    ] = None,
    gallery: Annotated[
        int, typer.Option(min=0, help="Images shown per pair of metrics that disagree; 0 for none.")
    ] = 6,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto uses a GPU if available.")
    ] = "auto",
) -> None:
    """Study how well scores and pixel signals predict the best ratio of each image (the paper's section 3.1).

    Reconstructs each image at every ratio of the tokenizer and determines the maximum acceptable ratio: the
    largest one whose error is within a tolerance of the best. Writes report.html, study.json, images.parquet
    and plots: correlation of every metric with it, agreement, mixes of ratios, robustness across scorers, and
    images on which metrics disagree. Exit code 1: some images could not be read.

    Examples:

        cat-fast score photos/ --out scores.parquet

        cat-fast eval complexity --images photos/ --scores scores.parquet --checkpoint runs/tokenizer/model

        cat-fast eval complexity --images photos/ --scores vlm=a.parquet --scores student=b.parquet
        --checkpoint ldm/f8 --checkpoint ldm/f16 --checkpoint ldm/f32 --signal sd-vae-ft-mse
    """
    from cat_fast.complexity import RatioThresholds
    from cat_fast.evaluation.complexity_study.images import open_study_images
    from cat_fast.evaluation.complexity_study.run import StudySettings, run_study
    from cat_fast.evaluation.complexity_study.scores import ScoreSet
    from cat_fast.tokenizer.perceptual import PERCEPTUAL

    if distance not in PERCEPTUAL:
        raise UserError(f"--distance {distance}: expected one of {', '.join(PERCEPTUAL)}")
    chosen = RatioThresholds.parse(thresholds) if thresholds is not None else None
    score_sets = [ScoreSet.read(argument) for argument in scores]
    names = [found.name for found in score_sets]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--scores: two files are named {repeated[0]}; name them, as in --scores NAME=FILE")
    require_writable(out / "study.json")
    opened = open_study_images(images)
    settings = StudySettings(
        images=images, checkpoints=checkpoint, signal=signal, size=size, distance=distance
    )
    with console.progress("images") as bars:
        total = _count(opened)
        bar = bars.add_task("measuring", total=total if limit is None else min(limit, total or limit))
        results = run_study(
            out,
            settings,
            opened,
            score_sets,
            thresholds=chosen,
            limit=limit,
            gallery=gallery,
            device=device,
            on_done=lambda: bars.advance(bar),
        )
    _print(results)
    console.out.print(f"Written to {out / 'report.html'}", markup=False, soft_wrap=True)
    for key, error in results["unreadable"].items():
        console.err.print(f"not measured: {key}: {error}", markup=False, soft_wrap=True)
    if results["unreadable"]:
        raise typer.Exit(1)


def _count(images: "ShardSet") -> int | None:
    """Return the number of images, None if it is not known before they are read."""
    from cat_fast.data.streams.formats.image_files import FolderShards, IndexShards, RecordShards

    return images.extent if isinstance(images, FolderShards | IndexShards | RecordShards) else None


def _print(results: dict[str, Any]) -> None:
    table = Table("metric", title=f"{results['images']} images, best ratio at τ = {results['tau']:g}")
    for column in ("Pearson", "Spearman", "agreement", "8x/16x/32x"):
        table.add_column(column, justify="right")
    for name, metric in results["metrics"].items():
        mix = "/".join(f"{share:.0%}".rstrip("%") for share in metric.get("mix", {}).values())
        values = [f"{metric[key]['value']:.2f}" for key in ("pearson", "spearman", "agreement_fitted")]
        table.add_row(name, *values, mix)
    console.out.print(table)
    console.out.print(results["verdict"], markup=False)
