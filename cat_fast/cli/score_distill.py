"""`cat-fast score distill`: fit the distilled scorers to the packaged rated captions."""

from pathlib import Path
from typing import Annotated

import typer

from cat_fast import console
from cat_fast.cli.score_distill_images import distill_images
from cat_fast.data.files import require_writable, write_json
from cat_fast.errors import UserError

ASSETS = Path(__file__).parents[1] / "complexity" / "assets"


def distill(
    tier: Annotated[
        list[str] | None,
        typer.Option(help="Tier to fit; may be repeated. Default: all.", show_default=False),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the scorers and their reports. Default: that of the package.", show_default=False
        ),
    ] = ASSETS,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="photographs|INDEX",
            help="Fit the image student instead, with these captioned images: the packaged photographs, or an"
            " image index with captions, which the accurate scorer scores; may be repeated.",
            show_default=False,
        ),
    ] = None,
    rated_images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the rated ImageNet photographs (n01440764_tench.JPEG ...); required by --images.",
            show_default=False,
        ),
    ] = None,
    per_source: Annotated[
        int, typer.Option(min=1, help="Images per source of an index, for --images.")
    ] = 300,
    work: Annotated[
        Path, typer.Option(help="Folder for finished parts; a second call resumes from them.")
    ] = Path("runs/distill"),
) -> None:
    """Fit the distilled scorers to the packaged rated captions, and measure them out of fold.

    Each tier is fitted once per fold to measure its quality, then to all captions. Writes TIER_scorer.npz and
    TIER_scorer.json, which holds all figures with 95 % intervals. The accurate tier takes about 30 minutes of
    one core.

    To score the caption "distill", use cat-fast score --caption distill.

    Examples:

        cat-fast score distill --tier accurate --out scorers

        cat-fast score distill --images photographs --images corpus/train.jsonl --rated-images imagenet-sample
    """
    if images or rated_images:
        if tier or not (images and rated_images):
            raise UserError(
                "score distill: the image student needs --images and --rated-images, without --tier"
            )
        distill_images(images, rated_images, per_source, out, work / "images")
        return
    from cat_fast.complexity.distillation.tiers import TIERS

    names = tier or list(TIERS)
    if unknown := [name for name in names if name not in TIERS]:
        raise UserError(f"--tier {unknown[0]}: expected one of {', '.join(TIERS)}")
    for name in names:
        require_writable(out / f"{name}_scorer.npz")
    for name in names:
        _distill(name, out, work / name)


def _distill(name: str, out: Path, work: Path) -> None:
    import numpy as np

    from cat_fast.complexity.distillation.footprint import measure_footprint
    from cat_fast.complexity.distillation.study import predict_out_of_fold, report
    from cat_fast.complexity.distillation.tiers import TIERS
    from cat_fast.complexity.rated_captions import read_rated

    rated, chosen = read_rated(), TIERS[name]()
    with console.progress("steps") as bars:
        task = bars.add_task(name)

        def show(part: str, done: int, total: int) -> None:
            if done <= 1:
                bars.reset(task)
            bars.update(task, completed=done, total=total, description=f"{name}: {part}")

        fit = chosen.prepare(rated, work, show)
        found = predict_out_of_fold(rated, fit, work, settings=chosen.settings)
        scorer = fit(np.arange(len(rated)))
    path = out / f"{name}_scorer.npz"
    scorer.save(path)
    figures = report(rated, found) | {"version": scorer.version, "file_bytes": path.stat().st_size}
    if out == ASSETS:  # the packaged scorer is the one that loads by its name
        figures["footprint"] = measure_footprint(name)
    write_json(path.with_suffix(".json"), figures)
    for state, quality in figures["all"].items():
        agreement, spearman, mae = (quality[key]["value"] for key in ("agreement", "spearman", "mae"))
        console.out.print(
            f"{name}, flags {state}: ratio agreement {agreement:.3f}, Spearman {spearman:.3f},"
            f" mean absolute error {mae:.3f}"
        )
    console.out.print(f"Written to {path} and .json", markup=False)
