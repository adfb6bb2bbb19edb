"""The tokenizer's objective: L1 + beta * KL + perceptual + delta * GAN (spec: "Objective").

Every term is a mean over the batch and is reported raw; the objective adds them with their weights. The
GAN's two halves are the standard non-saturating ones and are computed in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.tokenizer.perceptual import STLPIPS

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
PERCEPTUAL: dict[str, Callable[[], PerceptualDistance]] = {STLPIPS.name: STLPIPS.pretrained}


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the terms; the published ones are 1, 1e-6, 1, 0.5 from step 50,000."""

    l1_weight: float = 1.0
    kl_weight: float = 1e-6
    perceptual: str = STLPIPS.name
    perceptual_weight: float = 1.0
    gan_weight: float = 0.5
    gan_loss_starting_step: int = 50_000

    def __post_init__(self) -> None:
        if self.perceptual not in PERCEPTUAL:
            raise UserError(f"loss.perceptual: {self.perceptual!r} is not one of {', '.join(PERCEPTUAL)}")
        for name in ("l1_weight", "kl_weight", "perceptual_weight", "gan_weight", "gan_loss_starting_step"):
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name}: {getattr(self, name)} is negative")


@dataclass
class Loss:
    """A scalar to differentiate and the raw value of each term in it."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, weight: float) -> None:
        self.total = self.total + weight * value
        self.terms[name] = value.detach()


class TokenizerObjective:
    """Loss of a batch of reconstructions; holds the frozen perceptual network."""

    def __init__(self, config: LossConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.perceptual = PERCEPTUAL[config.perceptual]()
        if isinstance(self.perceptual, torch.nn.Module):
            self.perceptual.to(device)

    def gan_active(self, step: int) -> bool:
        return self.config.gan_weight > 0 and step >= self.config.gan_loss_starting_step

    def __call__(
        self,
        pictures: Tensor,
        reconstructions: Tensor,
        posterior: DiagonalGaussianDistribution,
        fake_logits: Tensor | None = None,
        perceptual_pair: Sequence[Tensor] | None = None,
    ) -> Loss:
        """Pictures and reconstructions (B, 3, H, W); `fake_logits` (B,) once the GAN has started.

        `perceptual_pair` (picture, reconstruction) is what the perceptual term looks at, if not the whole.
        """
        config = self.config
        loss = Loss(torch.zeros((), device=pictures.device))
        loss.add("l1", F.l1_loss(reconstructions.float(), pictures.float()), config.l1_weight)
        loss.add("kl", posterior.kl().mean(), config.kl_weight)
        target, seen = perceptual_pair or (pictures, reconstructions)
        loss.add("perceptual", self.perceptual(seen, target).mean(), config.perceptual_weight)
        if fake_logits is not None:
            loss.add("gan", generator_loss(fake_logits), config.gan_weight)
        return loss


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating: -log sigmoid(D(fake))."""
    return F.softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Standard: -log sigmoid(D(real)) - log(1 - sigmoid(D(fake)))."""
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()
