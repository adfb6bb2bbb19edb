"""Training of the guide: MSE to the resized image, and the commitment of the encoder to its codes."""

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
from cat_fast.training.checkpoints.initial_settings import model_settings
from cat_fast.training.config.dual_token import GuideRun
from cat_fast.training.dual_token.codebook_updates import CodebookUpdates
from cat_fast.training.dual_token.engine_task import EngineTask
from cat_fast.training.dual_token.guide_evaluation import GuideEvaluation
from cat_fast.training.rehearsal import LargestStep
from cat_fast.training.runtime.collective_errors import on_main
from cat_fast.training.runtime.engine import in_precision, learning_rate, set_learning_rate
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


class GuideTask(EngineTask):
    """Implements `loop.Task` for the guide.

    Step s of all ranks and batches has one grid, drawn from the seed and s, so that ranks compute alike.
    """

    kind, engine_name = GuideModel, "guide"
    amounts = ("images", "tokens", "data_seconds", "loader_images_per_second", "skipped_samples")

    def __init__(self, config: GuideRun, ranks: Ranks) -> None:
        super().__init__(config, ranks, config.model)
        self.config, self.grids = config, config.all_grids
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
        super().update(backward, sums)
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
        super().save(folder)
        save_source(self._position(), folder, self.ranks)

    def load(self, folder: Path) -> None:
        super().load(folder)
        load_source(self.source, folder)

    def initial_settings(self) -> dict[str, Any]:
        held_out = make_held_out(self.config)
        return {
            **model_settings(dict(self.model.config), free=()),
            "seed": self.config.seed,
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

    def grid(self, step: int, columns: int | None = None) -> tuple[Image.Image, dict[str, float]] | None:
        """Draw the guides of held-out images at every grid, with the averaged weights."""
        if self.evaluation is None:
            return None
        title = f"after {step + 1} steps, averaged weights"
        columns = self.config.logging.grid_columns if columns is None else columns
        return self.evaluation.draw(self.averaged(), title, columns)

    def evaluate(self) -> dict[str, float] | None:
        """Return PSNR and use of the codebook on held-out images, with the averaged weights."""
        return None if self.evaluation is None else self.evaluation.evaluate(self.averaged())

    def close(self) -> None:
        """Stop the processes that read images."""
        self.source.close()
