"""The two halves of the nested VAE: an encoder with several taps, a decoder with several entries.

Level k is what has been downsampled k times: ratio 2^k, width channels[k].
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cat_fast.tokenizer.blocks import DownBlock, GroupNorm, MidBlock, ResnetBlock, UpBlock, ghost


@dataclass(frozen=True)
class Widths:
    """The shape that encoder and decoder share."""

    channels: tuple[int, ...]  # per level
    mid: int
    mid_layers: int
    head_dim: int
    groups: int
    ratios: tuple[int, ...]
    encoder_matching: tuple[int, ...]  # the ratios that have a channel-matching block, on either side
    decoder_matching: tuple[int, ...]
    attention_levels: tuple[int, ...]

    @property
    def levels(self) -> int:
        """How many levels are built: those past the deepest ratio are left out."""
        return level_of(max(self.ratios)) + 1

    def tap(self, ratio: int) -> int:
        """Width of the encoder's features at a ratio."""
        return self.channels[level_of(ratio)]

    def entry(self, ratio: int) -> int:
        """Width that the decoder's up block of a ratio takes: what the block below it puts out."""
        level = level_of(ratio)
        return self.mid if level == len(self.channels) - 1 else self.channels[level + 1]

    def mid_block(self) -> MidBlock:
        return MidBlock(self.mid, self.mid_layers, self.head_dim, self.groups)


def level_of(ratio: int) -> int:
    """Downsamplings that make `ratio`: 8 -> 3, 16 -> 4, 32 -> 5."""
    return ratio.bit_length() - 1


class Half(nn.Module):
    """What encoder and decoder have in common: checkpoints between blocks, if asked for."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any  # set by enable_gradient_checkpointing

    def run(self, function: Any, x_BCHW: Tensor) -> Tensor:
        """`function` of x, keeping only x for the backward pass where gradients are checkpointed."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, x_BCHW)
        return function(x_BCHW)


class NestedEncoder(Half):
    """(B, 3, H, W) -> (B, 2c, H/f, W/f): mean and log-variance of the latent at ratio f."""

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

    def forward(self, x_BCHW: Tensor, ratio: int, ghost_pass: bool = False) -> Tensor:
        tap = level_of(ratio)
        h = self.conv_in(x_BCHW)
        nothing = h.new_zeros(())
        blocks = cast(Iterable[DownBlock], self.down_blocks)
        for level, block in enumerate(blocks):
            if level < tap:
                h = self.run(block, h)
            elif level == tap:
                h = self.run(block.features, h)
                if ghost_pass:
                    for downsampler in block.downsamplers:
                        nothing = nothing + ghost(downsampler, block.out_channels, like=h)
            elif ghost_pass:
                nothing = nothing + ghost(block, block.in_channels, like=h)
        for f, matching in self.channel_matching.items():
            if int(f) == ratio:
                h = matching(h)
            elif ghost_pass:
                nothing = nothing + ghost(matching, self.widths.tap(int(f)), like=h)
        if ghost_pass:
            h = h + nothing
        return self.conv_out(self.conv_norm_out(self.run(self.mid_block, h)))


class NestedDecoder(Half):
    """(B, c, H/f, W/f) -> (B, 3, H, W): enters the up blocks at the level of the ratio."""

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

    def forward(self, z_BCHW: Tensor, ratio: int, ghost_pass: bool = False) -> Tensor:
        entry = self.widths.levels - 1 - level_of(ratio)
        h = self.run(self.mid_block, self.conv_in(z_BCHW))
        nothing = h.new_zeros(())
        for f, matching in self.channel_matching.items():
            if int(f) == ratio:
                h = matching(h)
            elif ghost_pass:
                nothing = nothing + ghost(matching, self.widths.mid, like=h)
        for i, block in enumerate(cast(Iterable[UpBlock], self.up_blocks)):
            if i >= entry:
                h = self.run(block, h)
            elif ghost_pass:
                nothing = nothing + ghost(block, block.in_channels, like=h)
        if ghost_pass:
            h = h + nothing
        return self.conv_out(self.conv_norm_out(h))
