"""`cat-fast eval generation` and `cat-fast eval reference`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import DeviceOption, JsonOption, parse_ratio
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.evaluation.images.sets import Crop

_MAX_LISTED = 10
_PIPELINE = "Drawing from a pipeline"
_COUNT, _STEPS, _GUIDANCE = 50_000, 250, 1.5

CropOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Scale the centre square of each image of a folder to this side. Default: images as they are,"
        " which then must have one size.",
        show_default=False,
    ),
]
CropModeOption = Annotated[
    str,
    typer.Option(
        metavar="center|adm", help="How --crop scales: in one bicubic pass, or as ADM's center_crop_arr."
    ),
]
WeightsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NETWORK=PATH",
        help="Weights of inception, vgg16 (files) or dinov2 (a folder); may be repeated. Default: torch's"
        " cache and that of the Hugging Face hub.",
        show_default=False,
    ),
]
FeaturesOption = Annotated[
    str,
    typer.Option(
        metavar="published|proxy",
        help="proxy needs no download; its figures are named proxy-..., and compare our own runs only.",
    ),
]


def generation(
    reference: Annotated[
        Path,
        typer.Option(
            metavar="NPZ|DIR",
            help="Reference: ADM's file for the resolution, one of `cat-fast eval reference`, or a folder of"
            " images.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for generation.json and the features.", show_default=False),
    ],
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|NPZ",
            help="Folder of images, or .npz file with arr_0 (N, H, W, 3) uint8.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="fid, sfid, is, pr (precision and recall), kid, fd-dinov2. Default: all but fd-dinov2.",
            show_default=False,
        ),
    ] = None,
    features: FeaturesOption = "published",
    weights: WeightsOption = None,
    pr_features: Annotated[
        str,
        typer.Option(
            metavar="inception|vgg16",
            help="Network of precision and recall; the published tables have inception.",
        ),
    ] = "inception",
    crop: CropOption = None,
    crop_mode: CropModeOption = "center",
    rounding: Annotated[
        str,
        typer.Option(
            metavar="nearest|adm|truncate|unknown", help="How the samples became bytes, for the record."
        ),
    ] = "unknown",
    images_as_statistics: Annotated[
        bool,
        typer.Option(
            "--images-as-statistics", help="Allow FID against a reference file without mu and sigma."
        ),
    ] = False,
    allow_few_samples: Annotated[
        bool, typer.Option("--allow-few-samples", help="Allow fewer images than features.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass of a network.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of samples of a pipeline, and of subsets.")] = 0,
    pipeline: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Draw the samples from this pipeline, into OUT/samples.",
            show_default=False,
            rich_help_panel=_PIPELINE,
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(min=2, help="Number of samples to draw.", rich_help_panel=_PIPELINE)
    ] = _COUNT,
    steps: Annotated[
        int, typer.Option(min=1, help="Number of steps of the scheduler.", rich_help_panel=_PIPELINE)
    ] = _STEPS,
    guidance: Annotated[
        float, typer.Option(help="Classifier-free guidance scale.", rich_help_panel=_PIPELINE)
    ] = _GUIDANCE,
    ratio: Annotated[
        str,
        typer.Option(metavar="8|16|32|auto", help="Ratio of all images, or auto.", rich_help_panel=_PIPELINE),
    ] = "auto",
    mean_tokens: Annotated[
        float | None,
        typer.Option(
            help="Budget of tokens per image, on average.", show_default=False, rich_help_panel=_PIPELINE
        ),
    ] = None,
    coco: Annotated[
        Path | None,
        typer.Option(
            metavar="captions_val2017.json",
            help="Zero-shot protocol: draw the first caption of each image of this file.",
            show_default=False,
            rich_help_panel=_PIPELINE,
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Index of this machine.")] = 0,
    world_size: Annotated[int, typer.Option(min=1, help="Number of machines that share the work.")] = 1,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Compare generated images with a reference: FID, sFID, IS, precision, recall, KID, FD-DINOv2.

    The protocol is that of ADM, DiT and the paper: TensorFlow's resize filter and Inception weights, float64
    statistics, sFID on the first 7 channels of Mixed_6d, precision and recall with k = 3 on 10,000
    references. generation.json holds the figures with everything they depend on, and how the run deviates
    from the protocol. Comparisons that are known to mislead are refused.

    Weights are never downloaded. An interrupted evaluation resumes.

    Exit code 1: some images were left out; they are listed.

    Examples:

        cat-fast eval generation --samples fid/samples.npz --reference VIRTUAL_imagenet512.npz -o eval

        cat-fast eval generation --pipeline DIR --count 5000 --metrics kid --reference photos --crop 256
        -o eval

        cat-fast eval generation --samples images --reference photos --features proxy -o eval
    """
    if (samples is None) == (pipeline is None):
        raise UserError("expected --samples or --pipeline, got " + ("both" if samples else "neither"))
    if coco is not None and pipeline is None:
        raise UserError("--coco draws captions from a text-conditioned pipeline: pass --pipeline DIR")
    of_drawing = {
        "--count": count != _COUNT,
        "--steps": steps != _STEPS,
        "--guidance": guidance != _GUIDANCE,
        "--ratio": ratio != "auto",
        "--mean-tokens": mean_tokens is not None,
    }
    if pipeline is None and (unused := [name for name, given in of_drawing.items() if given]):
        raise UserError(f"{unused[0]}: applies to samples drawn from --pipeline DIR; leave it out")
    if pipeline is not None and rounding != "unknown":
        raise UserError(
            "--rounding: applies to --samples; those of --pipeline are rounded to the nearest level"
        )
    if rank >= world_size:
        raise UserError(f"--rank {rank}: ranks of --world-size {world_size} are 0 to {world_size - 1}")
    parsed_weights, square = parse_weights(weights), parse_crop(crop, crop_mode)
    proxy = parse_features(features)
    parse_ratio(ratio)

    from cat_fast.evaluation.generation.reference import open_reference
    from cat_fast.evaluation.generation.run import evaluate_generation
    from cat_fast.evaluation.generation.settings import GenerationSettings
    from cat_fast.evaluation.images.sets import open_images
    from cat_fast.models.device import find_device

    settings = GenerationSettings(
        metrics=tuple(part.strip() for part in metrics.split(",")) if metrics else (),
        proxy=proxy,
        weights=parsed_weights,
        pr_network=pr_features,
        rounding="nearest" if pipeline else rounding,
        images_as_statistics=images_as_statistics,
        allow_few=allow_few_samples,
        batch_size=batch_size,
        seed=seed,
    )
    place = find_device(device)
    opened = open_reference(reference, square)
    extra: dict[str, Any] = {}
    with console.progress("images") as bars:
        tasks: dict[str, Any] = {}

        def on_progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.advance(tasks[name], done)

        if pipeline is not None:
            from cat_fast.evaluation.generation.drawing import Drawing, draw_samples

            drawing = Drawing(
                pipeline=pipeline,
                count=count,
                steps=steps,
                guidance=guidance,
                ratio=ratio,
                mean_tokens=mean_tokens,
                seed=seed,
                coco=coco,
            )
            drawn = draw_samples(drawing, out / "samples", place, rank, world_size, on_progress)
            if drawn is None:
                console.out.print("other ranks are still drawing; run again once they have finished")
                return
            samples, extra = out / "samples" / "images", drawn
        assert samples is not None
        found = evaluate_generation(
            open_images(samples, square if samples.is_dir() and pipeline is None else None),
            opened,
            settings,
            out,
            place,
            rank,
            world_size,
            extra,
            on_progress,
        )
    if found is None:
        console.out.print("other ranks are still computing features; run again once they have finished")
        return
    if json_output:
        console.print_json(found.result)
    else:
        _print(found.result, out)
    report_left_out(
        [*found.result["samples"]["skipped"], *found.result["reference"]["skipped"]], found.left_out
    )


