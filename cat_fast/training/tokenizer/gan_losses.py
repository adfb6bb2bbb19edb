"""Losses of the autoencoder and the discriminator on one batch.

Two engines are correct under ZeRO 1 and 2 under these conditions: the discriminator is frozen in the
autoencoder's loss, and called once in its own loss, on real and fake images together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from cat_fast.data.image_batch import ImageBatch
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator, random_crops
from cat_fast.tokenizer.losses import DiscriminatorObjective, Loss, TokenizerObjective


@dataclass(frozen=True)
class TokenizerLosses:
    """Losses of both models, computed on crops of a batch.

    Args:
        perceptual_crop: side of the crops for the feature networks, in pixels; 0 uses the full image.
        crops: cuts the same crops from several batches, as `random_crops` does.
    """

    objective: TokenizerObjective
    discriminator_objective: DiscriminatorObjective
    perceptual_crop: int = 0
    crops: Callable[[list[Tensor], int], list[Tensor]] = random_crops

    def autoencoder_loss(
        self,
        autoencoder: Callable[..., tuple[Tensor, DiagonalGaussianDistribution]],
        discriminator: StyleGANDiscriminator | None,
        batch: ImageBatch,
    ) -> tuple[Tensor, Loss]:
        """Return the reconstructions, (B, 3, H, W) float32, and the autoencoder's loss.

        Args:
            autoencoder: `NestedAutoencoderKL.reconstruct`, or an engine that calls it.
            discriminator: the module, which is frozen on return; None before the GAN starts.
            batch: images in [-1, 1].
        """
        images = batch.images
        reconstructions, posterior = autoencoder(images, batch.ratio, ghost_pass=True)
        # Losses and the discriminator are float32 in every precision. It is a view, so that gradients for
        # loss balancing stop here and do not reach the engine's hooks.
        reconstructions = reconstructions.float().view_as(reconstructions)
        fake_logits = None
        if discriminator is not None:
            discriminator.requires_grad_(False)
            fake_logits = discriminator(*self.crops([reconstructions], discriminator.resolution))
        window = [images, reconstructions]
        if self.perceptual_crop:
            window = self.crops(window, self.perceptual_crop)
        loss = self.objective(images, reconstructions, _in_float32(posterior), fake_logits, window)
        return reconstructions, loss

    def discriminator_loss(
        self,
        discriminator: Callable[[Tensor], Tensor],
        module: StyleGANDiscriminator,
        step: int,
        batch: ImageBatch,
        reconstructions: Tensor,
    ) -> tuple[Loss, Tensor, Tensor]:
        """Return the discriminator's loss, and its logits for images and reconstructions, (B,) each.

        Args:
            discriminator: the module, or the engine that wraps it.
            module: the module itself. R1 calls it without the engine, whose hooks would mistake the gradient
                with respect to the images for the backward pass.
            reconstructions: detached reconstructions of `batch`.
        """
        module.requires_grad_(True)
        crops = self.crops([batch.images, reconstructions], module.resolution)
        real, fake = discriminator(torch.cat(crops)).chunk(2)
        return self.discriminator_objective(step, real, fake, module, crops[0]), real, fake


def _in_float32(posterior: DiagonalGaussianDistribution) -> DiagonalGaussianDistribution:
    parameters = posterior.parameters
    return (
        posterior if parameters.dtype == torch.float32 else DiagonalGaussianDistribution(parameters.float())
    )
