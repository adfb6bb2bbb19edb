"""Amounts per step for throughput and MFU: images, tokens and FLOPs.

FLOPs cover the forward and backward passes of the trained models and of the networks in their losses; a
multiply-accumulate is two. The ghost pass, recomputed activations and R1's second gradient do not count,
since they are overhead.

torch counts on meta-device copies, which takes seconds for a large model. So a step's FLOPs follow from a few
counts: of one image per ratio for the nested VAE, and by formula for the transformer (`generator.flops`).
torch counts attention with heads of one dimension as products of N x N; executed are tables of few nodes.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.data.images.size import Size, height_and_width
from cat_fast.generator import DiT
from cat_fast.generator.flops import META, SequenceFlops
from cat_fast.models.build import build_model
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.tokenizer.losses import TokenizerObjective
from cat_fast.training.config.settings import TokenizerRun

SCALAR_ATTENTION_NODES = 64
"""Nodes at which `scalar_attention` sums over all positions, at unit variance; it depends on the data."""


def token_count(ratio: int, size: Size, patch_size: int = 2) -> float:
    """Return the number of DiT tokens of an image; a fraction if its latent is smaller than a patch."""
    height, width = height_and_width(size)
    return (height / ratio / patch_size) * (width / ratio / patch_size)


class TokenizerFlops:
    """FLOPs of the nested VAE's steps: those of one image, cached per ratio and use of the GAN."""

    def __init__(
        self, config: TokenizerRun, objective: TokenizerObjective, discriminator: StyleGANDiscriminator
    ) -> None:
        self.size = config.data.crop_size
        self.window = [min(config.perceptual_crop or side, side) for side in self.size]
        with META:
            self.autoencoder = build_model(NestedAutoencoderKL, config.model)
        if config.train_only:
            self.autoencoder.freeze_all_but(config.train_only)
        self.networks = [copy.deepcopy(distance.network).to(META) for distance in objective.distances]
        self.discriminator = copy.deepcopy(discriminator).to(META)
        self._of_image = cache(lambda ratio, gan: self._count(ratio, 1, gan))

    def step_amounts(self, batches: Sequence[tuple[int, int]], gan: bool) -> dict[str, float]:
        """Return the `images`, `tokens` and `flops` of one rank's step.

        Args:
            batches: (ratio, number of images) of each.
            gan: whether the discriminator is trained.
        """
        return {
            "images": sum(count for _, count in batches),
            "tokens": sum(count * token_count(ratio, self.size) for ratio, count in batches),
            "flops": sum(self.of(ratio, count, gan) for ratio, count in batches),
        }

    def of(self, ratio: int, count: int, gan: bool) -> int:
        """Return the FLOPs of a batch of `count` images, forward and backward."""
        return count * self._of_image(ratio, gan)

    def activation_bytes(self, ratio: int, count: int) -> int:
        """Return about the memory that a step keeps for its backward pass, to compare batches."""
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self._count(ratio, count, gan=True)
        return sum(kept.values())

    def _count(self, ratio: int, count: int, gan: bool) -> int:
        images = torch.empty(count, 3, *self.size, device=META)
        window = torch.empty(count, 3, *self.window, device=META)
        with FlopCounterMode(display=False) as counter:
            self.autoencoder(images, ratio).sample.sum().backward()
            for network in self.networks:
                network(window.clone().requires_grad_(), window).sum().backward()
            if gan:
                side = self.discriminator.resolution
                crops = torch.empty(count, 3, side, side, device=META)
                discriminator = self.discriminator.requires_grad_(False)
                discriminator(crops.clone().requires_grad_()).sum().backward()
                discriminator.requires_grad_(True)(torch.cat([crops, crops])).sum().backward()
        total = counter.get_total_flops()
        if self.autoencoder.config["mid_block_attention_head_dim"] != 1:
            return total
        height, width = self.size
        return total - not_executed_flops(counter, (height // ratio) * (width // ratio))


def not_executed_flops(counter: FlopCounterMode, positions: int) -> int:
    """Return the counted FLOPs of attention with heads of one dimension that no kernel executes."""
    attention = sum(
        count
        for operator, count in counter.get_flop_counts()["Global"].items()
        if "bmm" in str(operator) or "attention" in str(operator)
    )
    return attention - attention * min(positions, SCALAR_ATTENTION_NODES) // positions


class DiTFlops:
    """FLOPs of the diffusion transformer's steps.

    Sequences do not attend to each other, so a packed batch costs the sum of its sequences.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        with META:
            self.model = build_model(DiT, arguments)
        self._flops = SequenceFlops(self.model, training=True)

    def of(self, lengths: Iterable[int], text_lengths: Iterable[int] | None = None) -> int:
        """Return the FLOPs of a packed batch, forward and backward.

        Args:
            lengths: tokens of each sequence.
            text_lengths: tokens of each sequence's text, for a text-conditional model.
        """
        texts = repeat(0) if text_lengths is None else text_lengths
        return sum(self._flops.of(*pair) for pair in zip(lengths, texts, strict=False))

    def sequence_flops(self, length: int, text_length: int = 0) -> dict[str, int]:
        """Return the FLOPs of one sequence as `linear` and `attention`, which is quadratic in the tokens."""
        return self._flops.parts(length, text_length)