def reference(
    images: Annotated[Path, typer.Argument(metavar="DIR|NPZ", help="Images.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.npz", help="File to write.", show_default=False)
    ],
    features: Annotated[
        str, typer.Option(metavar="inception|dinov2|vgg16|proxy", help="Network of the statistics.")
    ] = "inception",
    weights: WeightsOption = None,
    crop: CropOption = None,
    crop_mode: CropModeOption = "center",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass of the network.")] = 32,
    device: DeviceOption = "auto",
) -> None:
    """Write a reference file in ADM's layout: statistics of all images, and 10,000 of them drawn at random.

    The file also records crop, size, number of images and weights, which `cat-fast eval generation` checks.
    The features are kept in FILE.features until the file is complete, so that an interrupted run resumes.

    Example: **cat-fast eval reference imagenet/train --crop 512 --crop-mode adm -o imagenet512.npz**
    """
    parsed, square = parse_weights(weights), parse_crop(crop, crop_mode)

    import shutil

    from cat_fast.data.files import require_writable
    from cat_fast.evaluation.features.loading import load_network
    from cat_fast.evaluation.generation.reference import write_reference
    from cat_fast.evaluation.images.feature_files import FeatureFiles
    from cat_fast.evaluation.images.sets import open_images
    from cat_fast.models.device import find_device

    if out.suffix != ".npz":
        raise UserError(f"--out {out}: expected a file name that ends in .npz")
    require_writable(out)
    place = find_device(device)
    opened = open_images(images, square)
    folder = out.with_suffix(".features")
    found = FeatureFiles(folder, opened, load_network(features, parsed.get(features), place))
    with console.progress("images") as bars:
        task = bars.add_task("features", total=opened.count)
        found.extract(batch_size, place, on_images=lambda number: bars.advance(task, number))
    record = write_reference(out, found)
    skipped = [entry._asdict() for entry in found.skipped()]
    shutil.rmtree(folder)
    console.out.print(
        Text(f"{out}: statistics of {record['images']['used']} images, {features} features"), soft_wrap=True
    )
    report_left_out(skipped, len(skipped))


