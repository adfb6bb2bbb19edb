"""The phases of the demo; each one resumes from an earlier run in the same folder."""

import importlib.resources
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from cat_fast.console import err, progress
from cat_fast.data.files import write_json
from cat_fast.data.folder_lock import locked, require_unlocked
from cat_fast.data.folder_settings import claim_folder
from cat_fast.data.images.index import write_index
from cat_fast.data.photographs import CATEGORIES, SPLITS, photographs
from cat_fast.demo.descriptions import DescribedPhotograph, describe_photographs, records_of
from cat_fast.demo.duration import KINDS, format_duration, seconds_left, seconds_per_step
from cat_fast.demo.latents import encode_crops
from cat_fast.demo.metrics import collect_metrics, latent_deviations
from cat_fast.demo.report import write_report
from cat_fast.errors import UserError
from cat_fast.evaluation.reconstruction import reconstruct
from cat_fast.inference import CATPipeline
from cat_fast.inference.pipeline.assembly import assemble
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.training.health.run_status import TRAINING
from cat_fast.training.launch import launch
from cat_fast.training.loop import EXPORT
from cat_fast.training.metrics.run_log import read_metrics


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of a demo; a folder can only be resumed with the settings it was created with."""

    ranks: int
    layout: int = 2
    """Layout of the folder; folders of earlier versions are refused."""
    tokenizer_steps: int = 400
    generator_steps: int = 900
    sampling_steps: int = 50
    resolution: int = 512
    """Side, in pixels, of held-out photographs, of the DiT's training images and of its samples."""
    crops_per_image: int = 4
    """Training crops per photograph at its chosen ratio."""
    guidance: float = 1.5
    tokenizer_overrides: list[str] = field(default_factory=list)
    """Additional `key=value` overrides of the tokenizer's configuration."""
    generator_overrides: list[str] = field(default_factory=list)
    """Additional `key=value` overrides of the generator's configuration."""

    @classmethod
    def quick(cls, ranks: int) -> "DemoSettings":
        """Return toy-size settings for a run of about a minute, to check an installation."""
        return cls(
            ranks=ranks,
            tokenizer_steps=12,
            generator_steps=12,
            sampling_steps=4,
            resolution=128,
            crops_per_image=2,
            tokenizer_overrides=[
                "model.block_out_channels=[4,4,8,8,16,16]",
                "model.norm_num_groups=2",
                "model.latent_channels=4",
                "data.image_size=64",
                "data.batch_size=2",
                "discriminator.channel_base=128",
                "checkpoint.every_steps=4",
            ],
            generator_overrides=[
                "model.hidden_size=32",
                "model.depth=2",
                "model.num_heads=2",
                "data.max_tokens=256",
                "data.window=32",
                "checkpoint.every_steps=4",
            ],
        )


