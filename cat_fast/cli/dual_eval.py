"""`cat-fast dual eval`: guides and re-rendered images against baselines of equal size or equal bits."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import DeviceOption, DtypeOption, JsonOption, LinearBackendOption
from cat_fast.cli.dual_codec import CheckpointOption, GuidanceOption, StepsOption, StrengthOption
from cat_fast.errors import UserError

RESULT = "dual.json"


def evaluate(
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR|INDEX.jsonl|photographs",
            help="Images: a folder, an image index, or the held-out photographs of the package.",
            show_default=False,
        ),
    ],
    checkpoint: CheckpointOption,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for dual.json, sheet.png and rows.jsonl.", show_default=False
        ),
    ],
    grids: Annotated[str, typer.Option(metavar="SIDE|HxW,...", help="Guide sizes in tokens.")] = "2,4,8,16",
    size: Annotated[int, typer.Option(min=16, help="Side of the centre squares in pixels.")] = 128,
    render: Annotated[
        bool,
        typer.Option(
            "--render/--no-render",
            help="Re-render guides, if the tokenizer has a diffusion model, with its ablations.",
        ),
    ] = True,
    steps: StepsOption = 50,
    strength: StrengthOption = 1.0,
    guidance: GuidanceOption = 1.0,
    super_resolution: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights of a super-resolution network, such as RealESRGAN_x4plus.pth (package spandrel).",
            show_default=False,
        ),
    ] = None,
    movq: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of a MoVQ, a diffusers VQModel with spatial norms, to compare at equal numbers of"
            " tokens.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of images.", show_default=False)
    ] = None,
    sheet: Annotated[int, typer.Option(min=0, help="Images in sheet.png; 0 leaves it out.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "fp32",
    linear_backend: LinearBackendOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Measure a dual-token tokenizer: PSNR, SSIM, perceptual distance, tokens, bits and codebook use.

    For each guide size: the enlarged guide; the image downscaled to the guide's size, its limit; JPEG and
    WebP files of as many bits, where one is that small; optionally, a super-resolution network and MoVQ; and,
    with a diffusion model, the re-rendered image with its ablations. Differences between methods are paired
    over images. Every figure has a 95 % interval.

    --dtype is that of the diffusion model; guides are decoded in fp32.

    Published figures are printed by `cat-fast eval table dual-reconstruction`. An interrupted evaluation
    resumes.

    Exit code 1: some images were left out; they are listed.

    Examples:

        cat-fast dual eval --data photographs -c runs/nano_dual_guide/model -o eval/guide

        cat-fast dual eval --data corpus/held_out.jsonl -c runs/dual_tokenizer -o eval/dual --limit 100
    """
    from cat_fast.dual_token.grid import parse_grid

    sides = list(dict.fromkeys(parse_grid(part, "--grids") for part in grids.split(",")))

    from cat_fast.data.files import require_writable, sha256, write_json
    from cat_fast.data.folder_settings import stored_settings
    from cat_fast.dual_token.rerender.rerender import RerenderSettings
    from cat_fast.dual_token.tokenizer import DualTokenizer
    from cat_fast.evaluation.dual_token.methods import make_methods
    from cat_fast.evaluation.dual_token.movq import MoVQ
    from cat_fast.evaluation.dual_token.run import SETTINGS, DualRun, evaluated_images
    from cat_fast.evaluation.dual_token.summary import summarize
    from cat_fast.evaluation.dual_token.super_resolution import open_super_resolution
    from cat_fast.kernels.linear.op import using
    from cat_fast.models.execution import find_dtype, find_linear_backend
    from cat_fast.tokenizer.perceptual import perceptual_distance

    require_writable(out / RESULT)
    images = evaluated_images(data, limit)
    tokenizer = DualTokenizer.from_pretrained(checkpoint, device)
    tokenizer.renderer_dtype = find_dtype(dtype, tokenizer.device)
    settings = RerenderSettings(steps=steps, strength=strength, guidance_scale=guidance)
    rendered = render and tokenizer.renderer is not None
    if rendered:
        tokenizer.backend.check_size((size, size))
    if too_large := [grid for grid in sides if max(tokenizer.guide.guide_size(grid)) > size]:
        raise UserError(
            f"--grids {grids}: the guide of {too_large[0][0]} x {too_large[0][1]} tokens is larger than"
            f" images of {size} px; raise --size, or leave it out"
        )
    upscale = None if super_resolution is None else open_super_resolution(super_resolution, device)
    baseline = None if movq is None else MoVQ(movq, device)
    methods = make_methods(tokenizer, sides, settings if rendered else None, upscale, baseline)
    options: dict[str, Any] = {"data": data}
    if rendered:
        options |= {"steps": steps, "strength": strength, "guidance": guidance}
        options["renderer"] = tokenizer.backend.fingerprint()
    if super_resolution is not None:
        options["super_resolution"] = sha256(super_resolution)[:16]
    if baseline is not None:
        options["movq"] = baseline.fingerprint()
    backend = find_linear_backend(linear_backend, stored_settings(out / SETTINGS), tokenizer.device)
    with using(backend), console.progress("images") as bar:
        run = DualRun(images, methods, tokenizer, sides, size, perceptual_distance("auto"), out, options)
        task = bar.add_task("evaluating", total=len(images))
        run.run(lambda count: bar.advance(task, count))
        result = summarize(run, data, seed)
        write_json(out / RESULT, result)
        if not result["images"]:
            raise UserError(f"{data}: no image could be read: {next(iter(result['left_out'].values()))}")
        if sheet:
            run.write_sheet(sheet)
    if json_output:
        console.print_json(result)
    else:
        _print(result, out)
    for error in result["left_out"].values():
        console.print_error(error)
    if result["left_out"]:
        raise typer.Exit(1)


def _print(result: dict[str, Any], out: Path) -> None:
    names = [
        name for name in next(iter(result["methods"].values())) if name not in ("tokens", "bits", "images")
    ]
    table = Table("method", "tokens", "bits", "images", *names)
    for name, figures in result["methods"].items():
        cells = [_count(figures["tokens"]), _count(figures["bits"]), str(figures["images"])]
        table.add_row(Text(name), *cells, *(_format(figures[metric]) for metric in names))
    console.out.print(table)
    for name, used in result["codebooks"].items():
        line = f"{name}: {used['used']:.0%} of {used['size']} codes used, perplexity {used['perplexity']:.1f}"
        console.out.print(Text(line), soft_wrap=True)
    console.out.print(Text(f"Written to {out / RESULT}"), soft_wrap=True)


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _format(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    low, high = figure["interval"]
    return f"{figure['value']:.3g} ({low:.3g} to {high:.3g})"
