"""One training step of the tokenizer on random images, without a dataset, ranks or engines.

`cat-fast plan cost` times it, and `cat-fast plan memory` tracks its tensors. It computes the same as a step
of `TokenizerTrainer` after the GAN has started: the ghost pass, all loss terms and the discriminator's step.
The loss's frozen networks have random weights, which cost as much as trained ones and need no files.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from cat_fast.data.image_batch import ImageBatch
from cat_fast.models.build import build_model
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.tokenizer.features import ResNetFeatures
from cat_fast.tokenizer.losses import DiscriminatorObjective, LossConfig, TokenizerObjective
from cat_fast.tokenizer.perceptual import untrained_distance
from cat_fast.training.config.settings import OptimizerConfig, TokenizerRun
from cat_fast.training.runtime.engine import in_precision
from cat_fast.training.tokenizer.crop_checks import require_discriminator_fits, require_multiples
from cat_fast.training.tokenizer.gan_losses import TokenizerLosses


class Workload:
    """Models, losses and optimizers of a run, at its image size and precision.

    The size of a pretrained discriminator is taken to be the configured one, or the largest that fits.

    Raises:
        UserError: the model's arguments are invalid, or its ratios or the discriminator do not fit the crops.
    """

    def __init__(self, config: TokenizerRun, device: torch.device | str) -> None:
        self.config, self.device, self.size = config, torch.device(device), config.data.crop_size
        resolution = config.discriminator.resolution
        if config.discriminator.pretrained:  # its file, which is not read, has the resolution
            resolution = min(resolution, 1 << (min(self.size).bit_length() - 1))
        require_discriminator_fits(config, resolution)
        with self.device:  # created there, because fake tensors cannot be moved
            self.model = build_model(NestedAutoencoderKL, config.model)
            self.discriminator = StyleGANDiscriminator(
                resolution, config.discriminator.channel_base, config.discriminator.channel_max
            )
            self.objective = _objective(config.loss, self.device, config.precision)
        if config.train_only:
            self.model.freeze_all_but(config.train_only)
        require_multiples(config, self.model.ratios)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.losses = TokenizerLosses(
            self.objective, DiscriminatorObjective(config.loss), config.perceptual_crop, corner_crops
        )
        self.optimizers = {
            self.model: _adamw(self.model, config.optimizer),
            self.discriminator: _adamw(self.discriminator, config.discriminator.optimizer),
        }

    @property
    def frozen(self) -> list[Tensor]:
        """Parameters that are not trained, and buffers, of the models and of the loss's networks."""
        networks = [distance.network for distance in self.objective.distances]
        fixed = [p for p in self.model.parameters() if not p.requires_grad]
        fixed += [p for network in networks for p in network.parameters()]
        return fixed + [b for m in (self.model, self.discriminator, *networks) for b in m.buffers()]

    @property
    def trained(self) -> dict[nn.Module, list[nn.Parameter]]:
        """Parameters that the optimizers of the two models update."""
        return {
            model: [p for group in optimizer.param_groups for p in group["params"]]
            for model, optimizer in self.optimizers.items()
        }

    def batch(self, ratio: int, count: int) -> ImageBatch:
        """Return a batch of `count` random images."""
        images = torch.rand(count, 3, *self.size, device=self.device) * 2 - 1
        return ImageBatch(ratio=ratio, images=images.to(memory_format=torch.channels_last))

    @property
    def adversarial(self) -> bool:
        return self.objective.gan.weight > 0

    def step(self, batch: ImageBatch) -> None:
        """Run a complete step without R1, which few steps include."""
        reconstructions = self.reconstruct(batch)
        self.optimize(self.model)
        if self.adversarial:
            self.discriminate(batch, reconstructions, r1=False)
            self.optimize(self.discriminator)

    def reconstruct(self, batch: ImageBatch) -> Tensor:
        """Compute the autoencoder's gradients; return the reconstructions."""
        discriminator = self.discriminator if self.adversarial else None
        autoencoder = in_precision(self.model.reconstruct, self.config.precision, self.device)
        reconstructions, loss = self.losses.autoencoder_loss(autoencoder, discriminator, batch)
        loss.total.backward()
        return reconstructions.detach()

    def discriminate(self, batch: ImageBatch, reconstructions: Tensor, *, r1: bool) -> None:
        """Compute the discriminator's gradients; `r1` includes R1, if the loss has it."""
        step = 0 if r1 else 1  # 0 is a multiple of every R1 interval
        module = self.discriminator
        loss, *_ = self.losses.discriminator_loss(module, module, step, batch, reconstructions)
        loss.total.backward()

    def optimize(self, module: nn.Module) -> None:
        """Run the optimizer of one of the two models, and clear its gradients."""
        optimizer = self.optimizers[module]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def corner_crops(batches: list[Tensor], side: int) -> list[Tensor]:
    """Cut the same corner from each image, at the cost of `random_crops` but without random numbers."""
    if max(batches[0].shape[-2:]) <= side:
        return batches
    return [images[:, :, :side, :side].contiguous() for images in batches]


def _objective(loss: LossConfig, device: torch.device, precision: str) -> TokenizerObjective:
    without = replace(loss, perceptual_weight=0.0, features_weight=0.0)
    objective = TokenizerObjective(without, device, precision)
    if loss.perceptual_weight:
        objective.add_distance(*untrained_distance(loss.perceptual), loss.perceptual_weight)
    if loss.features_weight:
        features = ResNetFeatures(None, loss.features_trunk)
        objective.add_distance("features", features, loss.features_weight)
    return objective


def _adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
