"""Training the nested VAE: one ratio a rank a step, two DeepSpeed engines once the GAN has started.

The rules that keep two engines and mixed ratios right under ZeRO 1 and 2:

- The discriminator is frozen in the generator's step and called once, on real and fake together, in its own.
- Every rank runs the ghost pass, so that ranks at different ratios still produce every gradient in the same
  order.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from cat_fast.complexity.indexing import load_index, ratios_of
from cat_fast.complexity.ratio import RatioThresholds
from cat_fast.data.crops import CropDataset
from cat_fast.data.ratio_sampler import RatioSampler
from cat_fast.errors import UserError
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator, random_crops
from cat_fast.tokenizer.losses import DiscriminatorObjective, TokenizerObjective
from cat_fast.training.distributed import Ranks
from cat_fast.training.ema import EMA
from cat_fast.training.engine import learning_rate, make_engine, set_learning_rate
from cat_fast.training.flops import TokenizerFlops
from cat_fast.training.grids import ReconstructionGrid
from cat_fast.training.models import build_model
from cat_fast.training.seeding import seed_step, step_rng
from cat_fast.training.settings import DiscriminatorConfig, TokenizerRun


class TokenizerTask:
    """Implements `loop.Task` for the nested VAE."""

    def __init__(self, config: TokenizerRun, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        torch.manual_seed(config.seed)
        model = build_model(NestedAutoencoderKL, config.model)
        discriminator = _discriminator(config.discriminator)
        self.objective = TokenizerObjective(config.loss, ranks.device)
        self.flops = TokenizerFlops(config, self.objective, discriminator)
        self.engine = make_engine(model, config.optimizer, config.deepspeed)
        self.discriminator = make_engine(discriminator, config.discriminator.optimizer, config.deepspeed)
        self.discriminator_objective = DiscriminatorObjective(config.loss)
        self.ema = EMA(self.engine.module, config.ema_decay) if ranks.is_main else None

        records = load_index(config.data.index)
        ratios = ratios_of(records, config.data.ratios_from, RatioThresholds(*config.data.thresholds))
        self.sampler = RatioSampler(
            ratios, config.data.batch_size, ranks.world_size, config.seed, config.sampler
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

        if ranks.is_main and config.logging.grid_every_steps:
            self.pictures = ReconstructionGrid(config.logging, config.data.image_size, ranks.device)

    def train_step(self, step: int) -> dict[str, float]:
        config, rank = self.config, self.ranks.rank
        ratio, indices = self.sampler.plan()[rank]
        pictures = self.crops.batch(indices, step_rng(config.seed, step, rank))
        pictures = pictures.to(self.ranks.device, memory_format=torch.channels_last)
        seed_step(config.seed, step, rank)
        reconstructions, terms = self._generator_step(step, pictures, ratio)
        if self.objective.gan.active(step):
            terms |= self._discriminator_step(step, pictures, reconstructions)
        if self.ema:
            self.ema.update()
        work = self.flops.over_ranks(self.ranks, [(ratio, len(pictures))], self.objective.gan.active(step))
        return self._mean_over_ranks(ratio, terms) | work

    def _generator_step(self, step: int, pictures: Tensor, ratio: int) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        set_learning_rate(self.engine, learning_rate(config.optimizer.lr, config.schedule, step))
        reconstructions, posterior = self.engine(pictures, ratio, ghost_pass=True)
        # Gradients at the reconstructions, for balancing, stop at this view: past it are the engine's hooks.
        reconstructions = reconstructions.view_as(reconstructions)
        fake_logits = None
        if self.objective.gan.active(step):
            discriminator = self.discriminator.module.requires_grad_(False)
            fake_logits = discriminator(*random_crops([reconstructions], discriminator.resolution))
        window = [pictures, reconstructions]
        if config.perceptual_crop:
            window = random_crops(window, config.perceptual_crop)
        loss = self.objective(pictures, reconstructions, posterior, fake_logits, window)
        self.engine.backward(loss.total)
        self.engine.step()
        return reconstructions.detach(), {"loss": loss.total.detach(), **loss.terms()}

    def _discriminator_step(self, step: int, pictures: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        config = self.config
        base = config.discriminator.optimizer.lr
        set_learning_rate(self.discriminator, learning_rate(base, config.schedule, step))
        self.discriminator.module.requires_grad_(True)
        crops = random_crops([pictures, reconstructions], self.discriminator.module.resolution)
        real, fake = self.discriminator(torch.cat(crops)).chunk(2)
        # R1 judges past the engine, whose hooks would take the gradient at the crops for the backward pass.
        judge = self.discriminator.module
        loss = self.discriminator_objective(step, real, fake, judge, crops[0])
        logits = torch.stack([real.detach().float().mean(), fake.detach().float().mean()])
        self.discriminator_objective.lecam.update(*(self.ranks.sum(logits) / self.ranks.world_size).tolist())
        self.discriminator.backward(loss.total)
        self.discriminator.step()
        accuracy = torch.cat([real > 0, fake < 0]).float().mean()
        return {**loss.terms(), "discriminator_accuracy": accuracy}

    def _mean_over_ranks(self, ratio: int, terms: dict[str, Tensor]) -> dict[str, float]:
        """Mean of each term over all ranks, and over the ranks at each ratio."""
        ratios = sorted(self.sampler.pools)
        names = list(terms)
        table = torch.zeros(len(ratios), len(names) + 1, dtype=torch.float64, device=self.ranks.device)
        table[ratios.index(ratio)] = torch.stack([*terms.values(), torch.ones_like(terms["loss"])]).double()
        self.ranks.sum(table)
        mean = table.sum(0) / table[:, -1].sum()
        metrics = dict(zip(names, mean.tolist(), strict=False))
        for row, f in zip(table.tolist(), ratios, strict=True):
            if row[-1]:
                metrics |= {f"{name}_{f}x": value / row[-1] for name, value in zip(names, row, strict=False)}
        return metrics

    def save(self, folder: Path) -> None:
        # Each engine has a folder of its own: in one, the second would overwrite the first's files.
        self.engine.save_checkpoint(str(folder / "autoencoder"), tag="state")
        self.discriminator.save_checkpoint(str(folder / "discriminator"), tag="state")
        if self.ema:
            self.ema.save(folder / "ema.safetensors")
            state = {
                "sampler": self.sampler.state_dict(),
                "ema_updates": self.ema.updates,
                "lecam": self.discriminator_objective.lecam.state_dict(),
            }
            (folder / "task.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder / "autoencoder"), tag="state")
        self.discriminator.load_checkpoint(str(folder / "discriminator"), tag="state")
        state = json.loads((folder / "task.json").read_text())
        self.sampler.load_state_dict(state["sampler"])
        self.discriminator_objective.lecam.load_state_dict(state["lecam"])
        if self.ema:
            self.ema.load(folder / "ema.safetensors", state["ema_updates"])

    def grid(self, step: int) -> tuple[Image.Image, dict[str, float]]:
        """Reconstructions by the averaged weights."""
        assert self.ema is not None
        model, averaged = self.engine.module, self.ema.averaged

        def reconstruct(picture: Tensor, ratio: int) -> Tensor:
            return functional_call(model, averaged, (picture, ratio), {"sample_posterior": False})[0]

        return self.pictures.draw(reconstruct, model.ratios, f"after {step + 1} steps, averaged weights")

    def export(self, folder: Path) -> None:
        if self.ema:
            averaged = build_model(NestedAutoencoderKL, self.config.model)
            self.ema.copy_to(averaged)
            averaged.save_pretrained(folder)


def _discriminator(config: DiscriminatorConfig) -> StyleGANDiscriminator:
    if config.pretrained:
        return StyleGANDiscriminator.from_pickle(Path(config.pretrained))
    return StyleGANDiscriminator(config.resolution, config.channel_base, config.channel_max)
