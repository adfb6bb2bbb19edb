"""How much a step is: images, tokens and FLOPs, of which a run's speed and utilisation are told.

FLOPs are those of the models trained and of the networks in their losses, forward and backward, as torch
counts them (a multiply-accumulate is two), on copies without memory. What is done beside that to train them
does not count as use: the ghost pass, activations computed again in the backward pass, R1's second gradient.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.generator import DiT, PackedText
from cat_fast.models.build import build_model
from cat_fast.packing import PackedSequence
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.tokenizer.losses import TokenizerObjective
from cat_fast.training.config.settings import TokenizerRun

META = torch.device("meta")
LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm)
"""What linear layers come to; attention is made of other products."""


def token_count(ratio: int, side: int, patch_size: int = 2) -> float:
    """What a square image costs a generator; a fraction where the latent is smaller than a patch."""
    return (side / ratio / patch_size) ** 2


class TokenizerFlops:
    """Of the nested VAE's steps; each (ratio, batch size, with or without GAN) is counted once."""

    def __init__(
        self, config: TokenizerRun, objective: TokenizerObjective, discriminator: StyleGANDiscriminator
    ) -> None:
        self.side = config.data.image_size
        self.window = min(config.perceptual_crop or self.side, self.side)
        with META:
            self.autoencoder = build_model(NestedAutoencoderKL, config.model)
        self.networks = [copy.deepcopy(distance.network).to(META) for distance in objective.distances]
        self.discriminator = copy.deepcopy(discriminator).to(META)
        self.of = cache(self._of)

    def of_step(self, batches: Sequence[tuple[int, int]], gan: bool) -> dict[str, float]:
        """Return the `images`, `tokens` and `flops` of one rank's step.

        Args:
            batches: as ratios and numbers of images.
        """
        return {
            "images": sum(count for _, count in batches),
            "tokens": sum(count * token_count(ratio, self.side) for ratio, count in batches),
            "flops": sum(self.of(ratio, count, gan) for ratio, count in batches),
        }

    def _of(self, ratio: int, count: int, gan: bool) -> int:
        images = torch.empty(count, 3, self.side, self.side, device=META)
        window = torch.empty(count, 3, self.window, self.window, device=META)
        with FlopCounterMode(display=False) as counter:
            self.autoencoder(images, ratio).sample.sum().backward()
            for network in self.networks:
                network(window.clone().requires_grad_(), window).sum().backward()
            if gan:
                side = min(self.discriminator.resolution, self.side)
                crops = torch.empty(count, 3, side, side, device=META)
                judge = self.discriminator.requires_grad_(False)
                judge(crops.clone().requires_grad_()).sum().backward()
                judge.requires_grad_(True)(torch.cat([crops, crops])).sum().backward()
        return counter.get_total_flops()


class GeneratorFlops:
    """Of the diffusion transformer's steps; each pair of lengths of a sequence and its text is counted once.

    Sequences do not see each other, so a packed batch is as much work as its sequences are one by one.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        with META:
            self.model = build_model(DiT, arguments)
        self.of_lengths = cache(self._of_lengths)

    def of(self, lengths: Iterable[int], text_lengths: Iterable[int] | None = None) -> int:
        """Of a batch of sequences of so many tokens each, and of their texts, for a model that reads text."""
        texts = repeat(0) if text_lengths is None else text_lengths
        return sum(sum(self.of_lengths(*pair).values()) for pair in zip(lengths, texts, strict=False))

    def _of_lengths(self, length: int, text_length: int = 0) -> dict[str, int]:
        """`linear`, which grows with the tokens, and `attention`, which grows with their products."""
        with FlopCounterMode(display=False) as counter:
            predict_on_meta(self.model, length, text_length).sum().backward()
        return parts_of(counter)


def parts_of(counter: FlopCounterMode) -> dict[str, int]:
    """What a counter saw of a diffusion transformer, as `linear` and `attention`."""
    by_operator = counter.get_flop_counts()["Global"]
    linear = sum(by_operator[operator] for operator in LINEAR if operator in by_operator)
    return {"linear": linear, "attention": counter.get_total_flops() - linear}


def predict_on_meta(model: DiT, length: int, text_length: int = 0) -> torch.Tensor:
    """The prediction (length, C), without values, for one sequence and a text, by a model without memory."""
    config = model.config
    packed = PackedSequence(
        tokens=torch.empty(length, config.patch_size**2 * config.in_channels, device=META),
        cu_seqlens=torch.empty(2, dtype=torch.int32, device=META),
        grid=torch.empty(1, 2, dtype=torch.int32, device=META),
        ratio=torch.empty(1, dtype=torch.int32, device=META),
        max_seqlen=length,
    )
    text = None
    if config.text_dim is not None:
        tokens = torch.empty(text_length, config.text_dim, device=META)
        text = PackedText(tokens=tokens, cu_seqlens=packed.cu_seqlens, max_seqlen=text_length)
    one = torch.empty(1, dtype=torch.int64, device=META)
    return model(packed, one, one, text, return_dict=False)[0]
