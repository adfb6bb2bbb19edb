"""`cat-fast demo`: the shipped models, or training on the packaged photographs, in one command."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cat_fast.console import out
from cat_fast.errors import UserError


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Output folder; a rerun resumes from it.")] = Path(
        "runs/demo"
    ),
    train: Annotated[
        bool, typer.Option("--train", help="Train a tokenizer and a generator instead, in minutes.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Train at toy sizes, about a minute; checks the installation.")
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
    """Show the shipped models on held-out photographs and prompts, and write a report.

    Each photograph is scored by its description, which chooses 8x, 16x or 32x compression, and reconstructed
    at all three; prompts are drawn at three token counts. It takes less than three minutes on two cores.

    With --train, a nested VAE and a diffusion transformer are trained with DeepSpeed on the packaged
    photographs instead, and become another section of the same report. The demo measures its first training
    steps and prints the time that it will take. On Ctrl-C, SIGTERM or a closed terminal, it saves a
    checkpoint; run the same command again to resume.

    Examples:

        cat-fast demo --out runs/demo

        cat-fast demo --train --out runs/demo
    """
    training = {
        "--tokenizer-steps": tokenizer_steps,
        "--generator-steps": generator_steps,
        "--sampling-steps": sampling_steps,
        "--ranks": ranks,
    }
    if not (train or quick):
        if given := [name for name, value in training.items() if value]:
            raise UserError(f"{given[0]} is for training: add --train, or leave it out")
        _show_shipped(folder)
        return

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


def _show_shipped(folder: Path) -> None:
    from cat_fast.demo import run_shipped_demo

    metrics = run_shipped_demo(folder.resolve())
    held = metrics["held_out"]
    chosen = held["chosen"]
    for name, text in {
        "report": f"{folder / 'report.html'}, metrics in {folder / 'shipped.json'}",
        "tokenizer": f"nano: {chosen['psnr']:.1f} dB on held-out photographs at their chosen ratios",
        "tokens": f"{chosen['tokens_vs_fixed_16x']:.0%} of a fixed 16x tokenizer on held-out photographs",
        "next": 'cat-fast sample --prompt "red apple" --out images',
    }.items():
        out.print(f"{name:<10}  {text}", soft_wrap=True, markup=False)
