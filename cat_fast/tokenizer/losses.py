"""Objectives of the tokenizer, L1 + beta * KL + perceptual + features + delta * GAN, and its discriminator.

Each term is a mean over the batch in float32, logged with and without its weight ("Objective" in the paper).
"""

import math
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
    """Weights of the loss terms; published: 1, 1e-6, 1, 0.2 and 0.5 from step 50,000."""

    l1_weight: float = 1.0
    kl_weight: float = 1e-6
    perceptual: str = STLPIPS.name
    """`lpips_vgg` (paper), `st_lpips_alex` (needs no download) or `auto` (the first available)."""
    perceptual_weight: float = 1.0
    features_weight: float = 0.0
    features_weights: str = ""
    """Checkpoint of the feature network, such as MoCo-v2's `moco_v2_800ep_pretrain.pth.tar`."""
    features_trunk: str = "resnet50"
    gan_weight: float = 0.5
    gan_loss_starting_step: int = 50_000
    gan_loss: str = "non_saturating"
    adaptive_gan_weight: bool = False
    """Scale the GAN term so that its gradient at the reconstruction is as large as that of the others."""
    r1_weight: float = 0.0
    r1_every_steps: int = 16
    """R1 is computed in every `r1_every_steps`-th step, with `r1_every_steps` times the weight."""
    lecam_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("perceptual", PERCEPTUAL), ("gan_loss", GAN_LOSSES)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"loss.{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise UserError(f"loss.{name}: expected a finite number of at least 0, got {value}")
        if self.r1_every_steps < 1:
            raise UserError(f"loss.r1_every_steps: expected at least 1, got {self.r1_every_steps}")
        if self.features_weight and not self.features_weights:
            raise UserError(
                "loss.features_weight is set, but loss.features_weights is empty: set it to the path of "
                "MoCo-v2's ResNet-50 (moco_v2_800ep_pretrain.pth.tar), or set features_weight to 0"
            )


class Distance:
    """Mean distance between images and reconstructions by a frozen network, logged under its name.

    Args:
        half: compute the network's features in bf16, with channels-last tensors, and the distance in fp32.
    """

    def __init__(self, name: str, network: torch.nn.Module, weight: float, *, half: bool = False) -> None:
        self.name, self.network, self.weight, self.half = name, network, weight, half

    def __call__(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        pair = [reconstructions.float(), images.float()]
        if not self.half:
            return self.network(*pair).mean()
        pair = [x.contiguous(memory_format=torch.channels_last) for x in pair]
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.network(*pair).float().mean()


class GAN:
    """Weight, start and losses of the adversarial term."""

    name = "gan"

    def __init__(self, weight: float, loss: str, starting_step: int, adaptive: bool) -> None:
        self.weight, self.starting_step, self.adaptive = weight, starting_step, adaptive
        self.autoencoder_loss, self.discriminator_loss = GAN_LOSSES[loss]

    def active(self, step: int) -> bool:
        return self.weight > 0 and step >= self.starting_step

    def balanced_weight(self, others: Tensor, value: Tensor, reconstructions: Tensor) -> float | Tensor:
        """Return the weight; if adaptive, scaled to match the gradient of the sum of the `others`."""
        return self.weight * balance(others, value, reconstructions) if self.adaptive else self.weight


@dataclass
class Loss:
    """Total loss, and its terms before and after weighting."""

    total: Tensor
    raw: dict[str, Tensor] = field(default_factory=dict)
    weighted: dict[str, Tensor] = field(default_factory=dict)

    def terms(self) -> dict[str, Tensor]:
        """Return all terms for the log: unweighted under their names, weighted under weighted/."""
        return {**self.raw, **{f"weighted/{name}": value for name, value in self.weighted.items()}}

    def add(self, name: str, value: Tensor, weight: float | Tensor) -> None:
        contribution = weight * value
        self.total = self.total + contribution
        self.raw[name] = value.detach()
        self.weighted[name] = contribution.detach()


class TokenizerObjective:
    """Loss of the autoencoder, with the frozen networks it uses.

    The GAN term is added last, because its weight may depend on the sum of the others.

    Args:
        device: of the frozen networks.
        precision: of the run; on a GPU, the frozen networks of a bf16 run compute their features in bf16.
    """

    def __init__(
        self, config: LossConfig, device: torch.device | str = "cpu", precision: str = "fp32"
    ) -> None:
        self.l1_weight, self.kl_weight = config.l1_weight, config.kl_weight
        self._half = precision == "bf16" and torch.device(device).type == "cuda"
        self.distances: list[Distance] = []
        if config.perceptual_weight:
            name, network = perceptual_distance(config.perceptual)
            self.add_distance(name, network.to(device), config.perceptual_weight)
        if config.features_weight:
            features = ResNetFeatures(Path(config.features_weights), config.features_trunk).to(device)
            self.add_distance("features", features, config.features_weight)
        self.gan = GAN(
            config.gan_weight, config.gan_loss, config.gan_loss_starting_step, config.adaptive_gan_weight
        )

    def add_distance(self, name: str, network: torch.nn.Module, weight: float) -> None:
        """Add a term by a frozen network on the device of the objective."""
        self.distances.append(Distance(name, network, weight, half=self._half))

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
            posterior: the distribution of the latents.
            fake_logits: the discriminator's logits of the reconstructions, (B,), once the GAN has started.
            window: crops of images and reconstructions for the feature networks; None for the full images.
        """
        loss = Loss(torch.zeros((), device=images.device))
        loss.add("l1", F.l1_loss(reconstructions.float(), images.float()), self.l1_weight)
        # Summed over a latent, mean over the batch.
        loss.add("kl", posterior.kl().mean(), self.kl_weight)
        for distance in self.distances:
            loss.add(distance.name, distance(*(window or (images, reconstructions))), distance.weight)
        if fake_logits is not None:
            value = self.gan.autoencoder_loss(fake_logits)
            loss.add(self.gan.name, value, self.gan.balanced_weight(loss.total, value, reconstructions))
        return loss


class DiscriminatorObjective:
    """Loss of the discriminator, with its regularisers."""

    def __init__(self, config: LossConfig) -> None:
        _, self.gan_loss = GAN_LOSSES[config.gan_loss]
        self.r1 = R1(config.r1_weight, config.r1_every_steps)
        self.lecam = LeCam(config.lecam_weight)

    def __call__(
        self,
        step: int,
        real_logits: Tensor,
        fake_logits: Tensor,
        discriminator: Callable[[Tensor], Tensor],
        real: Tensor,
    ) -> Loss:
        """Return the loss of the logits (B,) of images and reconstructions; `real` are the images, for R1."""
        loss = Loss(torch.zeros((), device=real.device))
        loss.add("discriminator", self.gan_loss(real_logits, fake_logits), 1.0)
        if self.r1.due(step):
            loss.add(self.r1.name, self.r1(discriminator, real), self.r1.lazy_weight)
        if self.lecam.weight:
            loss.add(self.lecam.name, self.lecam(real_logits, fake_logits), self.lecam.weight)
        return loss
