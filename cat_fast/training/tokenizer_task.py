"""Training the nested VAE: one ratio a rank a batch, the pictures that the ratio sampler plans."""

import json
from pathlib import Path

import torch

from cat_fast.complexity.indexing import load_index, ratios_of
from cat_fast.complexity.ratio import RatioThresholds
from cat_fast.data.crops import CropDataset
from cat_fast.data.ratio_sampler import RatioSampler
from cat_fast.errors import UserError
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.training.cost import costs_of
from cat_fast.training.distributed import Ranks
from cat_fast.training.ema import EMA
from cat_fast.training.models import build_model
from cat_fast.training.seeding import step_rng
from cat_fast.training.settings import DiscriminatorConfig, TokenizerRun
from cat_fast.training.tokenizer_trainer import RatioBatch, TokenizerTrainer


class TokenizerTask:
    """Implements `loop.Task` for the nested VAE."""

    def __init__(self, config: TokenizerRun, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        torch.manual_seed(config.seed)
        model = build_model(NestedAutoencoderKL, config.model)
        discriminator = _discriminator(config.discriminator)
        self.trainer = TokenizerTrainer(config, model, discriminator, ranks)
        self.ema = EMA(self.trainer.engine.module, config.ema_decay, ranks)

        records = load_index(config.data.index)
        ratios = ratios_of(records, config.data.ratios_from, RatioThresholds(*config.data.thresholds))
        costs = costs_of(config, ranks)
        self.sampler = RatioSampler(
            ratios, config.data.batch_size, ranks.world_size, config.seed, config.sampler, costs
        )
        for ratio in self.sampler.pools:
            if ratio not in model.ratios:
                raise UserError(f"the data asks for ratio {ratio}, which model.ratios {model.ratios} lacks")
        self.crops = CropDataset(
            [r.path for r in records],
            config.data.image_size,
            config.data.min_crop,
            config.data.max_side,
            mirrored=[not r.has_text for r in records],
            colour_jitter=config.data.colour_jitter,
        )

    def train_step(self, step: int) -> dict[str, float]:
        batches = [self._next_batch(step, part) for part in range(self.config.accumulation_steps)]
        metrics = self.trainer.step(step, batches)
        self.ema.update()
        return metrics

    def _next_batch(self, step: int, part: int) -> RatioBatch:
        """The pictures of one accumulation step."""
        config, rank = self.config, self.ranks.rank
        ratio, indices, weight = self.sampler.plan()[rank]
        rng = step_rng(config.seed, step * config.accumulation_steps + part, rank)
        pictures = self.crops.batch(indices, rng)
        pictures = pictures.to(self.ranks.device, memory_format=torch.channels_last)
        return RatioBatch(pictures, ratio, len(indices) if weight else 0)

    def save(self, folder: Path) -> None:
        state = self.trainer.save(folder)
        self.ema.save(folder / "ema.safetensors")
        if self.ranks.is_main:
            state |= {"sampler": self.sampler.state_dict(), "ema_updates": self.ema.updates}
            (folder / "task.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """The state is that of all ranks together, so that any number of them goes on: each ratio's pictures
        where they stopped, the next step's ratios drawn for the ranks there are."""
        state = json.loads((folder / "task.json").read_text())
        self.trainer.load(folder, state)
        self.sampler.load_state_dict(state["sampler"])
        self.ema.load(folder / "ema.safetensors", state["ema_updates"])

    def export(self, folder: Path) -> None:
        averaged = build_model(NestedAutoencoderKL, self.config.model) if self.ranks.is_main else None
        self.ema.copy_to(averaged)
        if averaged is not None:
            averaged.save_pretrained(folder)


def _discriminator(config: DiscriminatorConfig) -> StyleGANDiscriminator:
    if config.pretrained:
        return StyleGANDiscriminator.from_pickle(Path(config.pretrained))
    return StyleGANDiscriminator(config.resolution, config.channel_base, config.channel_max)
