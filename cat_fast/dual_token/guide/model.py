"""`GuideModel`: image -> grid of codes -> image at low resolution.

The encoder halves the image more often than the decoder doubles it (section 3.1): with five halvings and
three doublings, an image of 256 x 256 px becomes 8 x 8 codes and a guide of 64 x 64 px. Both are
convolutional, so one model has any grid: the image is resized to grid x stride before the encoder, and the
guide is grid x scale.

| grid | tokens | guide | image at stride 32 |
|---|---|---|---|
| 2 x 2 | 4 | 16 px | 64 px |
| 4 x 4 | 16 | 32 px | 128 px |
| 8 x 8 | 64 | 64 px | 256 px |
| 16 x 16 | 256 | 128 px | 512 px |
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from cat_fast.dual_token.codebook import Quantized, VectorQuantizer
from cat_fast.dual_token.grid import Grid, format_grid
from cat_fast.dual_token.guide.blocks import ConditionedMidBlock, ConditionedUpBlock, SpatialNorm
from cat_fast.dual_token.resize import resize
from cat_fast.errors import UserError
from cat_fast.tokenizer.blocks import DownBlock, GroupNorm, MidBlock
from cat_fast.weights.checked_model import CheckedModel
from cat_fast.weights.fingerprint import fingerprint


class GuideOutput(NamedTuple):
    """Result of a forward pass in training."""

    guide: Tensor
    """(B, 3, h * scale, w * scale)."""
    features: Tensor
    """(B, h, w, D): the encoder's vectors before quantisation."""
    quantized: Quantized


