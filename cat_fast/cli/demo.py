"""`cat-fast demo`: training, reconstruction and sampling on the packaged photographs in one command."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cat_fast.console import out


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Output folder; a rerun resumes from it.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Toy sizes, about a minute; checks the installation.")
    ] = False,
    tokenizer_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps of the tokenizer. Default: 400, or 12 with --quick."),
    ] = None,
    generator_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps of the generator. Default: 900, or 12 with --quick."),
    ] = None,
    sampling_steps: Annotated[
        int | None, typer.Option(min=1, help="DDPM steps per sampled image. Default: 50, or 4 with --quick.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=0, help="Training processes; 0: one per GPU, or two on CPU.")] = 0,
) -> None:
    """Train a small tokenizer and generator on the packaged photographs and write a report.

    The photographs' captions are scored, and each photograph is assigned 8x, 16x or 32x compression. A nested
    VAE and a diffusion transformer are trained with DeepSpeed, and held-out photographs are reconstructed at
    every ratio. This takes about 15 minutes on two fast cores. After Ctrl-C, run the same command again to
    resume from the last checkpoint.

    Example: **cat-fast demo --out runs/demo**
    """
    from cat_fast.demo import DemoSettings, run_demo
    from cat_fast.training.launch import default_ranks

    ranks = ranks or default_ranks()
    settings = DemoSettings.quick(ranks) if quick else DemoSettings(ranks=ranks)
    settings = replace(
        settings,
        tokenizer_steps=tokenizer_steps or settings.tokenizer_steps,
        generator_steps=generator_steps or settings.generator_steps,
        sampling_steps=sampling_steps or settings.sampling_steps,
    )
    metrics = run_demo(folder.resolve(), settings)
    held, generator = metrics["held_out"], metrics["generator_training"]
    chosen, pipeline = held["chosen"], folder / "pipeline"
    gain = chosen["psnr"] - held["mean_colour_psnr"]
    for name, text in {
        "report": f"{folder / 'report.html'}, metrics in {folder / 'metrics.json'}",
        "tokenizer": f"{pipeline}/vae: {chosen['psnr']:.1f} dB held out, {gain:+.1f} over mean colour",
        "generator": f"{pipeline}: loss {generator['first_loss']:.2f} -> {generator['final_loss']:.2f}",
        "tokens": f"{chosen['tokens_vs_fixed_16x']:.0%} of a fixed 16x tokenizer on held-out photographs",
        "next": f"cat-fast encode PHOTO --checkpoint {pipeline / 'vae'} --out latents.safetensors",
    }.items():
        out.print(f"{name:<10}  {text}", soft_wrap=True, markup=False)
