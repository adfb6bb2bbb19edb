"""`cat-fast sample`: draw images of labels or descriptions."""

import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import DtypeOption, LinearBackendOption, TierOption, parse_ratio
from cat_fast.cli.labels import parse_labels
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.complexity import Description
    from cat_fast.inference.sampling_run.run import SampleRun

_MANY = "Many images"


def sample(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the images.", show_default=False)
    ],
    pipeline: Annotated[
        Path,
        typer.Option(
            "--pipeline",
            "-p",
            metavar="DIR",
            help="Folder of a pipeline, from `cat-fast pipeline` or `cat-fast demo --train`; or nano, the one"
            " that ships with the package.",
        ),
    ] = Path("nano"),
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels",
            "-l",
            help="Class names or numbers, separated by commas; may be repeated. Default: all classes.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Sentence to draw; may be repeated; for generators trained with text.",
            show_default=False,
        ),
    ] = None,
    descriptions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Descriptions to draw, one per line (.txt), or objects with caption, has_text and has_faces"
            " (.jsonl); for generators trained with text.",
            show_default=False,
        ),
    ] = None,
    ratio: Annotated[
        str,
        typer.Option(
            metavar="auto|8|16|32", help="Compression ratio; auto chooses it by each prompt's complexity."
        ),
    ] = "auto",
    mean_tokens: Annotated[
        float | None,
        typer.Option(
            help="Budget of tokens per image, on average; more complex images get more of it.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of steps of the scheduler. Default: the pipeline's, 250 if it sets none.",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            metavar="SCALE",
            help="Classifier-free guidance scale; 1 disables guidance. A scale per ratio is given as"
            " 8=2,16=3,32=4. Default: the pipeline's, 1.5 if it sets none.",
            show_default=False,
        ),
    ] = None,
    guidance_channels: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of leading latent channels to guide; the original DiT guides 3. Default: all.",
            show_default=False,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ddpm|ddim|dpm++|euler",
            help="ddim and dpm++ need 30 to 50 steps; euler is for models trained as flows. Default: the"
            " pipeline's scheduler.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i is drawn from SEED + i.")] = 0,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N|WxH",
            help="Side in pixels, or width and height. Default: the resolution of training.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Write the first hundred images to one sheet, grid.png.")
    ] = False,
    npz: Annotated[
        bool, typer.Option("--npz", help="Write samples.npz for FID: arr_0 images, arr_1 labels.")
    ] = False,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Total number of images; labels take turns.",
            show_default=False,
            rich_help_panel=_MANY,
        ),
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option(min=1, help="Number of images per label.", show_default=False, rich_help_panel=_MANY),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens per forward pass; lower it if you run out of memory.", rich_help_panel=_MANY
        ),
    ] = 16_384,
    rank: Annotated[int, typer.Option(min=0, help="Index of this machine.", rich_help_panel=_MANY)] = 0,
    world_size: Annotated[
        int, typer.Option(min=1, help="Number of machines that share the work.", rich_help_panel=_MANY)
    ] = 1,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes the first GPU, else the CPU.")
    ] = "auto",
    dtype: DtypeOption = "auto",
    linear_backend: LinearBackendOption = "auto",
    tier: TierOption = "exact",
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Draw images of classes or descriptions, with more tokens for more complex ones.

    Writes images/000000.png and so on to DIR, and samples.json with each image's label, ratio, tokens and
    seed. After an interruption, the same command draws the missing images only. The result is bit-identical
    to an uninterrupted run.

    Examples:

        cat-fast sample --prompt "red apple" --prompt robot --out images

        cat-fast sample -p runs/demo/pipeline --labels "sky,text" --out images --grid --steps 30
        --scheduler ddim

        cat-fast sample -p DIR --count 50000 --npz --out fid --mean-tokens 216

        cat-fast sample -p DIR --descriptions prompts.txt --out images --ratio auto
    """
    fixed = parse_ratio(ratio)
    width, height = _parse_size(size)
    given = {"--labels": labels, "--prompt": prompt, "--descriptions": descriptions}
    if len(names := [name for name, value in given.items() if value]) > 1:
        raise UserError(f"expected one of --labels, --prompt and --descriptions, got {' and '.join(names)}")
    if count and per_class:
        raise UserError("expected --count or --per-class, got both")
    if rank >= world_size:
        raise UserError(f"--rank {rank}: ranks of --world-size {world_size} are 0 to {world_size - 1}")
    if scheduler not in (None, "ddpm", "ddim", "dpm++", "euler"):
        raise UserError(f"--scheduler {scheduler}: expected ddpm, ddim, dpm++ or euler")
    described = _read(descriptions) if descriptions else prompt

    from cat_fast.data.folder_settings import stored_settings
    from cat_fast.inference.pipeline.loading import load_pipeline
    from cat_fast.inference.sampling_run.run import PLAN, SampleRun, SampleSettings
    from cat_fast.kernels.linear.op import using
    from cat_fast.models.decode_tier import check_tier
    from cat_fast.models.device import find_device
    from cat_fast.models.execution import find_dtype, find_linear_backend
    from cat_fast.weights.shipped import shipped_folder

    check_tier(tier)
    pipeline, target = shipped_folder(str(pipeline)) or pipeline, find_device(device)
    models = load_pipeline(pipeline, target, find_dtype(dtype, target))
    prompts: Any = described or (parse_labels(labels, models.labels, "--labels") if labels else models.labels)
    total = count or (per_class or 1) * len(prompts)
    chosen: Literal["auto"] | int = "auto" if fixed is None else fixed
    settings = SampleSettings(
        ratio=chosen,
        mean_tokens=mean_tokens,
        height=height,
        width=width,
        num_inference_steps=steps or models.default_steps,
        guidance_scale=_parse_guidance(guidance) if guidance else models.default_guidance,
        guidance_channels=guidance_channels,
        scheduler=scheduler,  # type: ignore[arg-type] # checked above
        seed=seed,
        max_tokens=max_tokens,
        decode_tier=tier,
    )
    started = time.perf_counter()
    recorded = stored_settings(out / PLAN).get("settings", {})
    backend = find_linear_backend(linear_backend, recorded, models.device)
    with using(backend), console.progress("images") as bars:
        run = SampleRun(models, [prompts[i % len(prompts)] for i in range(total)], settings, out, pipeline)
        own = sum(map(len, run.batches[rank::world_size]))
        task = bars.add_task("drawing", total=own, completed=own - run.count_missing(rank, world_size))
        drawn = run.draw(rank, world_size, lambda images: bars.advance(task, images))
    seconds = time.perf_counter() - started
    missing = run.count_missing()
    summary = _summary(run) | {
        "out": str(out),
        "drawn_now": drawn,
        "missing": missing,
        "seconds": round(seconds, 2),
        "images_per_second": round(drawn / seconds, 3),
        "grid": str(run.write_grid()) if grid and not missing else None,
        "npz": str(run.write_npz()) if npz and not missing else None,
    }
    if json_output:
        console.print_json(summary)
    else:
        _print(summary)


def _parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Return width and height of "N" or "WxH"."""
    if text is None:
        return None, None
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise UserError(f"--size {text}: expected a side in pixels, or WxH such as 768x512")
    return int(match[1]), int(match[2] or match[1])