class GuideModel(CheckedModel):
    """VQ-VAE after MoVQ, with a decoder of lower resolution than its encoder.

    Args:
        block_out_channels: width per level of the encoder; n levels halve n - 1 times.
        decoder_out_channels: width per level of the decoder, from the guide's resolution down; n levels
            double n - 1 times, less often than the encoder halves.
        layers_per_block: residual blocks per encoder block; decoder blocks have one more.
        attention_levels: levels of the encoder, counted in halvings, whose blocks have attention.
        mid_block_num_layers: attention layers of each mid block.
        mid_block_attention_head_dim: head dimension of these layers.
        norm_num_groups: groups of every norm.
        code_channels: features of a codebook vector.
        codebook_size: number of codes.
        codebook: `ema` or `gradient`, see `VectorQuantizer`.

    Raises:
        ValueError: widths that are not divisible by the groups, a decoder that doubles as often as the
            encoder halves, or an unknown kind of codebook.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: Sequence[int] = (128, 128, 256, 256, 512, 512),
        decoder_out_channels: Sequence[int] = (256, 256, 512, 512),
        layers_per_block: int = 2,
        attention_levels: Sequence[int] = (5,),
        mid_block_num_layers: int = 1,
        mid_block_attention_head_dim: int = 512,
        norm_num_groups: int = 32,
        code_channels: int = 256,
        codebook_size: int = 16384,
        codebook: str = "ema",
    ) -> None:
        super().__init__()
        _check_widths(block_out_channels, decoder_out_channels, norm_num_groups)
        self.stride = 2 ** (len(block_out_channels) - 1)
        """Pixels of the encoder's input per code, per side."""
        self.scale = 2 ** (len(decoder_out_channels) - 1)
        """Pixels of the guide per code, per side."""
        groups, mid = norm_num_groups, (mid_block_num_layers, mid_block_attention_head_dim)
        self.encoder = GuideEncoder(
            block_out_channels, layers_per_block, attention_levels, mid, groups, code_channels
        )
        self.quantizer = VectorQuantizer(codebook_size, code_channels, codebook)
        self.decoder = GuideDecoder(decoder_out_channels, layers_per_block + 1, mid, groups, code_channels)

    @property
    def codebook_size(self) -> int:
        return self.quantizer.size

    def forward(self, images: Tensor) -> GuideOutput:
        """Encode, quantise and decode images (B, 3, h * stride, w * stride) in [-1, 1]."""
        features = self.encoder(images).permute(0, 2, 3, 1)
        quantized = self.quantizer(features)
        guide = self.decoder(quantized.values.permute(0, 3, 1, 2))
        return GuideOutput(guide, features, quantized)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes (B, h, w), int64, of images (B, 3, h * stride, w * stride) in [-1, 1]."""
        return self.quantizer.nearest(self.encoder(images.to(self.dtype)).permute(0, 2, 3, 1))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the guides (B, 3, h * scale, w * scale) of codes (B, h, w)."""
        return self.decoder(self.quantizer.lookup(codes).permute(0, 3, 1, 2).to(self.dtype))

    def resize_input(self, images: Tensor, grid: Grid) -> Tensor:
        """Resize images (B, 3, H, W) in [-1, 1] to the encoder's input for a grid."""
        return resize(images, (grid[0] * self.stride, grid[1] * self.stride))

    def resize_target(self, images: Tensor, grid: Grid) -> Tensor:
        """Resize images (B, 3, H, W) in [-1, 1] to the size of the guide of a grid (equation 4)."""
        return resize(images, self.guide_size(grid))

    def guide_size(self, grid: Grid) -> tuple[int, int]:
        """Return height and width in pixels of the guide of a grid."""
        return grid[0] * self.scale, grid[1] * self.scale

    def require_large_enough(self, height: int, width: int, grid: Grid) -> None:
        """Check that an image is at least as large as its guide.

        Raises:
            UserError: it is smaller.
        """
        least = self.guide_size(grid)
        if height < least[0] or width < least[1]:
            raise UserError(
                f"the image of {width} x {height} px is smaller than its guide of {least[1]} x {least[0]} px:"
                f" use fewer tokens than a grid of {format_grid(grid)}, or a larger image"
            )

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify the weights and the config; stored with codes."""
        settings = {key: value for key, value in self.config.items() if not key.startswith("_")}
        state = {name: value for name, value in self.state_dict().items() if "cluster" not in name}
        return fingerprint(settings, state)


class GuideEncoder(nn.Module):
    """(B, 3, H, W) -> (B, D, H / stride, W / stride) (equation 1)."""

    def __init__(
        self,
        widths: Sequence[int],
        layers_per_block: int,
        attention_levels: Sequence[int],
        mid: tuple[int, int],
        groups: int,
        code_channels: int,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                widths[max(level - 1, 0)],
                width,
                layers_per_block,
                groups,
                attention=level in attention_levels,
                downsample=level < len(widths) - 1,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], *mid, groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], code_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(self.conv_norm_out(self.mid_block(h)))


class GuideDecoder(nn.Module):
    """(B, D, h, w) -> (B, 3, h * scale, w * scale) (equation 3)."""

    def __init__(
        self,
        widths: Sequence[int],
        layers_per_block: int,
        mid: tuple[int, int],
        groups: int,
        code_channels: int,
    ) -> None:
        super().__init__()
        deepest_first = list(widths)[::-1]
        self.conv_in = nn.Conv2d(code_channels, deepest_first[0], 3, padding=1)
        self.mid_block = ConditionedMidBlock(deepest_first[0], *mid, code_channels, groups)
        pairs = [(deepest_first[0], deepest_first[0]), *pairwise(deepest_first)]
        self.up_blocks = nn.ModuleList(
            ConditionedUpBlock(
                before, width, code_channels, layers_per_block, groups, upsample=level < len(pairs) - 1
            )
            for level, (before, width) in enumerate(pairs)
        )
        self.conv_norm_out = SpatialNorm(widths[0], code_channels, groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, q: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(q), q)
        for block in self.up_blocks:
            h = block(h, q)
        return self.conv_out(F.silu(self.conv_norm_out(h, q)))


def _check_widths(encoder: Sequence[int], decoder: Sequence[int], groups: int) -> None:
    for name, widths in (("block_out_channels", encoder), ("decoder_out_channels", decoder)):
        if not widths or any(width % groups for width in widths):
            raise ValueError(f"{name}: expected widths divisible by {groups} groups, got {list(widths)}")
    if len(decoder) >= len(encoder):
        raise ValueError(
            f"decoder_out_channels: expected fewer levels than the encoder's {len(encoder)}, so that the"
            f" guide is smaller than the image, got {len(decoder)}"
        )
