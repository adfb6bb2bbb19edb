"""`cat-fast eval reconstruction`."""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import DeviceOption, JsonOption, ThresholdsOption
from cat_fast.cli.eval_generation import (
    FeaturesOption,
    WeightsOption,
    parse_features,
    parse_weights,
    report_left_out,
)
from cat_fast.cli.evaluation_options import TokenizerOption
from cat_fast.errors import UserError

RESULT = "reconstruction.json"


def reconstruction(
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR|SHARDS",
            help="Images: a folder, archives (quoted pattern), an image index, or `photographs`, the held-out"
            " ones of the package. rFID is published for validation images.",
            show_default=False,
        ),
    ],
    tokenizer: TokenizerOption,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for reconstruction.json, images.parquet, worst.png and the parts.",
            show_default=False,
        ),
    ],
    ratios: Annotated[
        str,
        typer.Option(
            metavar="RULE,...",
            help="Rules that choose each image's ratio: adaptive (by --scores), 8, 16, 32, equalized (all at"
            " 16x), jpeg, budget=N (N tokens per image on average).",
        ),
    ] = "adaptive,8,16,32",
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Scores by key, as `cat-fast score` writes (.parquet, .jsonl). Default: labels of the"
            " images.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR[@RULE,...]",
            help="Another tokenizer in the same run; may be repeated. DIR is a folder of ours, of diffusers'"
            " AutoencoderKL or AutoencoderDC, or flextok:DIR or titok:DIR.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Side of the centre squares in pixels.")] = 256,
    thresholds: ThresholdsOption = None,
    features: FeaturesOption = "published",
    weights: WeightsOption = None,
    ocr: Annotated[bool, typer.Option("--ocr/--no-ocr", help="Read text, a second per page.")] = True,
    faces: Annotated[bool, typer.Option("--faces/--no-faces", help="Look for faces.")] = True,
    save_images: Annotated[
        bool, typer.Option("--save-images", help="Write all reconstructions to OUT/images as PNG.")
    ] = False,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="validation|test|train|unknown",
            help="Split of the images. Default: from the path; a training split is refused.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of images.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 8,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Processes for OCR and faces. Default: one per core.", show_default=False),
    ] = os.cpu_count() or 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Measure how well tokenizers reconstruct images: rFID, LPIPS, PSNR, SSIM, text, faces, rate and cost.

    All rules and baselines see the same images. Every figure has a 95 % interval. worst.png shows the images
    that the first rule reconstructs worst, images.parquet has one row per image and rule.

    Pages without words and photographs without faces are counted, and left out of those figures. Images
    without a score are left out of all figures if a rule needs scores. An interrupted evaluation resumes.

    Exit code 1: some images were left out; they are listed.

    Examples:

        cat-fast eval reconstruction --data imagenet/val --tokenizer DIR --size 512 --scores scores.parquet
        --ratios adaptive,8,16,32,equalized --baseline sd=sd-vae-ft-mse -o eval

        cat-fast eval reconstruction --data photographs --tokenizer nano --features proxy -o eval --no-ocr
    """
    proxy, given = parse_features(features), parse_weights(weights)
    if split not in (None, "validation", "test", "train", "unknown"):
        raise UserError(f"--split {split}: expected validation, test, train or unknown")

    from cat_fast.complexity import RatioThresholds
    from cat_fast.data.files import require_writable, write_json
    from cat_fast.evaluation.features.loading import load_network
    from cat_fast.evaluation.features.perceptual import load_perceptual
    from cat_fast.evaluation.tokenizers.columns import Column, parse_columns, require_distinct_names
    from cat_fast.evaluation.tokenizers.gallery import write_gallery
    from cat_fast.evaluation.tokenizers.perception import perception
    from cat_fast.evaluation.tokenizers.protocol import open_tokenizer
    from cat_fast.evaluation.tokenizers.run import ReconstructionRun, ReconstructionSettings
    from cat_fast.evaluation.tokenizers.samples import open_samples
    from cat_fast.evaluation.tokenizers.summary import summarize, write_images
    from cat_fast.models.device import find_device

    require_writable(out / RESULT)
    place = find_device(device)
    network = load_network("proxy" if proxy else "inception", given.get("inception"), place)
    perceptual = load_perceptual(proxy, given.get("vgg16"))
    perceptual.network.to(place)
    pair = RatioThresholds.parse(thresholds) if thresholds is not None else None
    columns: list[Column] = parse_columns(open_tokenizer(tokenizer, device, "ours"), ratios.split(","), pair)
    for spec in baseline or ():
        name, path, rules = parse_baseline(spec)
        columns += parse_columns(open_tokenizer(path, device, name), rules, pair)
    require_distinct_names(columns)
    samples = open_samples(data, scores, any(column.needs_scores for column in columns), split, limit)
    settings = ReconstructionSettings(
        size=size, batch_size=batch_size, ocr=ocr, faces=faces, save_images=save_images, seed=seed
    )
    run = ReconstructionRun(samples, columns, settings, network, perceptual, out, place)
    started = time.perf_counter()
    with perception(ocr, faces, workers) as perceiver, console.progress("images") as bars:
        task = bars.add_task("reconstructing", total=len(samples.scored))
        run.run(perceiver, lambda count: bars.advance(task, count))
        results = run.results()
        task = bars.add_task("figures", total=len(columns))
        result = summarize(
            run, results, perceiver.versions, time.perf_counter() - started, lambda: bars.advance(task)
        )
    write_images(out / "images.parquet", run, results)
    write_gallery(out / "worst.png", run, results)
    write_json(out / RESULT, result)
    if json_output:
        console.print_json(result)
    else:
        _print(result, out)
    report_left_out([entry._asdict() for entry in results.skipped], len(results.skipped))


def parse_baseline(spec: str) -> tuple[str, str, list[str]]:
    """Parse [NAME=]DIR[@RULE,...] into name, path and rules."""
    name, separator, rest = spec.partition("=")
    if not separator or "/" in name or "@" in name:
        name, rest = "", spec
    path, _, rules = rest.partition("@")
    if not path:
        raise UserError(f"--baseline {spec}: expected [NAME=]DIR[@RULE,...]")
    return name, path, rules.split(",") if rules else []


_METRICS_PER_TABLE = 3


def _print(result: dict[str, Any], out: Path) -> None:
    columns = result["columns"]
    metrics = next(iter(columns.values()))["metrics"]
    figures = ("OCR-confidence", "CER", "faces-found-again")
    names = [name for name, value in metrics.items() if isinstance(value, dict) or name in figures]
    for first in range(0, len(names), _METRICS_PER_TABLE):
        some = names[first : first + _METRICS_PER_TABLE]
        table = Table("", *some)
        if "OCR-confidence" in some:
            original = f"{metrics['OCR-confidence-originals'] or 0:.4g}"
            table.add_row("originals", *(original if name == "OCR-confidence" else "" for name in some))
        for name, column in columns.items():
            table.add_row(name, *(_format(column["metrics"][metric]) for metric in some))
        console.out.print(table)
    table = Table("", "ratios", "tokens", "average rate", "GFLOP")
    for name, column in columns.items():
        cost = "-" if column["flops"] is None else f"{column['flops'] / 1e9:.4g}"
        rate = (f"{column[key]:.4g}" for key in ("tokens", "average_rate"))
        table.add_row(name, _mix(column["distribution"]), *rate, cost)
    console.out.print(table)
    counts = {"without words": "CER-originals-without-words", "without faces": "images-without-faces"}
    left_out = [f"{metrics[key]} {what}" for what, key in counts.items() if key in metrics]
    about = "{images} images of {size} px, {split} split".format(**result["data"])
    for line in (
        f"{about}{', '.join(['', *left_out])}; below each figure its 95 % interval",
        *(f"Not the published protocol: {deviation}" for deviation in result["deviations"]),
        f"Written to {out / RESULT}; worst images in {out / 'worst.png'}",
    ):
        console.out.print(Text(line), soft_wrap=True)


def _format(figure: dict[str, Any] | None) -> str:
    """Return a figure, with its interval on a second line."""
    from cat_fast.evaluation.published.formats import format_value

    if figure is None or figure["value"] is None:
        return "-"
    value = format_value(figure["value"])
    if figure["interval"] is None:
        return value
    return f"{value}\n{' to '.join(map(format_value, figure['interval']))}"


def _mix(distribution: dict[str, float]) -> str:
    return ", ".join(f"{choice}: {100 * share:.0f} %" for choice, share in distribution.items())
