"""A training step of the nested VAE and its discriminator, each with its own engine.

Every rank runs the ghost pass, so that ranks at different ratios produce all gradients in the same order.
Both engines step after both backward passes, so that a step that is not finite changes neither
(`nan_guard.StepGuard`). Other requirements of ZeRO with two engines are in `gan_losses`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from cat_fast.data.image_batch import ImageBatch
from cat_fast.errors import UserError
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.adversarial import LeCam
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.tokenizer.losses import DiscriminatorObjective, Loss, TokenizerObjective
from cat_fast.training.checkpoints.engine_state import load_engine, save_engine
from cat_fast.training.checkpoints.initial_settings import model_settings, require_same_settings
from cat_fast.training.checkpoints.write_errors import defer_write_errors
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.metrics.flops import TokenizerFlops
from cat_fast.training.metrics.step_means import RatioSums, means, means_at_ratios
from cat_fast.training.rehearsal import LargestStep
from cat_fast.training.runtime.engine import in_precision, learning_rate, make_engine, set_learning_rate
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import seed_step
from cat_fast.training.runtime.stand_ins import stand_in_parameters
from cat_fast.training.step import Backward
from cat_fast.training.tokenizer.crop_checks import require_discriminator_fits
from cat_fast.training.tokenizer.gan_losses import TokenizerLosses

NOT_APPLIED = (
    "sample_size",
    "default_ratio",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
    "latents_of",
)
"""Config entries of the autoencoder that other programs read, without effect on training."""


class TokenizerTrainer:
    """Trainer that updates both models with the mean gradient over all images of all ranks and batches.

    Each image has the same weight, also if ranks have different numbers of images. Only the adaptive weight
    of the GAN is computed per batch.

    Raises:
        UserError: crops are smaller than the discriminator.
    """

    def __init__(
        self,
        config: TokenizerRun,
        model: NestedAutoencoderKL,
        discriminator: StyleGANDiscriminator,
        ranks: Ranks,
    ) -> None:
        require_discriminator_fits(config, discriminator.resolution)
        self.config, self.ranks, self.model = config, ranks, model
        objective = TokenizerObjective(config.loss, ranks.device, config.precision)
        self.losses = TokenizerLosses(objective, DiscriminatorObjective(config.loss), config.perceptual_crop)
        self.flops = TokenizerFlops(config, objective, discriminator)  # copies, so before engines wrap them
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.engine = make_engine(
            Reconstruction(model),
            config.optimizer,
            config.deepspeed,
            config.accumulation_steps,
            config.precision,
        )
        # Always in fp32: in bf16, GANs of several projects diverged to NaN.
        self.discriminator = make_engine(
            discriminator, config.discriminator.optimizer, config.deepspeed, config.accumulation_steps
        )
        for engine in (self.engine, self.discriminator):
            defer_write_errors(engine, ranks)

    def work(self, step: int, batches: Sequence[ImageBatch]) -> dict[str, float]:
        """Return `images`, `tokens` and `flops` of this rank's batches."""
        done = [(batch.ratio, batch.count) for batch in batches]
        return self.flops.step_amounts(done, self._adversarial(step))

    def backward(self, step: int, batches: Sequence[ImageBatch], images: float) -> Backward:
        """Collective: run the forward and backward passes of a step, on one batch per accumulation step.

        Its metrics are means over all images and, as `name_8x`, over the images at each ratio.

        Args:
            images: number of images in the batches of all ranks.
        """
        seed_step(self.config.seed, step, self.ranks.rank)
        engines = self._engines_of(step)
        # Factors for the mean losses of the batches, so that the averaged gradient is the mean over images.
        shares = [batch.count * self.ranks.world_size * len(batches) / images for batch in batches]
        done: list[dict[str, Tensor]] = []
        for part, batch in enumerate(batches):
            reconstructions, loss = self._reconstruct(step, batch)
            self.ranks.step_context.start_waiting()  # from here on ranks wait for each other
            self.engine.backward(loss.total * shares[part])
            terms = {"loss": loss.total.detach(), **loss.terms()}
            if self._adversarial(step):
                terms |= self._discriminator_backward(step, batch, reconstructions.detach(), shares[part])
            done.append(terms)
            if part + 1 < len(batches):
                for engine in engines.values():
                    engine.step()  # only counts the backward passes
        names, ratios = list(done[0]), self.model.ratios
        sums = RatioSums(names, ratios, self.ranks.device)
        for batch, terms in zip(batches, done, strict=True):
            sums.add(batch.ratio, terms, batch.count)
        return Backward(
            losses={name: torch.stack([terms[name] for terms in done]) for name in names},
            engines=engines,
            sums=sums.table,
            metrics=lambda table: means(names, table) | means_at_ratios(names, ratios, table),
        )

    def update(self, backward: Backward, sums: Tensor) -> None:
        """Collective: update the weights; `sums` are `backward.sums` summed over ranks."""
        for engine in backward.engines.values():
            engine.step()
        if "discriminator" in backward.engines:
            metrics = backward.metrics(sums)
            self.lecam.update(metrics["real_logit"], metrics["fake_logit"])

    def most_demanding(self, counts: Mapping[int, int]) -> tuple[int, int]:
        """Return the ratio, and its number of images, whose step needs the most memory."""
        ratio = min(counts)  # with equal numbers of images, the one with the largest latents
        if len(set(counts.values())) > 1:
            ratio = max(counts, key=lambda f: self.flops.activation_bytes(f, counts[f]))
        return ratio, counts[ratio]

    def largest_step(self, ratio: int, count: int) -> LargestStep:
        """Return a step at this ratio and number of images, with everything that the loss can contain."""
        loss = self.config.loss
        added = [name for name, weight in (("R1", loss.r1_weight), ("LeCam", loss.lecam_weight)) if weight]
        with_gan = f", with {', '.join(['the GAN', *added])}" if loss.gan_weight else ""
        return LargestStep(
            what=f"{count} image{'s' * (count != 1)} at {ratio}x{with_gan}",
            lower="data.batch_size",
            settings="data.image_size, loss and discriminator",
            run=lambda: self._rehearse(ratio, count),
        )

    def _rehearse(self, ratio: int, count: int) -> None:
        """Run the forward and backward passes of a step after the GAN has started, on random images.

        Changes nothing and does not communicate: without the engines, on stand-ins for the parameters.

        Raises:
            UserError: a loss is not finite.
        """
        device = self.ranks.device
        noise = torch.rand(count, 3, *self.config.data.crop_size, device=device) * 2 - 1
        batch = ImageBatch(ratio=ratio, images=noise.to(memory_format=torch.channels_last))
        discriminator: StyleGANDiscriminator = self.discriminator.module

        autoencoder = in_precision(self.model.reconstruct, self.config.precision, device)
        adversarial = self.losses.objective.gan.weight > 0
        with stand_in_parameters(self.model, discriminator):
            opponent = discriminator if adversarial else None
            reconstructions, loss = self.losses.autoencoder_loss(autoencoder, opponent, batch)
            loss.total.backward()
            found = loss.raw
            if adversarial:
                step = 0  # a multiple of every interval of R1
                loss, *_ = self.losses.discriminator_loss(
                    discriminator, discriminator, step, batch, reconstructions.detach()
                )
                loss.total.backward()
                found = {**found, **loss.raw}
        if bad := [name for name, value in found.items() if not torch.isfinite(value).all()]:
            raise UserError(
                f"{', '.join(bad)} not finite: check the weights and settings of loss and discriminator"
            )

    @property
    def lecam(self) -> LeCam:
        """Averages of the LeCam regularizer, which are part of the training state."""
        return self.losses.discriminator_objective.lecam

    def _adversarial(self, step: int) -> bool:
        return self.losses.objective.gan.active(step)

    def _engines_of(self, step: int) -> dict[str, Any]:
        """Return the engines that a step updates, with their learning rates set."""
        config = self.config
        engines = {"autoencoder": (self.engine, config.optimizer.lr)}
        if self._adversarial(step):
            engines["discriminator"] = (self.discriminator, config.discriminator.optimizer.lr)
        for engine, base in engines.values():
            set_learning_rate(engine, learning_rate(base, config.schedule, step))
        return {name: engine for name, (engine, _) in engines.items()}

    def _reconstruct(self, step: int, batch: ImageBatch) -> tuple[Tensor, Loss]:
        discriminator = self.discriminator.module if self._adversarial(step) else None
        return self.losses.autoencoder_loss(self.engine, discriminator, batch)

    def _discriminator_backward(
        self, step: int, batch: ImageBatch, reconstructions: Tensor, share: float
    ) -> dict[str, Tensor]:
        engine = self.discriminator
        loss, real, fake = self.losses.discriminator_loss(engine, engine.module, step, batch, reconstructions)
        engine.backward(loss.total * share)
        return {
            **loss.terms(),
            "discriminator_accuracy": torch.cat([real > 0, fake < 0]).float().mean(),
            "real_logit": real.detach().mean(),
            "fake_logit": fake.detach().mean(),
        }

    def save(self, folder: Path) -> dict[str, Any]:
        """Collective: write both engines; return the rest of the state as JSON-compatible data."""
        save_engine(self.engine, folder / "autoencoder")
        save_engine(self.discriminator, folder / "discriminator")
        return {"lecam": self.lecam.state_dict(), "began_with": self._initial_settings()}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Collective: resume from `save(folder)`, which returned `state`."""
        require_same_settings(state.get("began_with", {}), self._initial_settings())
        load_engine(self.engine, folder / "autoencoder", self.ranks, "model")
        load_engine(self.discriminator, folder / "discriminator", self.ranks, "discriminator")
        self.lecam.load_state_dict(state["lecam"])

    def _initial_settings(self) -> dict[str, Any]:
        """Return the settings that the weights depend on, which a resumed run cannot change."""
        return model_settings(self.model.config, free=NOT_APPLIED)


class Reconstruction(nn.Module):
    """Module whose forward is an autoencoder's `reconstruct`, because engines only call forward.

    It shares the autoencoder's submodules, so parameters have the same objects and names in both.
    """

    def __init__(self, model: NestedAutoencoderKL) -> None:
        super().__init__()
        for name, part in model.named_children():
            self.add_module(name, part)
        self._reconstruct = model.reconstruct  # the model itself would be a submodule and prefix all names

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, DiagonalGaussianDistribution]:
        return self._reconstruct(*args, **kwargs)
