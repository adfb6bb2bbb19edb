"""The tokenizer's objective: L1 + beta * KL + perceptual + features + delta * GAN (spec: "Objective").

Each term is a mean over the batch, computed in float32, and reported as it is and as it weighs. The
discriminator has an objective of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.tokenizer.adversarial import GAN_LOSSES, R1, LeCam, balance
from cat_fast.tokenizer.features import ResNetFeatures
from cat_fast.tokenizer.perceptual import PERCEPTUAL, STLPIPS, perceptual_distance


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the terms; the published ones are 1, 1e-6, 1, 0.2 and 0.5 from step 50,000."""

    l1_weight: float = 1.0
    kl_weight: float = 1e-6
    perceptual: str = STLPIPS.name
    """`lpips_vgg` is the paper's, `st_lpips_alex` comes with its weights; `auto`: the first that is there."""
    perceptual_weight: float = 1.0
    features_weight: float = 0.0
    features_weights: str = ""
    """Checkpoint of the feature network, such as MoCo-v2's `moco_v2_800ep_pretrain.pth.tar`."""
    features_trunk: str = "resnet50"
    gan_weight: float = 0.5
    gan_loss_starting_step: int = 50_000
    gan_loss: str = "non_saturating"
    adaptive_gan_weight: bool = False
    """Balance the GAN's gradient at the reconstruction with that of the other terms."""
    r1_weight: float = 0.0
    r1_every_steps: int = 16
    """R1 is computed in every so many steps, and weighs as many times as much."""
    lecam_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("perceptual", PERCEPTUAL), ("gan_loss", GAN_LOSSES)):
            if getattr(self, name) not in known:
                raise UserError(f"loss.{name}: {getattr(self, name)!r} is not one of {', '.join(known)}")
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value < 0:
                raise UserError(f"loss.{name}: {value} is negative")
        if self.r1_every_steps < 1:
            raise UserError(f"loss.r1_every_steps: {self.r1_every_steps} must be at least 1")
        if self.features_weight and not self.features_weights:
            raise UserError(
                "loss.features_weight is set, but loss.features_weights names no file: download MoCo-v2's "
                "ResNet-50 (moco_v2_800ep_pretrain.pth.tar) and give its path, or set features_weight to 0"
            )


class Distance:
    """A frozen network's mean distance between images and reconstructions, under the network's own name."""

    def __init__(self, name: str, network: torch.nn.Module, weight: float) -> None:
        self.name, self.network, self.weight = name, network, weight

    def __call__(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        return self.network(reconstructions.float(), images.float()).mean()


class GAN:
    """Weight, start and losses of the adversarial term."""

    name = "gan"

    def __init__(self, weight: float, loss: str, starting_step: int, adaptive: bool) -> None:
        self.weight, self.starting_step, self.adaptive = weight, starting_step, adaptive
        self.generator_loss, self.discriminator_loss = GAN_LOSSES[loss]

    def active(self, step: int) -> bool:
        return self.weight > 0 and step >= self.starting_step

    def weight_beside(self, others: Tensor, value: Tensor, reconstructions: Tensor) -> float | Tensor:
        """The weight; if adaptive, times what makes it pull as hard as the sum of the `others`."""
        return self.weight * balance(others, value, reconstructions) if self.adaptive else self.weight


@dataclass
class Loss:
    """A scalar to differentiate, and each term in it as it is and as it weighs."""

    total: Tensor
    raw: dict[str, Tensor] = field(default_factory=dict)
    weighted: dict[str, Tensor] = field(default_factory=dict)

    def terms(self) -> dict[str, Tensor]:
        """Every term for the log: by its name as it is, and under weighted/ as it weighs."""
        return {**self.raw, **{f"weighted/{name}": value for name, value in self.weighted.items()}}

    def add(self, name: str, value: Tensor, weight: float | Tensor) -> None:
        contribution = weight * value
        self.total = self.total + contribution
        self.raw[name] = value.detach()
        self.weighted[name] = contribution.detach()


class TokenizerObjective:
    """Loss of a batch of reconstructions; holds the frozen networks, and the GAN's term apart.

    The GAN's comes last, because it may be weighed against the sum of the others.
    """

    def __init__(self, config: LossConfig, device: torch.device | str = "cpu") -> None:
        self.l1_weight, self.kl_weight = config.l1_weight, config.kl_weight
        self.distances: list[Distance] = []
        if config.perceptual_weight:
            name, network = perceptual_distance(config.perceptual)
            self.distances.append(Distance(name, network.to(device), config.perceptual_weight))
        if config.features_weight:
            features = ResNetFeatures(Path(config.features_weights), config.features_trunk).to(device)
            self.distances.append(Distance("features", features, config.features_weight))
        self.gan = GAN(
            config.gan_weight, config.gan_loss, config.gan_loss_starting_step, config.adaptive_gan_weight
        )

    def __call__(
        self,
        images: Tensor,
        reconstructions: Tensor,
        posterior: DiagonalGaussianDistribution,
        fake_logits: Tensor | None = None,
        window: Sequence[Tensor] | None = None,
    ) -> Loss:
        """Return the loss of a batch.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstructions: likewise.
            fake_logits: the discriminator's logits of the reconstructions, (B,), once the GAN has started.
            window: the same crops of images and reconstructions, for the feature networks; None for all.
        """
        loss = Loss(torch.zeros((), device=images.device))
        loss.add("l1", F.l1_loss(reconstructions.float(), images.float()), self.l1_weight)
        # Summed over a latent, mean over the batch.
        loss.add("kl", posterior.kl().mean(), self.kl_weight)
        for distance in self.distances:
            loss.add(distance.name, distance(*(window or (images, reconstructions))), distance.weight)
        if fake_logits is not None:
            value = self.gan.generator_loss(fake_logits)
            loss.add(self.gan.name, value, self.gan.weight_beside(loss.total, value, reconstructions))
        return loss


class DiscriminatorObjective:
    """Loss of the discriminator: telling images from reconstructions, without overdoing it."""

    def __init__(self, config: LossConfig) -> None:
        _, self.tell_apart = GAN_LOSSES[config.gan_loss]
        self.r1 = R1(config.r1_weight, config.r1_every_steps)
        self.lecam = LeCam(config.lecam_weight)

    def __call__(
        self,
        step: int,
        real_logits: Tensor,
        fake_logits: Tensor,
        judge: Callable[[Tensor], Tensor],
        real: Tensor,
    ) -> Loss:
        """Logits (B,) of images and reconstructions; `judge` is the discriminator, `real` its images."""
        loss = Loss(torch.zeros((), device=real.device))
        loss.add("discriminator", self.tell_apart(real_logits, fake_logits), 1.0)
        if self.r1.due(step):
            loss.add(self.r1.name, self.r1(judge, real), self.r1.lazy_weight)
        if self.lecam.weight:
            loss.add(self.lecam.name, self.lecam(real_logits, fake_logits), self.lecam.weight)
        return loss
