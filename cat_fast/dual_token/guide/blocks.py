"""Blocks of the guide's decoder, normalised under the control of the codes, as in MoVQ (Zheng et al., 2022).

A group norm removes the local level and contrast of features, which a decoder of few codes cannot restore.
`SpatialNorm` gives them back from the codes at each position. Layer names follow diffusers' `SpatialNorm` and
`ResnetBlockCondNorm2D`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from cat_fast.tokenizer.blocks import Attention, GroupNorm, Upsample


class SpatialNorm(nn.Module):
    """norm(x) * scale(q) + shift(q), with 1x1 convolutions of the quantised vectors q at each position."""

    def __init__(self, channels: int, code_channels: int, norm_num_groups: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(norm_num_groups, channels, activation=False)
        self.conv_y = nn.Conv2d(code_channels, channels, 1)
        self.conv_b = nn.Conv2d(code_channels, channels, 1)

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        """Normalise features (B, C, H, W) by quantised vectors (B, D, h, w), repeated to H x W."""
        # The convolutions are of single positions, so they commute with the repetition and come first.
        scale, shift = (F.interpolate(conv(q), size=x.shape[-2:]) for conv in (self.conv_y, self.conv_b))
        return self.norm_layer(x) * scale + shift


class ConditionedResnetBlock(nn.Module):
    """Residual block whose norms are `SpatialNorm`s."""

    def __init__(self, in_channels: int, out_channels: int, code_channels: int, norm_num_groups: int) -> None:
        super().__init__()
        self.norm1 = SpatialNorm(in_channels, code_channels, norm_num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = SpatialNorm(out_channels, code_channels, norm_num_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, q)))
        h = self.conv2(F.silu(self.norm2(h, q)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class ConditionedAttention(Attention):
    """Residual self-attention whose norm is a `SpatialNorm`."""

    def __init__(self, channels: int, head_dim: int, code_channels: int, norm_num_groups: int) -> None:
        super().__init__(channels, head_dim, norm_num_groups)
        del self.group_norm
        self.spatial_norm = SpatialNorm(channels, code_channels, norm_num_groups)

    def forward(self, x: Tensor, q: Tensor) -> Tensor:  # type: ignore[override] # the codes are an argument
        return x + self.attend(self.spatial_norm(x, q))


class ConditionedMidBlock(nn.Module):
    """`num_layers` attention layers alternating with `num_layers + 1` residual blocks, at constant width."""

    def __init__(
        self, channels: int, num_layers: int, head_dim: int, code_channels: int, norm_num_groups: int
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            ConditionedAttention(channels, head_dim, code_channels, norm_num_groups)
            for _ in range(num_layers)
        )
        self.resnets = nn.ModuleList(
            ConditionedResnetBlock(channels, channels, code_channels, norm_num_groups)
            for _ in range(num_layers + 1)
        )

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        h = self.resnets[0](x, q)
        for attention, resnet in zip(self.attentions, list(self.resnets)[1:], strict=True):
            h = resnet(attention(h, q), q)
        return h


class ConditionedUpBlock(nn.Module):
    """Residual blocks and, unless it is the last block, an upsampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        code_channels: int,
        num_layers: int,
        norm_num_groups: int,
        *,
        upsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ConditionedResnetBlock(
                out_channels if i else in_channels, out_channels, code_channels, norm_num_groups
            )
            for i in range(num_layers)
        )
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, q)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x