def parse_weights(options: list[str] | None) -> dict[str, Path]:
    """Parse NETWORK=PATH options."""
    found = {}
    for option in options or ():
        name, separator, path = option.partition("=")
        if not separator or not path:
            raise UserError(f"--weights {option}: expected NETWORK=PATH, such as inception=weights.pth")
        found[name] = Path(path)
    return found


def parse_crop(size: int | None, mode: str) -> "Crop | None":
    """Parse the options of the crop."""
    if mode not in ("center", "adm"):
        raise UserError(f"--crop-mode {mode}: expected center or adm")
    if size is None:
        if mode != "center":
            raise UserError(f"--crop-mode {mode}: applies to --crop SIZE; give both, or leave it out")
        return None
    from cat_fast.evaluation.images.sets import Crop

    return Crop(size, mode)


def parse_features(name: str) -> bool:
    """Return True for the proxy."""
    if name not in ("published", "proxy"):
        raise UserError(f"--features {name}: expected published or proxy")
    return name == "proxy"


def report_left_out(skipped: list[dict[str, str]], count: int) -> None:
    """List images that were left out of the figures, and exit with code 1 if there are any."""
    for entry in skipped[:_MAX_LISTED]:
        console.err.print(Text(f"left out: {entry['name']}: {entry['why']}"), soft_wrap=True)
    if len(skipped) > _MAX_LISTED:
        console.err.print(f"left out: {len(skipped) - _MAX_LISTED} more; the JSON result lists all")
    if count:
        raise typer.Exit(1)


def _print(result: dict[str, Any], out: Path) -> None:
    table = Table("metric", "value")
    for name, value in result["metrics"].items():
        text = (
            " to ".join(f"{bound:.4g}" for bound in value)
            if isinstance(value, list)
            else f"{value:.4f}"
            if abs(value) < 1
            else f"{value:.2f}"
        )
        table.add_row(name, text)
    console.out.print(table)
    samples = result["samples"]
    console.out.print(
        Text(f"{samples['used']} samples of {samples['width']} x {samples['height']} px"), soft_wrap=True
    )
    if "note" in result:
        console.out.print(Text(result["note"]), soft_wrap=True)
    for deviation in result["deviations"]:
        console.out.print(Text(f"not the published protocol: {deviation}"), soft_wrap=True)
    console.out.print(Text(f"Written to {out / 'generation.json'}"), soft_wrap=True)
