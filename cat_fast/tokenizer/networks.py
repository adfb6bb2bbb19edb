"""Encoder and decoder of the nested VAE, with one exit or entry point per ratio.

Level k has been downsampled k times: ratio 2^k, width channels[k].
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cat_fast.tokenizer.blocks import DownBlock, GroupNorm, MidBlock, ResnetBlock, UpBlock, ghost


@dataclass(frozen=True)
class Widths:
    """Widths and depths shared by encoder and decoder."""

    channels: tuple[int, ...]  # per level
    mid: int
    mid_layers: int
    head_dim: int
    groups: int
    ratios: tuple[int, ...]
    encoder_matching: tuple[int, ...]  # ratios with a channel-matching block
    decoder_matching: tuple[int, ...]
    attention_levels: tuple[int, ...]

    @property
    def levels(self) -> int:
        """Number of levels built: those deeper than the largest ratio are left out."""
        return level_of(max(self.ratios)) + 1

    def tap(self, ratio: int) -> int:
        """Return the width of the encoder's features at a ratio."""
        return self.channels[level_of(ratio)]

    def entry(self, ratio: int) -> int:
        """Return the input width of the decoder's up block for a ratio."""
        level = level_of(ratio)
        return self.mid if level == len(self.channels) - 1 else self.channels[level + 1]

    def mid_block(self) -> MidBlock:
        return MidBlock(self.mid, self.mid_layers, self.head_dim, self.groups)


def level_of(ratio: int) -> int:
    """Return the number of halvings of a ratio: 8 -> 3, 16 -> 4, 32 -> 5."""
    return ratio.bit_length() - 1


class CheckpointedModule(nn.Module):
    """Base of encoder and decoder, with optional gradient checkpointing per block."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any  # set by enable_gradient_checkpointing

    def run(self, function: Any, x: Tensor) -> Tensor:
        """Apply `function` to x; with gradient checkpointing, only x is kept for the backward pass."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, x)
        return function(x)


class NestedEncoder(CheckpointedModule):
    """Encoder: (B, 3, H, W) -> mean and log-variance of the latent at ratio f, (B, 2c, H/f, W/f)."""

    def __init__(self, widths: Widths, in_channels: int, latent_channels: int, layers_per_block: int) -> None:
        super().__init__()
        self.widths = widths
        channels = widths.channels
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                channels[max(level - 1, 0)],
                channels[level],
                layers_per_block,
                widths.groups,
                attention=level in widths.attention_levels,
                downsample=level < widths.levels - 1,
            )
            for level in range(widths.levels)
        )
        self.channel_matching = nn.ModuleDict(
            {str(f): ResnetBlock(widths.tap(f), widths.mid, widths.groups) for f in widths.encoder_matching}
        )
        self.mid_block = widths.mid_block()
        self.conv_norm_out = GroupNorm(widths.groups, widths.mid)
        self.conv_out = nn.Conv2d(widths.mid, 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor, ratio: int, ghost_pass: bool = False) -> Tensor:
        tap = level_of(ratio)
        h = self.conv_in(x)
        ghosts = h.new_zeros(())
        blocks = cast(Iterable[DownBlock], self.down_blocks)
        for level, block in enumerate(blocks):
            if level < tap:
                h = self.run(block, h)
            elif level == tap:
                h = self.run(block.features, h)
                if ghost_pass:
                    for downsampler in block.downsamplers:
                        ghosts = ghosts + ghost(downsampler, block.out_channels, like=h)
            elif ghost_pass:
                ghosts = ghosts + ghost(block, block.in_channels, like=h)
        for f, matching in self.channel_matching.items():
            if int(f) == ratio:
                h = matching(h)
            elif ghost_pass:
                ghosts = ghosts + ghost(matching, self.widths.tap(int(f)), like=h)
        if ghost_pass:
            h = h + ghosts
        return self.conv_out(self.conv_norm_out(self.run(self.mid_block, h)))


class NestedDecoder(CheckpointedModule):
    """Decoder: (B, c, H/f, W/f) -> (B, 3, H, W), starting at the up block of the ratio's level."""

    def __init__(
        self, widths: Widths, out_channels: int, latent_channels: int, layers_per_block: int
    ) -> None:
        super().__init__()
        self.widths = widths
        self.conv_in = nn.Conv2d(latent_channels, widths.mid, 3, padding=1)
        self.mid_block = widths.mid_block()
        self.channel_matching = nn.ModuleDict(
            {str(f): ResnetBlock(widths.mid, widths.entry(f), widths.groups) for f in widths.decoder_matching}
        )
        self.up_blocks = nn.ModuleList(
            UpBlock(
                widths.entry(2**level),
                widths.channels[level],
                layers_per_block,
                widths.groups,
                attention=level in widths.attention_levels,
                upsample=level > 0,
            )
            for level in range(widths.levels - 1, -1, -1)
        )
        self.conv_norm_out = GroupNorm(widths.groups, widths.channels[0])
        self.conv_out = nn.Conv2d(widths.channels[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor, ratio: int, ghost_pass: bool = False) -> Tensor:
        entry = self.widths.levels - 1 - level_of(ratio)
        h = self.run(self.mid_block, self.conv_in(z))
        ghosts = h.new_zeros(())
        for f, matching in self.channel_matching.items():
            if int(f) == ratio:
                h = matching(h)
            elif ghost_pass:
                ghosts = ghosts + ghost(matching, self.widths.mid, like=h)
        for i, block in enumerate(cast(Iterable[UpBlock], self.up_blocks)):
            if i >= entry:
                h = self.run(block, h)
            elif ghost_pass:
                ghosts = ghosts + ghost(block, block.in_channels, like=h)
        if ghost_pass:
            h = h + ghosts
        return self.conv_out(self.conv_norm_out(h))
