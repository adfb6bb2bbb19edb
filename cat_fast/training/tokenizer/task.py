"""Training the nested VAE: one ratio a rank a batch, the pictures that the run's source gives."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from cat_fast.errors import UserError
from cat_fast.models.build import build_model
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.training.config.settings import DiscriminatorConfig, TokenizerRun
from cat_fast.training.health.nan_guard import SKIPPED
from cat_fast.training.metrics.reconstruction_grid import ReconstructionGrid
from cat_fast.training.runtime.collective_errors import on_main
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.step_context import describe_batch
from cat_fast.training.tokenizer.image_source import load_source, loader_metrics, make_source, save_source
from cat_fast.training.tokenizer.trainer import TokenizerTrainer


class TokenizerTask:
    """Implements `loop.Task` for the nested VAE."""

    def __init__(self, config: TokenizerRun, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        torch.manual_seed(config.seed)
        model = build_model(NestedAutoencoderKL, config.model)
        discriminator = _discriminator(config.discriminator)
        self.trainer = TokenizerTrainer(config, model, discriminator, ranks)
        self.ema = EMA(self.trainer.engine.module, config.ema_decay, ranks)

        self.source = make_source(config, ranks)
        for ratio in self.source.ratios:
            if ratio not in model.ratios:
                raise UserError(f"the data asks for ratio {ratio}, which model.ratios {model.ratios} lacks")
        if config.logging.grid_every_steps:
            on_main(self._read_grid, ranks)

    def _read_grid(self) -> None:
        config = self.config
        self.pictures = ReconstructionGrid(config.logging, config.data.image_size, self.ranks.device)

    def train_step(self, step: int) -> dict[str, float]:
        device = self.ranks.device
        batches = [self.source.batch().on(device) for _ in range(self.config.accumulation_steps)]
        self.ranks.work.on([describe_batch(batch.keys, batch.ratio) for batch in batches])
        metrics = self.trainer.step(step, batches)
        if SKIPPED not in metrics:
            self.ema.update()
        return metrics | loader_metrics(batches, self.ranks)

    def save(self, folder: Path) -> None:
        state = self.trainer.save(folder)
        self.ema.save(folder / "ema.safetensors")
        save_source(self.source, folder, self.ranks)
        if self.ranks.is_main:
            state |= {"ema_updates": self.ema.updates}
            (folder / "task.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """The state is that of all ranks together, so that any number of them goes on: each ratio's pictures
        where they stopped, the next step's ratios drawn for the ranks there are."""
        state = json.loads((folder / "task.json").read_text())
        self.trainer.load(folder, state)
        load_source(self.source, folder)
        self.ema.load(folder / "ema.safetensors", state["ema_updates"])

    def grid(self, step: int) -> tuple[Image.Image, dict[str, float]]:
        """Reconstructions by the averaged weights."""
        model, averaged = self.trainer.engine.module, self.ema.averaged

        def reconstruct(picture: Tensor, ratio: int) -> Tensor:
            return functional_call(model, averaged, (picture, ratio), {"sample_posterior": False})[0]

        return self.pictures.draw(reconstruct, model.ratios, f"after {step + 1} steps, averaged weights")

    def export(self, folder: Path) -> None:
        averaged = build_model(NestedAutoencoderKL, self.config.model) if self.ranks.is_main else None
        self.ema.copy_to(averaged)
        if averaged is not None:
            averaged.save_pretrained(folder)

    def close(self) -> None:
        """Ends the processes that read pictures."""
        self.source.close()


def _discriminator(config: DiscriminatorConfig) -> StyleGANDiscriminator:
    if config.pretrained:
        return StyleGANDiscriminator.from_pickle(Path(config.pretrained))
    return StyleGANDiscriminator(config.resolution, config.channel_base, config.channel_max)