def _read(path: Path) -> "list[Description]":
    from cat_fast.complexity import read_descriptions

    return read_descriptions(path)


def _summary(run: "SampleRun") -> dict[str, Any]:
    ratios = Counter(request.ratio for request in run.requests)
    height, width = run.size
    patch = run.pipeline.transformer.config.patch_size
    return {
        "images": len(run.requests),
        "height": height,
        "width": width,
        "ratios": {str(ratio): ratios[ratio] for ratio in sorted(ratios)},
        "mean_tokens": sum(request.num_tokens for request in run.requests) / len(run.requests),
        "fixed_16x_tokens": height * width / (16 * patch) ** 2,
    }


def _print(summary: dict[str, Any]) -> None:
    mix = ", ".join(f"{count} at {ratio}x" for ratio, count in summary["ratios"].items())
    fixed = summary["fixed_16x_tokens"]
    console.out.print(
        f"{summary['images']} images, {summary['drawn_now']} of them drawn now: {mix}; mean"
        f" {summary['mean_tokens']:.1f} tokens against {fixed:g} at a fixed 16x"
        f" ({summary['mean_tokens'] / fixed - 1:+.1%})",
        soft_wrap=True,
    )
    if summary["missing"]:
        console.out.print(f"{summary['missing']} images are still missing; other ranks draw them")
    for path in (summary["grid"], summary["npz"], f"{summary['out']}/samples.json"):
        if path:
            console.out.print(Text(path), soft_wrap=True)


def _parse_guidance(text: str) -> float | dict[int, float]:
    """Return one guidance scale, or one per ratio from a list such as 8=2,16=3,32=4."""
    try:
        if "=" not in text:
            return float(text)
        pairs = [entry.split("=") for entry in text.split(",")]
        return {int(ratio): float(scale) for ratio, scale in pairs}
    except ValueError as error:
        raise UserError(f"--guidance {text}: expected a number, or scales such as 8=2,16=3,32=4") from error
