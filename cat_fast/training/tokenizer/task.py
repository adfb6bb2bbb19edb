"""Training of the nested VAE on batches of images, each batch at one ratio."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from cat_fast.data.image_batch import ImageBatch
from cat_fast.errors import UserError
from cat_fast.models.build import build_model
from cat_fast.models.load import load_tokenizer
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.training.checkpoints.engine_state import parameter_count, saved_bytes
from cat_fast.training.checkpoints.initial_settings import require_same_settings
from cat_fast.training.checkpoints.initial_weights import load_initial_weights
from cat_fast.training.checkpoints.space import StateBytes
from cat_fast.training.config.settings import DiscriminatorConfig, TokenizerRun
from cat_fast.training.metrics.held_out_evaluation import HeldOutEvaluation
from cat_fast.training.metrics.reconstruction_grid import ReconstructionGrid
from cat_fast.training.rehearsal import LargestStep
from cat_fast.training.runtime.collective_errors import on_each, on_main
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.step_context import describe_batch
from cat_fast.training.step import Backward
from cat_fast.training.tokenizer.crop_checks import require_multiples
from cat_fast.training.tokenizer.grid_images import grid_images
from cat_fast.training.tokenizer.image_source import (
    load_source,
    loader_amounts,
    make_held_out,
    make_source,
    ratio_rule,
    save_source,
)
from cat_fast.training.tokenizer.trainer import NOT_APPLIED, TokenizerTrainer


class TokenizerTask:
    """Implements `loop.Task` for the nested VAE."""

    amounts = ("images", "tokens", "flops", "data_seconds", "loader_images_per_second", "skipped_samples")

    def __init__(self, config: TokenizerRun, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        torch.manual_seed(config.seed)
        model = build_model(NestedAutoencoderKL, config.model)
        free = (*NOT_APPLIED, "initialisation", "initial_logvar")
        self.initial_weights = on_each(
            lambda: load_initial_weights(model, config.initial_weights, free), ranks
        )
        if config.train_only:
            model.freeze_all_but(config.train_only)
            latents_of = on_each(lambda: _latents_of(Path(config.initial_weights)), ranks)
            model.register_to_config(latents_of=latents_of)
        discriminator = _discriminator(config.discriminator)
        self.trainer = TokenizerTrainer(config, model, discriminator, ranks)
        self.ema = EMA(model, config.ema_decay, ranks)

        self.source = make_source(config, ranks)
        for ratio in self.source.ratios:
            if ratio not in model.ratios:
                raise UserError(
                    f"the data has images at ratio {ratio}, but model.ratios is {list(model.ratios)}: add "
                    "the ratio, or change data.ratios_from"
                )
        is_evaluated = 0 < config.evaluation.every_steps <= config.schedule.total_steps
        drawn = model.ratios if config.logging.grid_every_steps or is_evaluated else ()
        require_multiples(config, {*self.source.ratios, *drawn})
        self._batches: list[ImageBatch] = []
        self._position: Callable[[], dict[str, Any]] = self.source.state_dict
        self._before_draw = self._position
        if config.logging.grid_every_steps:
            on_main(self._read_grid, ranks)
        self.evaluation: HeldOutEvaluation | None = None
        if is_evaluated:
            on_main(self._read_evaluation, ranks)

    def _read_grid(self) -> None:
        shown = grid_images(self.config)
        self.images = ReconstructionGrid(shown, self.config.data.crop_size, self.ranks.device)
        if not shown.held_out:
            print(
                "grids show training images, because the data has no held-out images: see data.held_out and "
                "data.held_out_share",
                flush=True,
            )

    def _read_evaluation(self) -> None:
        images = grid_images(self.config, self.config.evaluation.images)
        data = self.config.data
        self.evaluation = HeldOutEvaluation(images, data.crop_size, data.batch_size, self.ranks.device)

    def draw(self, step: int) -> Sequence[float]:
        self._before_draw = self.source.snapshot()
        device = self.ranks.device
        self._batches = [self.source.batch().on(device) for _ in range(self.config.accumulation_steps)]
        self.ranks.step_context.set_batches(
            [describe_batch(batch.keys, batch.ratio) for batch in self._batches]
        )
        amounts = self.trainer.work(step, self._batches)
        amounts |= loader_amounts(self._batches, self.ranks.world_size)
        return [amounts[name] for name in self.amounts]

    def undraw(self) -> None:
        self._position = self._before_draw

    def backward(self, step: int, totals: Mapping[str, float]) -> Backward:
        batches, self._batches = self._batches, []
        found = self.trainer.backward(step, batches, totals["images"])
        return replace(found, metrics=lambda sums: {**found.metrics(sums), **totals})

    def update(self, backward: Backward, sums: Tensor) -> None:
        self.trainer.update(backward, sums)
        self.ema.update()

    def save(self, folder: Path) -> None:
        state = self.trainer.save(folder)
        self.ema.save(folder / "ema.safetensors")
        save_source(self._position(), folder, self.ranks)
        if self.ranks.is_main:
            state |= {"ema_updates": self.ema.updates, "held_out": self.held_out()}
            state |= {"ratio_rule": ratio_rule(self.config)} | self._initial_settings()
            (folder / "task.json").write_text(json.dumps(state))

    def held_out(self) -> dict[str, Any] | None:
        """Return the selection of held-out images as JSON; a resumed run must have the same one."""
        held_out = make_held_out(self.config)
        return None if held_out is None else asdict(held_out)

    def load(self, folder: Path) -> None:
        """Resume on any number of ranks: each ratio continues at its position in the data, and the ratios of
        the next step are drawn for the current ranks."""
        state = json.loads((folder / "task.json").read_text())
        if (before := state.get("held_out")) != (now := self.held_out()):
            raise UserError(
                f"data.held_out_share: expected {before}, as at the start of the run, got {now}: the run "
                "would train on images that were held out; restore the setting, or start a new run in "
                "another output_dir"
            )
        if "ratio_rule" in state and (before := state["ratio_rule"]) != (now := ratio_rule(self.config)):
            raise UserError(
                f"data: the ratios of the run's images were chosen by {before}, not {now}; set these keys as "
                "before, or start a new run in another output_dir"
            )
        # checkpoints of earlier versions record less
        before = {"initial_weights": None, "train_only": "", "seed": self.config.seed} | state
        now = self._initial_settings()
        require_same_settings({name: before[name] for name in now}, now)
        self.trainer.load(folder, state)
        load_source(self.source, folder)
        self.ema.load(folder / "ema.safetensors", state["ema_updates"])

    def _initial_settings(self) -> dict[str, Any]:
        """Return settings that a resumed run cannot change; the seed determines the order of the images."""
        config = self.config
        return {
            "initial_weights": self.initial_weights,
            "train_only": config.train_only,
            "seed": config.seed,
        }

    def largest_step(self) -> LargestStep:
        ratio, count = self.trainer.most_demanding(self.source.largest_batches)
        return self.trainer.largest_step(ratio, count)

    def state_bytes(self) -> StateBytes:
        model = 4 * parameter_count(self.trainer.model)
        engines = saved_bytes(self.trainer.engine) + saved_bytes(self.trainer.discriminator)
        return StateBytes(checkpoint=engines + model, model=model)

    def grid(self, step: int, columns: int | None = None) -> tuple[Image.Image, dict[str, float]]:
        """Draw reconstructions with the averaged weights."""
        title = f"after {step + 1} steps, averaged weights"
        return self.images.draw(self._reconstruct, self.trainer.model.ratios, title, columns)

    def evaluate(self) -> dict[str, float] | None:
        """Evaluate reconstructions of held-out images with the averaged weights."""
        if self.evaluation is None:
            return None
        return self.evaluation.evaluate(self._reconstruct, self.trainer.model.ratios)

    def _reconstruct(self, images: Tensor, ratio: int) -> Tensor:
        self.ranks.step_context.report_progress()
        return functional_call(self.trainer.model, self.ema.averaged, (images, ratio)).sample

    def export(self, folder: Path) -> None:
        averaged = build_model(NestedAutoencoderKL, self.config.model) if self.ranks.is_main else None
        self.ema.copy_to(averaged)
        if averaged is not None:
            averaged.register_to_config(latents_of=self.trainer.model.config["latents_of"])
            averaged.save_pretrained(folder)

    def close(self) -> None:
        """Stop the processes that read images."""
        self.source.close()


def _latents_of(folder: Path) -> str:
    return load_tokenizer(folder, "cpu").latents_fingerprint()


def _discriminator(config: DiscriminatorConfig) -> StyleGANDiscriminator:
    if config.pretrained:
        return StyleGANDiscriminator.from_pickle(Path(config.pretrained))
    return StyleGANDiscriminator(config.resolution, config.channel_base, config.channel_max)
