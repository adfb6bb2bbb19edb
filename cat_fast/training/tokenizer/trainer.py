"""One step of the nested VAE and its discriminator, on given pictures: two engines, one step each.

Every rank runs the ghost pass, so that ranks at different ratios still produce every gradient in the same
order. Both engines step after both backward passes: a step that is not finite changes neither
(`guard.StepGuard`). What else ZeRO asks of two engines is in `tokenizer_losses`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat_fast.data.image_batch import ImageBatch
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.adversarial import LeCam
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.tokenizer.losses import DiscriminatorObjective, Loss, TokenizerObjective
from cat_fast.training.checkpoints.engine_state import load_engine, save_engine
from cat_fast.training.checkpoints.write_errors import agree_on_writes
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.health.nan_guard import SKIPPED, StepGuard
from cat_fast.training.metrics.flops import TokenizerFlops
from cat_fast.training.runtime.engine import learning_rate, make_engine, set_learning_rate
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import seed_step
from cat_fast.training.tokenizer.gan_losses import TokenizerLosses


class TokenizerTrainer:
    """Moves both models by the mean gradient over all pictures of all ranks and accumulation steps.

    Each picture weighs the same, also where ranks were given different numbers of them. Of the losses, only
    the adaptive weight of the GAN is a matter of each batch by itself.
    """

    def __init__(
        self,
        config: TokenizerRun,
        model: NestedAutoencoderKL,
        discriminator: StyleGANDiscriminator,
        ranks: Ranks,
    ) -> None:
        self.config, self.ranks = config, ranks
        objective = TokenizerObjective(config.loss, ranks.device)
        self.losses = TokenizerLosses(objective, DiscriminatorObjective(config.loss), config.perceptual_crop)
        self.flops = TokenizerFlops(config, objective, discriminator)  # copies models that are no engines yet
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.engine = make_engine(
            model, config.optimizer, config.deepspeed, config.accumulation_steps, config.precision
        )
        # In fp32 whatever the run's precision: in bf16 several projects saw their GAN turn NaN.
        self.discriminator = make_engine(
            discriminator, config.discriminator.optimizer, config.deepspeed, config.accumulation_steps
        )
        for engine in (self.engine, self.discriminator):
            agree_on_writes(engine, ranks)
        self.guard = StepGuard(config.guard, ranks)

    def step(self, step: int, batches: Sequence[ImageBatch]) -> dict[str, float]:
        """Collective: do step number `step` on one batch per accumulation step, on the device.

        Returns:
            Metrics, equal on all ranks: means over all pictures and, as `name_8x`, over those at each ratio.
            With `guard.SKIPPED` among them, the step was not finite and changed nothing.
        """
        seed_step(self.config.seed, step, self.ranks.rank)
        engines = self._engines_of(step)
        done: list[dict[str, Tensor]] = []
        shares: list[float] = []
        for part, batch in enumerate(batches):
            reconstructions, loss = self._reconstruct(step, batch)
            if not shares:
                self.ranks.work.computed()  # from here on ranks wait for each other
                shares = self._shares(batches)
            self.engine.backward(loss.total * shares[part])
            terms = {"loss": loss.total.detach(), **loss.terms()}
            if self._adversarial(step):
                terms |= self._judge(step, batch, reconstructions.detach(), shares[part])
            done.append(terms)
            if part + 1 < len(batches):
                for engine in engines.values():
                    engine.step()  # counts the backward passes, no more
        metrics = self._means(batches, done) | self._work(step, batches)
        losses = {name: torch.stack([terms[name] for terms in done]) for name in done[0]}
        if not self.guard.passes(losses, engines):
            return metrics | {SKIPPED: 1.0}
        for engine in engines.values():
            engine.step()
        if self._adversarial(step):
            self.lecam.update(metrics["real_logit"], metrics["fake_logit"])
        return metrics

    @property
    def lecam(self) -> LeCam:
        """The regulariser's averages, which are part of the training's state."""
        return self.losses.discriminator_objective.lecam

    def _adversarial(self, step: int) -> bool:
        return self.losses.objective.gan.active(step)

    def _engines_of(self, step: int) -> dict[str, Any]:
        """Those that move in a step, at their learning rates of it."""
        config = self.config
        engines = {"autoencoder": (self.engine, config.optimizer.lr)}
        if self._adversarial(step):
            engines["discriminator"] = (self.discriminator, config.discriminator.optimizer.lr)
        for engine, base in engines.values():
            set_learning_rate(engine, learning_rate(base, config.schedule, step))
        return {name: engine for name, (engine, _) in engines.items()}

    def _reconstruct(self, step: int, batch: ImageBatch) -> tuple[Tensor, Loss]:
        judge = self.discriminator.module if self._adversarial(step) else None
        return self.losses.of_autoencoder(self.engine, judge, batch)

    def _judge(
        self, step: int, batch: ImageBatch, reconstructions: Tensor, share: float
    ) -> dict[str, Tensor]:
        engine = self.discriminator
        loss, real, fake = self.losses.of_discriminator(engine, engine.module, step, batch, reconstructions)
        engine.backward(loss.total * share)
        return {
            **loss.terms(),
            "discriminator_accuracy": torch.cat([real > 0, fake < 0]).float().mean(),
            "real_logit": real.detach().mean(),
            "fake_logit": fake.detach().mean(),
        }

    def _shares(self, batches: Sequence[ImageBatch]) -> list[float]:
        """What to multiply each mean loss with, so that the mean of all gradients is that over pictures."""
        counts = [batch.count for batch in batches]
        total = self.ranks.sum(torch.tensor(float(sum(counts)), device=self.ranks.device)).item()
        return [count * self.ranks.world_size * len(batches) / total for count in counts]

    def _means(self, batches: Sequence[ImageBatch], done: list[dict[str, Tensor]]) -> dict[str, float]:
        """Collective: each term's mean over pictures, over all of them and over those at each ratio."""
        ratios = self.engine.module.ratios
        names = list(done[0])
        table = torch.zeros(len(ratios), len(names) + 1, dtype=torch.float64, device=self.ranks.device)
        for batch, terms in zip(batches, done, strict=True):
            row = torch.stack([*terms.values(), torch.ones_like(terms["loss"])]).double()
            table[ratios.index(batch.ratio)] += row * batch.count
        self.ranks.sum(table)
        means = dict(zip(names, (table.sum(0) / table[:, -1].sum()).tolist(), strict=False))
        for f, row in zip(ratios, table.tolist(), strict=True):
            if row[-1]:
                means |= {f"{name}_{f}x": value / row[-1] for name, value in zip(names, row, strict=False)}
        return means

    def _work(self, step: int, batches: Sequence[ImageBatch]) -> dict[str, float]:
        """Collective: pictures, tokens and FLOPs of the step."""
        done = [(batch.ratio, batch.count) for batch in batches]
        return self.flops.over_ranks(self.ranks, done, self._adversarial(step))

    def save(self, folder: Path) -> dict[str, Any]:
        """Collective: write both engines; the rest of the state, as plain data."""
        save_engine(self.engine, folder / "autoencoder")
        save_engine(self.discriminator, folder / "discriminator")
        return {"lecam": self.lecam.state_dict()}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Collective: go on from `save(folder)`, which returned `state`."""
        load_engine(self.engine, folder / "autoencoder", self.ranks)
        load_engine(self.discriminator, folder / "discriminator", self.ranks)
        self.lecam.load_state_dict(state["lecam"])
