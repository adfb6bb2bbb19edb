"""Amounts per step for throughput and MFU: images, tokens and FLOPs.

FLOPs cover the forward and backward passes of the trained models and of the networks in their losses; a
multiply-accumulate is two. The ghost pass, recomputed activations and R1's second gradient do not count,
since they are overhead.

torch counts on meta-device copies, which takes seconds for a large model. So a few sizes are counted before
the first step, and a step's FLOPs follow by formula: per image for the nested VAE; for a sequence of n tokens
with m text tokens, linear layers are affine in n and m, and attention is a n² + b n m + c n.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import repeat
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.data.images.size import Size, height_and_width
from cat_fast.generator import DiT, PackedText
from cat_fast.models.build import build_model
from cat_fast.packing import PackedSequence
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.tokenizer.losses import TokenizerObjective
from cat_fast.training.config.settings import TokenizerRun

META = torch.device("meta")
LINEAR_OPERATORS = (torch.ops.aten.mm, torch.ops.aten.addmm)
"""Operators that linear layers dispatch to; attention uses others."""


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
        return counter.get_total_flops()


class DiTFlops:
    """FLOPs of the diffusion transformer's steps, by formula from counts of up to three sequences.

    Sequences do not attend to each other, so a packed batch costs the sum of its sequences.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        with META:
            self.model = build_model(DiT, arguments)

    def of(self, lengths: Iterable[int], text_lengths: Iterable[int] | None = None) -> int:
        """Return the FLOPs of a packed batch, forward and backward.

        Args:
            lengths: tokens of each sequence.
            text_lengths: tokens of each sequence's text, for a text-conditional model.
        """
        texts = repeat(0) if text_lengths is None else text_lengths
        return sum(sum(self.sequence_flops(*pair).values()) for pair in zip(lengths, texts, strict=False))

    def sequence_flops(self, length: int, text_length: int = 0) -> dict[str, int]:
        """Return the FLOPs of one sequence as `linear` and `attention`, which is quadratic in the tokens."""
        rates = self._rates
        return {
            "linear": rates.constant + rates.token * length + rates.text_token * text_length,
            "attention": (rates.pair * length + rates.text_pair * text_length + rates.lone) * length,
        }

    @cached_property
    def _rates(self) -> "_Rates":
        n, m = _COUNTED_TOKENS, _COUNTED_TEXT if self.model.config.text_dim is not None else 0
        first, longer = self._count(n, m), self._count(2 * n, m)
        token = (longer["linear"] - first["linear"]) // n
        pair = (longer["attention"] - 2 * first["attention"]) // (2 * n * n)
        text_token = text_pair = 0
        if m:
            wordy = self._count(n, 2 * m)
            text_token = (wordy["linear"] - first["linear"]) // m
            text_pair = (wordy["attention"] - first["attention"]) // (n * m)
        return _Rates(
            constant=first["linear"] - token * n - text_token * m,
            token=token,
            text_token=text_token,
            pair=pair,
            text_pair=text_pair,
            lone=first["attention"] // n - pair * n - text_pair * m,
        )

    def _count(self, length: int, text_length: int) -> dict[str, int]:
        with FlopCounterMode(display=False) as counter:
            predict_on_meta(self.model, length, text_length).sum().backward()
        return split_flops(counter)


_COUNTED_TOKENS, _COUNTED_TEXT = 32, 16
"""Tokens and text tokens of the shortest sequence that is counted."""


@dataclass(frozen=True)
class _Rates:
    """FLOPs per sequence, token, text token, pair of tokens, and pair of a token and a text token.

    `lone` are those of a token's attention without tokens to attend to: it also attends to learned states.
    """

    constant: int
    token: int
    text_token: int
    pair: int
    text_pair: int
    lone: int


def split_flops(counter: FlopCounterMode) -> dict[str, int]:
    """Return a counter's total for a diffusion transformer, split into `linear` and `attention`."""
    by_operator = counter.get_flop_counts()["Global"]
    linear = sum(by_operator[operator] for operator in LINEAR_OPERATORS if operator in by_operator)
    return {"linear": linear, "attention": counter.get_total_flops() - linear}


def predict_on_meta(model: DiT, length: int, text_length: int = 0) -> torch.Tensor:
    """Run a meta-device model on one sequence and its text; return the prediction, (length, C)."""
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
