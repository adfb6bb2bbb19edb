"""Convolutional blocks of the nested VAE.

Layer names and arithmetic follow diffusers' AutoencoderKL (`ResnetBlock2D`, `DownEncoderBlock2D`,
`UpDecoderBlock2D`, `UNetMidBlock2D`), so that LDM and Stable Diffusion weights load. Normalisation and
activation use the fused operator `group_norm_silu`; attention uses `scalar_attention` for one-dimensional
heads and `wide_attention` for wide ones.

Shapes: B batch, C channels, H and W sides of the feature map, N = H * W positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_fast.kernels.group_norm_silu.op import group_norm_silu
from cat_fast.kernels.linear.layer import Linear
from cat_fast.kernels.scalar_attention.op import scalar_attention
from cat_fast.kernels.sdpa import scaled_dot_product_attention
from cat_fast.kernels.wide_attention.op import wide_attention

NORM_EPS = 1e-6
WIDE = 256
"""Smallest head dimension that uses `wide_attention`."""


class GroupNorm(nn.GroupNorm):
    """GroupNorm with an optional SiLU, fused into one operator; shapes are (B, C, H, W)."""

    def __init__(self, num_groups: int, num_channels: int, activation: bool = True) -> None:
        super().__init__(num_groups, num_channels, eps=NORM_EPS)
        self.activation = activation

    def forward(self, x: Tensor, input_bias: Tensor | None = None) -> Tensor:
        """Normalise x, or x + input_bias (C,)."""
        return group_norm_silu(
            x, self.weight, self.bias, self.num_groups, self.eps, self.activation, input_bias
        )


class ConvBeforeNorm(nn.Conv2d):
    """Convolution whose bias is added by the GroupNorm that follows, where that is faster.

    Returns the features, and the bias that they lack or None.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        if leaves_bias_to_norm(x):
            return self._conv_forward(x, self.weight, None), self.bias
        return super().forward(x), None


def leaves_bias_to_norm(x: Tensor) -> bool:
    """Return True on GPUs, where a convolution adds its bias in a pass of its own."""
    return x.is_cuda


class ResnetBlock(nn.Module):
    """Residual block x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut if the width changes."""

    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(norm_num_groups, in_channels)
        self.conv1 = ConvBeforeNorm(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(norm_num_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h, bias = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h, bias))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + h


class Attention(nn.Module):
    """Residual self-attention over the H x W positions with `channels // head_dim` heads."""

    def __init__(self, channels: int, head_dim: int, norm_num_groups: int) -> None:
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"mid block width {channels} is not divisible by attention head dim {head_dim}")
        self.head_dim = head_dim
        self.group_norm = GroupNorm(norm_num_groups, channels, activation=False)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(self.group_norm(x))

    def attend(self, h: Tensor) -> Tensor:
        """Return the attention over normalised features (B, C, H, W)."""
        B, C, H, W = h.shape
        h_BNC = h.flatten(2).transpose(1, 2)

        def heads(t_BNC: Tensor) -> Tensor:
            return t_BNC.unflatten(2, (-1, self.head_dim))

        q_BNC, k_BNC, v_BNC = self.to_q(h_BNC), self.to_k(h_BNC), self.to_v(h_BNC)
        if self.head_dim == 1:
            out_BNC = scalar_attention(q_BNC, k_BNC, v_BNC)
        elif self.head_dim >= WIDE:
            out_BNC = wide_attention(heads(q_BNC), heads(k_BNC), heads(v_BNC)).flatten(2)
        else:
            q, k, v = (heads(t_BNC).transpose(1, 2) for t_BNC in (q_BNC, k_BNC, v_BNC))
            out_BNC = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out[0](out_BNC).transpose(1, 2).reshape(B, C, H, W)


class MidBlock(nn.Module):
    """`num_layers` attention layers alternating with `num_layers + 1` residual blocks, at constant width."""

    def __init__(self, channels: int, num_layers: int, attention_head_dim: int, norm_num_groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            Attention(channels, attention_head_dim, norm_num_groups) for _ in range(num_layers)
        )
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, norm_num_groups) for _ in range(num_layers + 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.resnets[0](x)
        for attention, resnet in zip(self.attentions, list(self.resnets)[1:], strict=True):
            h = resnet(attention(h))
        return h


class Downsample(nn.Module):
    """Stride-2 convolution padded at the right and bottom: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Residual blocks and a downsampling; with `attention`, one-head attention follows each residual block.

    A ratio's tap is before the downsampling, at `features`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        norm_num_groups: int,
        *,
        attention: bool,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.resnets = _resnets(in_channels, out_channels, num_layers, norm_num_groups)
        self.attentions = _attentions(out_channels, num_layers * attention, norm_num_groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def features(self, x: Tensor) -> Tensor:
        return _run_layers(self.resnets, self.attentions, x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks and an upsampling; with `attention`, one-head attention follows each residual block."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        norm_num_groups: int,
        *,
        attention: bool,
        upsample: bool,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.resnets = _resnets(in_channels, out_channels, num_layers, norm_num_groups)
        self.attentions = _attentions(out_channels, num_layers * attention, norm_num_groups)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        x = _run_layers(self.resnets, self.attentions, x)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


def _resnets(in_channels: int, out_channels: int, num_layers: int, norm_num_groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(in_channels if i == 0 else out_channels, out_channels, norm_num_groups)
        for i in range(num_layers)
    )


def _attentions(channels: int, num_layers: int, norm_num_groups: int) -> nn.ModuleList:
    """Return attention layers with one head, as LDM's autoencoders have them outside the mid block."""
    return nn.ModuleList(Attention(channels, channels, norm_num_groups) for _ in range(num_layers))


def _run_layers(resnets: nn.ModuleList, attentions: nn.ModuleList, x: Tensor) -> Tensor:
    for i, resnet in enumerate(resnets):
        x = resnet(x)
        if attentions:
            x = attentions[i](x)
    return x


def ghost(module: nn.Module, channels: int, like: Tensor) -> Tensor:
    """Run `module` on a tiny zero tensor and return zero, with the module's parameters in the graph.

    All gradients through it are 0. A rank that does not need a block thus still *produces* its gradients, in
    the same order as the other ranks. ZeRO's bucketed reduction requires this.
    """
    zeros = torch.zeros(1, channels, 2, 2, dtype=like.dtype, device=like.device)
    return 0.0 * module(zeros).sum()