class Demo:
    """The phases of a demo, with their shared output folder, settings and progress bars."""

    def __init__(self, out: Path, settings: DemoSettings, bars: Progress) -> None:
        self.out, self.settings, self.bars = out, settings, bars
        self.seconds: dict[str, float] = {}

    def describe(self) -> tuple[list[DescribedPhotograph], str]:
        """Describe and score every photograph; write the training and held-out indices."""
        bar = self.bars.add_task("find text and faces", total=len(photographs()))
        described, source = describe_photographs(self.out / "flags.json", lambda: self.bars.advance(bar))
        self.bars.remove_task(bar)
        for split in SPLITS:
            write_index(self.out / f"{split}.jsonl", records_of(described, split))
        return described, source

    def train(self, kind: str, steps: int, overrides: list[str]) -> Path:
        """Train with the DeepSpeed launcher; return the folder of the exported model."""
        run = self.out / "runs" / kind
        model = run / EXPORT
        if model.is_dir():
            return model
        first = len(read_metrics(run))
        bar = self.bars.add_task(f"train the {kind}", total=steps, completed=first)
        estimated = False

        def on_step(done: int, metrics: dict[str, float]) -> None:
            nonlocal estimated
            self.bars.update(bar, completed=done, description=f"train the {kind}, loss {metrics['loss']:.3f}")
            if not estimated and (per_step := seconds_per_step(read_metrics(run), first)) is not None:
                self.print_estimate(kind, steps - done, per_step)
                estimated = True

        with importlib.resources.as_file(importlib.resources.files("cat_fast.configs")) as configs:
            launch(
                configs / kind / "nano.yaml",
                [f"output_dir={run}", f"schedule.total_steps={steps}", *overrides],
                run_folder=run,
                log=self.out / "logs" / f"{kind}.log",
                ranks=self.settings.ranks,
                on_step=on_step,
            )
        return model

    def print_estimate(self, kind: str, steps_left: int, per_step: float) -> None:
        """Print the time that the demo will take, from the measured seconds per step of a training."""
        settings = self.settings
        later = 0 if (self.out / "runs" / "generator" / EXPORT).is_dir() else settings.generator_steps
        seconds = seconds_left(
            kind,
            per_step,
            {"generator": later} | {kind: steps_left},
            sampling_steps=settings.sampling_steps,
            resolution=settings.resolution,
            crops_per_image=settings.crops_per_image,
        )
        err.print(
            f"the demo takes about {format_duration(seconds)} more, estimated from {per_step:.2f} s per step "
            f"in the first steps of the {kind}'s training",
            soft_wrap=True,
        )

    def assemble(self, tokenizer: NestedAutoencoderKL, generator: Path) -> CATPipeline:
        pipeline = assemble(
            tokenizer,
            generator,
            CATEGORIES,
            resolution=self.settings.resolution,
            text_classes=["text"],
            face_classes=["face"],
        )
        pipeline.save_pretrained(self.out / "pipeline")
        return pipeline

    def draw(self, pipeline: CATPipeline) -> list[dict[str, Any]]:
        """Sample one image per class and ratio, with one seed per class."""
        settings, ratios = self.settings, sorted(pipeline.vae.ratios)
        bar = self.bars.add_task("draw samples", total=settings.sampling_steps * len(ratios))
        pipeline.set_progress_bar_config(disable=True)
        samples = []
        for ratio in ratios:
            drawn = pipeline(
                list(CATEGORIES),
                ratio=ratio,
                num_inference_steps=settings.sampling_steps,
                guidance_scale=settings.guidance,
                scheduler="ddpm",
                generator=[torch.Generator().manual_seed(label) for label in range(len(CATEGORIES))],
                callback_on_step_end=lambda *_: self.bars.advance(bar),
                callback_on_step_end_tensor_inputs=(),
            )
            for label, image, tokens in zip(CATEGORIES, drawn.images, drawn.tokens, strict=True):
                samples.append({"label": label, "ratio": ratio, "tokens": tokens, "image": image})
        return samples

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Record the duration of a phase."""
        started = time.perf_counter()
        if not err.is_terminal:  # no progress bar: print the name of the phase instead
            err.print(f"{time.strftime('%H:%M:%S')} {phase.replace('_', ' ')}")
        yield
        self.seconds[phase] = round(time.perf_counter() - started, 1)


def require_own_folder(out: Path) -> None:
    """Raise UserError if a folder holds a demo of an earlier version."""
    settings = out / "settings.json"
    if settings.is_file() and '"layout"' not in settings.read_text(encoding="utf-8"):
        raise UserError(f"{out} holds a demo of an earlier version; choose another folder, or delete it")


def run_demo(out: Path, settings: DemoSettings) -> dict[str, Any]:
    """Run all phases of the demo in `out` and return the metrics.

    `out` then contains a section of report.html, metrics.json, pipeline/ (for `CATPipeline.from_pretrained`),
    latents/, runs/ (checkpoints and logs of both training runs), logs/ and the image indices. An interrupted
    demo resumes from its last checkpoint.

    Raises:
        UserError: `out` contains a demo with other settings, is in use by another process or cannot be
            written, or a training run failed.
    """
    with locked(out, "running a demo"):
        require_own_folder(out)
        for kind in KINDS:
            require_unlocked(out / "runs" / kind, TRAINING)
        return _run_demo(out, settings)


def _run_demo(out: Path, settings: DemoSettings) -> dict[str, Any]:
    if claim_folder(out / "settings.json", asdict(settings), "a demo"):
        err.print(f"resuming in {out}", markup=False, soft_wrap=True)
    with progress("steps") as bars:
        demo = Demo(out, settings, bars)
        with demo.timed("describe"):
            described, source = demo.describe()
            train, held_out = (records_of(described, split) for split in SPLITS)
        with demo.timed("train_tokenizer"):
            gan_start = int(0.7 * settings.tokenizer_steps)
            overrides = [
                f"data.index={out / 'train.jsonl'}",
                f"data.held_out={out / 'held_out.jsonl'}",
                f"loss.gan_loss_starting_step={gan_start}",
            ]
            overrides += settings.tokenizer_overrides
            tokenizer_folder = demo.train("tokenizer", settings.tokenizer_steps, overrides)
        tokenizer = NestedAutoencoderKL.from_pretrained(tokenizer_folder)
        with demo.timed("encode"):
            bar = bars.add_task("encode latents", total=len(train))
            encode_crops(
                tokenizer,
                train,
                out / "latents",
                resolution=settings.resolution,
                crops=settings.crops_per_image,
                on_done=lambda: bars.advance(bar),
            )
        with demo.timed("train_generator"):
            overrides = [f"data.latents={out / 'latents'}", *settings.generator_overrides]
            generator_folder = demo.train("generator", settings.generator_steps, overrides)
        with demo.timed("reconstruct"):
            bar = bars.add_task("reconstruct held-out", total=len(held_out))
            results = reconstruct(tokenizer, held_out, settings.resolution, lambda: bars.advance(bar))
        with demo.timed("sample"):
            samples = demo.draw(demo.assemble(tokenizer, generator_folder))
    metrics = collect_metrics(out, asdict(settings), train, results, samples, demo.seconds)
    metrics["latents"] = latent_deviations(out / "latents")
    metrics["flags"] = source
    metrics["photographs"] = [photo.to_json() for photo in described]
    write_report(out / "report.html", metrics, results, samples, out / "runs", described)
    write_json(out / "metrics.json", metrics)
    return metrics
