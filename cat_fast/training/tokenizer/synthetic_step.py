"""One training step of the tokenizer on random images, without data, ranks and engines.

`cat-fast plan cost` times it, and `cat-fast plan memory` follows its tensors. It does what a step of
`TokenizerTrainer` does once the GAN has started: the ghost pass, every term of the loss, the discriminator's
step. The loss's frozen networks have random weights, which cost as much as trained ones and need no files.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cat_fast.data.image_batch import ImageBatch
from cat_fast.models.build import build_model
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.tokenizer.features import ResNetFeatures
from cat_fast.tokenizer.losses import DiscriminatorObjective, Distance, LossConfig, TokenizerObjective
from cat_fast.tokenizer.perceptual import untrained_distance
from cat_fast.training.config.settings import OptimizerConfig, TokenizerRun
from cat_fast.training.tokenizer.gan_losses import TokenizerLosses


class Workload:
    """Models, losses and optimisers of a run, at its size and in its precision.

    Smaller images than the discriminator's resolution shrink that along.

    Raises:
        UserError: arguments that the model refuses.
    """

    def __init__(self, config: TokenizerRun, device: torch.device | str) -> None:
        self.config, self.device, self.side = config, torch.device(device), config.data.image_size
        with self.device:  # made there: fake tensors cannot be moved
            self.model = build_model(NestedAutoencoderKL, config.model)
            self.discriminator = StyleGANDiscriminator(
                min(config.discriminator.resolution, 2 ** (self.side.bit_length() - 1)),
                config.discriminator.channel_base,
                config.discriminator.channel_max,
            )
            self.objective = _objective(config.loss)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.losses = TokenizerLosses(
            self.objective, DiscriminatorObjective(config.loss), config.perceptual_crop, corners
        )
        self.optimizers = {
            self.model: _adamw(self.model, config.optimizer),
            self.discriminator: _adamw(self.discriminator, config.discriminator.optimizer),
        }

    @property
    def frozen(self) -> list[nn.Module]:
        """The loss's networks."""
        return [distance.network for distance in self.objective.distances]

    def batch(self, ratio: int, count: int) -> ImageBatch:
        """Return `count` images of noise."""
        images = torch.rand(count, 3, self.side, self.side, device=self.device) * 2 - 1
        return ImageBatch(ratio=ratio, images=images.to(memory_format=torch.channels_last))

    @property
    def adversarial(self) -> bool:
        return self.objective.gan.weight > 0

    def step(self, batch: ImageBatch) -> None:
        """A whole step, without R1, which comes in one step of many."""
        reconstructions = self.generate(batch)
        self.optimize(self.model)
        if self.adversarial:
            self.judge(batch, reconstructions, r1=False)
            self.optimize(self.discriminator)

    def generate(self, batch: ImageBatch) -> Tensor:
        """Gradients of the autoencoder; returns the reconstructions."""
        judge = self.discriminator if self.adversarial else None
        reconstructions, loss = self.losses.of_autoencoder(self._autoencoder, judge, batch)
        loss.total.backward()
        return reconstructions.detach()

    def judge(self, batch: ImageBatch, reconstructions: Tensor, *, r1: bool) -> None:
        """Gradients of the discriminator; with `r1`, as in a step in which R1 is due, if it ever is."""
        step = 0 if r1 else 1  # R1 is due in multiples of a number of steps
        judge = self.discriminator
        loss, *_ = self.losses.of_discriminator(judge, judge, step, batch, reconstructions)
        loss.total.backward()

    def _autoencoder(self, *arguments: Any, **keywords: Any) -> Any:
        """In the run's precision, as an engine computes it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.model.reconstruct(*arguments, **keywords)

    def optimize(self, module: nn.Module) -> None:
        """Move the weights of one of the two models, and forget its gradients."""
        optimizer = self.optimizers[module]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def corners(batches: list[Tensor], side: int) -> list[Tensor]:
    """Copies of one corner of each image, at the cost of `random_crops`, whose places are drawn."""
    if max(batches[0].shape[-2:]) <= side:
        return batches
    return [images[:, :, :side, :side].contiguous() for images in batches]


def _objective(loss: LossConfig) -> TokenizerObjective:
    objective = TokenizerObjective(replace(loss, perceptual_weight=0.0, features_weight=0.0))
    if loss.perceptual_weight:
        objective.distances.append(Distance(*untrained_distance(loss.perceptual), loss.perceptual_weight))
    if loss.features_weight:
        features = ResNetFeatures(None, loss.features_trunk)
        objective.distances.append(Distance("features", features, loss.features_weight))
    return objective


def _adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
