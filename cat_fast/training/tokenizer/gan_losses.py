"""A batch's losses of both models: what a run differentiates, and what a plan of it measures.

The rules that keep two engines right under ZeRO 1 and 2 begin here: the discriminator is frozen in the
generator's loss, and called once, on real and fake together, in its own.
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
    """The objectives, on windows of a batch.

    Args:
        perceptual_crop: side of the window that the feature networks look at; 0 for the whole image.
        crops: the same windows of several batches, as `random_crops` draws them.
    """

    objective: TokenizerObjective
    discriminator_objective: DiscriminatorObjective
    perceptual_crop: int = 0
    crops: Callable[[list[Tensor], int], list[Tensor]] = random_crops

    def of_autoencoder(
        self,
        autoencoder: Callable[..., tuple[Tensor, DiagonalGaussianDistribution]],
        discriminator: StyleGANDiscriminator | None,
        batch: ImageBatch,
    ) -> tuple[Tensor, Loss]:
        """Reconstructions (B, 3, H, W) float32, and the autoencoder's loss of them.

        Args:
            autoencoder: `NestedAutoencoderKL.reconstruct`, or an engine that calls it.
            discriminator: the module, which is left frozen; None until the GAN starts.
            batch: images in [-1, 1].
        """
        images = batch.images
        reconstructions, posterior = autoencoder(images, batch.ratio, ghost_pass=True)
        # A float32 view: losses and the discriminator are float32 whatever the engine computes in, and
        # gradients at the reconstructions, for balancing, stop here: past it are the engine's hooks.
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

    def of_discriminator(
        self,
        discriminator: Callable[[Tensor], Tensor],
        judge: StyleGANDiscriminator,
        step: int,
        batch: ImageBatch,
        reconstructions: Tensor,
    ) -> tuple[Loss, Tensor, Tensor]:
        """The discriminator's loss, and its logits of images and reconstructions, (B,) each.

        Args:
            discriminator: the module, or an engine around it.
            judge: the module, which R1 asks past the engine: its hooks would take the gradient at
                its images for the backward pass.
            reconstructions: without a gradient.
        """
        judge.requires_grad_(True)
        crops = self.crops([batch.images, reconstructions], judge.resolution)
        real, fake = discriminator(torch.cat(crops)).chunk(2)
        return self.discriminator_objective(step, real, fake, judge, crops[0]), real, fake


def _in_float32(posterior: DiagonalGaussianDistribution) -> DiagonalGaussianDistribution:
    parameters = posterior.parameters
    return (
        posterior if parameters.dtype == torch.float32 else DiagonalGaussianDistribution(parameters.float())
    )
