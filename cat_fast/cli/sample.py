"""`cat-fast sample`: labels or descriptions to images, one or fifty thousand."""

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import parse_ratio
from cat_fast.cli.codec_tables import print_json
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
            help="What `cat-fast pipeline` wrote; `cat-fast demo` leaves one here.",
        ),
    ] = Path("runs/demo/pipeline"),
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels",
            "-l",
            help="Names or numbers of classes, with commas between them or --labels again. Default: all"
            " classes.",
            show_default=False,
        ),
    ] = None,
    descriptions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What to draw: a description a line (.txt), or objects with caption, has_text and has_faces"
            " (.jsonl); for generators trained with text.",
            show_default=False,
        ),
    ] = None,
    ratio: Annotated[
        str,
        typer.Option(metavar="auto|8|16|32", help="Compression ratio; auto: what each description earns."),
    ] = "auto",
    mean_tokens: Annotated[
        float | None,
        typer.Option(
            help="Tokens an image may cost in the mean; the more complex ones get more of them.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the scheduler.")] = 250,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.5,
    scheduler: Annotated[
        str,
        typer.Option(
            metavar="ddpm|ddim|dpm++|euler",
            help="ddim and dpm++ need some 30 to 50 steps; euler is for models trained as flows.",
        ),
    ] = "ddpm",
    seed: Annotated[int, typer.Option(min=0, help="Image i is drawn from SEED + i.")] = 0,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Side in pixels. Default: what it was trained at.", show_default=False),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also put the first hundred on one sheet.")] = False,
    npz: Annotated[
        bool, typer.Option("--npz", help="Also samples.npz for FID: arr_0 images, arr_1 labels.")
    ] = False,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Images in all, labels in turn.", show_default=False, rich_help_panel=_MANY),
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option(min=1, help="Images of each label.", show_default=False, rich_help_panel=_MANY),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens a forward pass; lower it when memory runs out.", rich_help_panel=_MANY
        ),
    ] = 16_384,
    rank: Annotated[
        int, typer.Option(min=0, help="Which of the machines this is.", rich_help_panel=_MANY)
    ] = 0,
    world_size: Annotated[
        int, typer.Option(min=1, help="How many share the work.", rich_help_panel=_MANY)
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if any.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Draw images of classes, or of descriptions, each with the tokens its complexity earns.

    DIR gets images/000000.png and so on, and samples.json, which says of each its label, ratio, tokens and
    seed. Interrupted or killed, the same command draws only what is missing, and the images are to the bit
    those of a run without a break.

    Examples:

        cat-fast sample --labels "sky,text" --out images --grid --steps 30 --scheduler ddim

        cat-fast sample -p DIR --count 50000 --npz --out fid --mean-tokens 216

        cat-fast sample -p DIR --descriptions prompts.txt --out images --ratio auto
    """
    fixed = parse_ratio(ratio)
    if labels and descriptions:
        raise UserError("--labels and --descriptions: give one of them")
    if count and per_class:
        raise UserError("--count and --per-class: give one of them")
    if rank >= world_size:
        raise UserError(f"--rank {rank}: ranks of --world-size {world_size} are 0 to {world_size - 1}")
    if scheduler not in ("ddpm", "ddim", "dpm++", "euler"):
        raise UserError(f"--scheduler {scheduler}: expected ddpm, ddim, dpm++ or euler")
    described = _read(descriptions) if descriptions else None

    from cat_fast.inference import CATPipeline
    from cat_fast.inference.sampling_run.run import SampleRun, SampleSettings
    from cat_fast.models.device import find_device

    models = CATPipeline.from_pretrained(pipeline).to(find_device(device))
    prompts: Any = described or (parse_labels(labels, models.labels, "--labels") if labels else models.labels)
    wanted = count or (per_class or 1) * len(prompts)
    chosen: Literal["auto"] | int = "auto" if fixed is None else fixed
    settings = SampleSettings(
        ratio=chosen,
        mean_tokens=mean_tokens,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,  # type: ignore[arg-type] # checked above
        seed=seed,
        size=size,
        max_tokens=max_tokens,
    )
    run = SampleRun(models, [prompts[i % len(prompts)] for i in range(wanted)], settings, out, pipeline)
    begun = time.perf_counter()
    with console.progress("images") as bars:
        mine = sum(map(len, run.batches[rank::world_size]))
        there = mine - run.count_missing(rank, world_size)
        task = bars.add_task("drawing", total=mine, completed=there)
        drawn = run.draw(rank, world_size, lambda images: bars.advance(task, images))
    seconds = time.perf_counter() - begun
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
        print_json(summary)
    else:
        _tell(summary)


def _read(path: Path) -> "list[Description]":
    from cat_fast.complexity import read_descriptions

    return read_descriptions(path)


def _summary(run: "SampleRun") -> dict[str, Any]:
    ratios = Counter(request.ratio for request in run.requests)
    size = run.settings.size or run.pipeline.resolution
    patch = run.pipeline.generator.config.patch_size
    return {
        "images": len(run.requests),
        "size": size,
        "ratios": {str(ratio): ratios[ratio] for ratio in sorted(ratios)},
        "mean_tokens": sum(request.num_tokens for request in run.requests) / len(run.requests),
        "fixed_16x_tokens": (size / (16 * patch)) ** 2,
    }


def _tell(summary: dict[str, Any]) -> None:
    mix = ", ".join(f"{count} at {ratio}x" for ratio, count in summary["ratios"].items())
    fixed = summary["fixed_16x_tokens"]
    console.out.print(
        f"{summary['images']} images, {summary['drawn_now']} of them drawn now: {mix}; mean"
        f" {summary['mean_tokens']:.1f} tokens against {fixed:g} at a fixed 16x"
        f" ({summary['mean_tokens'] / fixed - 1:+.1%})",
        soft_wrap=True,
    )
    if summary["missing"]:
        console.out.print(f"{summary['missing']} are not there yet: other ranks draw them")
    for path in (summary["grid"], summary["npz"], f"{summary['out']}/samples.json"):
        if path:
            console.out.print(Text(path), soft_wrap=True)
