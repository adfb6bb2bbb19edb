"""Training of the guide: MSE to the resized image, and the commitment of the encoder to its codes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cat_fast.data.image_batch import ImageBatch
from cat_fast.dual_token.codebook import usage
from cat_fast.dual_token.grid import Grid, format_grid
from cat_fast.dual_token.guide.model import GuideModel, GuideOutput
from cat_fast.models.build import build_model
from cat_fast.training.checkpoints.engine_state import (
    load_engine,
    parameter_count,
    save_engine,
    saved_bytes,
)
from cat_fast.training.checkpoints.initial_settings import model_settings, require_same_settings
from cat_fast.training.checkpoints.initial_weights import load_initial_weights
from cat_fast.training.checkpoints.space import StateBytes
from cat_fast.training.checkpoints.write_errors import defer_write_errors
from cat_fast.training.config.dual_token import GuideRun
from cat_fast.training.dual_token.codebook_updates import CodebookUpdates
from cat_fast.training.dual_token.guide_evaluation import GuideEvaluation
from cat_fast.training.rehearsal import LargestStep
from cat_fast.training.runtime.collective_errors import on_each, on_main
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.engine import in_precision, learning_rate, make_engine, set_learning_rate
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.stand_ins import stand_in_parameters
from cat_fast.training.step import Backward
from cat_fast.training.tokenizer.grid_images import grid_images
from cat_fast.training.tokenizer.image_source import (
    load_source,
    loader_amounts,
    make_held_out,
    make_source,
    save_source,
)

_TERMS = ("loss", "mse", "commitment", "codebook")


class GuideTask:
    """Implements `loop.Task` for the guide.

    Step s of all ranks and batches has one grid, drawn from the seed and s, so that ranks compute alike.
    """

    amounts = ("images", "tokens", "data_seconds", "loader_images_per_second", "skipped_samples")

    def __init__(self, config: GuideRun, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        torch.manual_seed(config.seed)
        self.model = build_model(GuideModel, config.model)
        self.initial_weights = on_each(
            lambda: load_initial_weights(self.model, config.initial_weights, ()), ranks
        )
        self.grids = config.all_grids
        self.engine = make_engine(
            self.model,
            config.optimizer,
            config.deepspeed,
            config.accumulation_steps,
            config.precision,
        )
        defer_write_errors(self.engine, ranks)
        self.ema = EMA(self.model, config.ema_decay, ranks)
        self.codebook = CodebookUpdates(
            self.model.quantizer, config.codebook, "quantizer.codebook", config.seed, ranks
        )
        self.source = make_source(config, ranks)
        self._batches: list[ImageBatch] = []
        self._step = 0
        self._position: Callable[[], dict[str, Any]] = self.source.state_dict
        self._before_draw = self._position
        self.evaluation: GuideEvaluation | None = None
        is_evaluated = 0 < config.evaluation.every_steps <= config.schedule.total_steps
        if is_evaluated or config.logging.grid_every_steps:
            on_main(self._read_held_out, ranks)

    def _read_held_out(self) -> None:
        images = grid_images(self.config, self.config.evaluation.images)
        self.evaluation = GuideEvaluation(
            images, self.config.data.crop_size, self.grids, self.config.data.batch_size, self.ranks.device
        )

    def draw(self, step: int) -> Sequence[float]:
        self._before_draw = self.source.snapshot()
        device = self.ranks.device
        self._batches = [self.source.batch().on(device) for _ in range(self.config.accumulation_steps)]
        grid = self.grid_of(step)
        self.ranks.step_context.set_batches(
            [f"{format_grid(grid)}, {batch.count} images" for batch in self._batches]
        )
        images = sum(batch.count for batch in self._batches)
        amounts: dict[str, float] = {"images": images, "tokens": images * grid[0] * grid[1]}
        amounts |= loader_amounts(self._batches, self.ranks.world_size)
        return [amounts[name] for name in self.amounts]

    def undraw(self) -> None:
        self._position = self._before_draw

    def grid_of(self, step: int) -> Grid:
        """Return the grid of a step."""
        return self.grids[
            int(np.random.default_rng([self.config.seed, step, 0, 6]).integers(len(self.grids)))
        ]

    def backward(self, step: int, totals: Mapping[str, float]) -> Backward:
        config, batches, grid = self.config, self._batches, self.grid_of(step)
        self._batches, self._step = [], step
        set_learning_rate(self.engine, learning_rate(config.optimizer.lr, config.schedule, step))
        sums = torch.zeros(len(_TERMS), dtype=torch.float64, device=self.ranks.device)
        losses: dict[str, list[Tensor]] = {name: [] for name in _TERMS}
        for part, batch in enumerate(batches):
            terms, output = self._loss(self.engine, batch.images, grid)
            self.ranks.step_context.start_waiting()  # from here on ranks wait for each other
            # Factor for the mean loss of a batch, so that the averaged gradient is the mean over images.
            share = batch.count * self.ranks.world_size * len(batches) / totals["images"]
            self.engine.backward(terms["loss"] * share)
            self.codebook.add(output.features, output.quantized.codes)
            values = torch.stack([terms[name].detach() for name in _TERMS])
            sums += values.double() * batch.count
            for name, value in zip(_TERMS, values, strict=True):
                losses[name].append(value)
            if part + 1 < len(batches):
                self.engine.step()  # only counts the backward passes
        size = f"{grid[0] * self.model.scale}px"

        def metrics(found: Tensor) -> dict[str, float]:
            means = (found[: len(_TERMS)] / totals["images"]).tolist()
            used = usage(self.codebook.counts(found[len(_TERMS) :]))
            named = dict(zip(_TERMS, means, strict=True))
            return {
                **named,
                f"mse_{size}": named["mse"],
                "codes_used": used.share,
                "perplexity": used.perplexity,
                **totals,
            }

        return Backward(
            losses={name: torch.stack(values) for name, values in losses.items()},
            engines={"guide": self.engine},
            sums=torch.cat([sums, self.codebook.pack(step)]),
            metrics=metrics,
        )

    def update(self, backward: Backward, sums: Tensor) -> None:
        self.engine.step()
        self.ema.update()
        self.codebook.apply(self._step, sums[len(_TERMS) :], self.ema)

    def _loss(self, model: Any, images: Tensor, grid: Grid) -> tuple[dict[str, Tensor], GuideOutput]:
        """Return the terms of the loss: equation 5, and those of the vector quantiser."""
        output = model(self.model.resize_input(images, grid))
        mse = F.mse_loss(output.guide.float(), self.model.resize_target(images, grid))
        quantized = output.quantized
        loss = mse + self.config.codebook.commitment_weight * quantized.commitment + quantized.codebook
        terms = {"loss": loss, "mse": mse, "commitment": quantized.commitment}
        return terms | {"codebook": quantized.codebook}, output

    def save(self, folder: Path) -> None:
        save_engine(self.engine, folder / "guide")
        self.ema.save(folder / "ema.safetensors")
        save_source(self._position(), folder, self.ranks)
        if self.ranks.is_main:
            state = {"ema_updates": self.ema.updates, "began_with": self._initial_settings()}
            (folder / "task.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        state = json.loads((folder / "task.json").read_text())
        require_same_settings(state["began_with"], self._initial_settings())
        load_engine(self.engine, folder / "guide", self.ranks, "model")
        load_source(self.source, folder)
        self.ema.load(folder / "ema.safetensors", state["ema_updates"])

    def _initial_settings(self) -> dict[str, Any]:
        held_out = make_held_out(self.config)
        return {
            **model_settings(dict(self.model.config), free=()),
            "grids": [list(grid) for grid in self.grids],
            "data.held_out_share": None if held_out is None else asdict(held_out),
            "initial_weights": self.initial_weights,
        }

    def largest_step(self) -> LargestStep:
        grid = max(self.grids, key=lambda grid: grid[0] * grid[1])
        count = max(self.source.largest_batches.values())

        def run() -> None:
            size = self.config.data.crop_size
            images = torch.rand(count, 3, *size, device=self.ranks.device) * 2 - 1
            forward = in_precision(self.model, self.config.precision, self.ranks.device)
            with stand_in_parameters(self.model):
                self._loss(forward, images, grid)[0]["loss"].backward()

        return LargestStep(
            what=f"{count} images with a guide of {format_grid(grid)}",
            lower="data.batch_size",
            settings="grids and model",
            run=run,
        )

    def state_bytes(self) -> StateBytes:
        model = 4 * parameter_count(self.model)
        return StateBytes(checkpoint=saved_bytes(self.engine) + model, model=model)

    def grid(self, step: int, columns: int | None = None) -> tuple[Image.Image, dict[str, float]] | None:
        """Draw the guides of held-out images at every grid, with the averaged weights."""
        if self.evaluation is None:
            return None
        title = f"after {step + 1} steps, averaged weights"
        columns = self.config.logging.grid_columns if columns is None else columns
        return self.evaluation.draw(self._averaged(), title, columns)

    def evaluate(self) -> dict[str, float] | None:
        """Return PSNR and use of the codebook on held-out images, with the averaged weights."""
        return None if self.evaluation is None else self.evaluation.evaluate(self._averaged())

    def _averaged(self) -> GuideModel:
        """Return a model with the averaged weights and the current codebook, on this rank's device."""
        with torch.random.fork_rng(devices=[]):
            averaged = build_model(GuideModel, self.config.model).to(self.ranks.device)
        averaged.load_state_dict(self.model.state_dict() | self.ema.averaged)
        return averaged.eval()

    def export(self, folder: Path) -> None:
        averaged = build_model(GuideModel, self.config.model) if self.ranks.is_main else None
        if averaged is not None:
            averaged.load_state_dict(self.model.state_dict())  # with the buffers of the codebook
        self.ema.copy_to(averaged)
        if averaged is not None:
            averaged.save_pretrained(folder)

    def close(self) -> None:
        """Stop the processes that read images."""
        self.source.close()
