"""StyleGAN2 discriminator for crops of images.

Residual architecture of Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (2020), with
equalised learning rate, low-pass filtered downsampling and a minibatch-stddev channel. Parameter names are
those of the published networks (`b64.conv0.weight`, `b4.fc.weight`, …).

Training images are larger than the discriminator's resolution, so it sees random crops of that size. The
minibatch-stddev channel is zero, because statistics over crops of different images carry no information.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_fast.errors import UserError
from cat_fast.weights.tensor_pickle import load_pickle, module_state

_LRELU_GAIN = math.sqrt(2)


class EqualizedConv(nn.Module):
    """Convolution with weights scaled at run time by 1/sqrt(fan-in), and a leaky ReLU with gain sqrt(2)."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        activation: bool = True,
        down: int = 1,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.activation, self.down, self.gain, self.padding = activation, down, gain, kernel_size // 2
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("resample_filter", torch.outer(taps, taps))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight * self.weight_gain).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.down == 2:
            x = self._low_pass(x)
            x = F.conv2d(x, weight, bias, stride=2)
        else:
            x = F.conv2d(x, weight, bias, padding=self.padding)
        if self.activation:
            x = F.leaky_relu(x, 0.2) * _LRELU_GAIN
        return x * self.gain

    def _low_pass(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.resample_filter.to(x.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(x, kernel, padding=self.padding + 1, groups=channels)


class EqualizedLinear(nn.Module):
    """Linear layer with weights scaled at run time by 1/sqrt(fan-in), and an optional leaky ReLU."""

    def __init__(self, in_features: int, out_features: int, activation: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.weight_gain = 1 / math.sqrt(in_features)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, (self.weight * self.weight_gain).to(x.dtype), self.bias.to(x.dtype))
        return F.leaky_relu(x, 0.2) * _LRELU_GAIN if self.activation else x


class DiscriminatorBlock(nn.Module):
    """Two convolutions and a skip path that halve the side: (B, C, R, R) -> (B, C', R/2, R/2)."""

    def __init__(self, in_channels: int, out_channels: int, from_rgb: bool) -> None:
        super().__init__()
        self.fromrgb = EqualizedConv(3, in_channels, 1) if from_rgb else None
        half = math.sqrt(0.5)
        self.conv0 = EqualizedConv(in_channels, in_channels, 3)
        self.conv1 = EqualizedConv(in_channels, out_channels, 3, down=2, gain=half)
        self.skip = EqualizedConv(
            in_channels, out_channels, 1, bias=False, activation=False, down=2, gain=half
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.fromrgb is not None:
            x = self.fromrgb(x)
        return self.skip(x) + self.conv1(self.conv0(x))


class DiscriminatorEpilogue(nn.Module):
    """Head from 4 x 4 features and a zero minibatch-stddev channel to one logit per crop."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = EqualizedConv(channels + 1, channels, 3)
        self.fc = EqualizedLinear(channels * 16, channels, activation=True)
        self.out = EqualizedLinear(channels, 1, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(x.shape[0], 1, 4, 4)
        x = self.conv(torch.cat([x, zeros], dim=1))
        return self.out(self.fc(x.flatten(1))).squeeze(1)


class StyleGANDiscriminator(nn.Module):
    """Discriminator of crops (B, 3, resolution, resolution) in [-1, 1], with one logit per crop, (B,).

    Args:
        resolution: side of the crops, a power of two >= 8.
        channel_base: there are channel_base / r channels at resolution r, at most channel_max.
    """

    def __init__(self, resolution: int = 256, channel_base: int = 32768, channel_max: int = 512) -> None:
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(
                f"discriminator resolution: expected a power of two, at least 8, got {resolution}"
            )
        self.resolution = resolution

        def width(side: int) -> int:
            return min(channel_base // side, channel_max)

        self.block_resolutions = [resolution >> i for i in range(resolution.bit_length() - 3)]
        for side in self.block_resolutions:
            self.add_module(f"b{side}", DiscriminatorBlock(width(side), width(side // 2), side == resolution))
        self.b4 = DiscriminatorEpilogue(width(4))

    @classmethod
    def from_pickle(cls, path: Path) -> "StyleGANDiscriminator":
        """Load the discriminator of a published StyleGAN2-ADA pickle; only tensors are read.

        Raises:
            UserError: the file is missing, or has no residual discriminator for RGB images.
        """
        networks = load_pickle(path)
        if not isinstance(networks, dict) or "D" not in networks:
            raise UserError(f"{path}: the discriminator D is missing")
        state = module_state(networks["D"])
        widths = {
            int(match[1]): weight.shape[1]  # b64.conv0 and b4.conv keep the width of their block
            for name, weight in state.items()
            if (match := re.fullmatch(r"b(\d+)\.conv0\.weight", name)) and weight.ndim == 4
        }
        if "b4.conv.weight" in state:
            widths[4] = state["b4.conv.weight"].shape[0]
        if len(widths) < 2 or f"b{max(widths)}.fromrgb.weight" not in state:
            raise UserError(f"{path}: D is not a residual StyleGAN2 discriminator")
        model = cls(
            max(widths),
            # the smallest base of these widths: each is floor(base / side), or the maximum
            channel_base=max(width * side for side, width in widths.items()),
            channel_max=max(widths.values()),
        )
        ours = model.state_dict()
        wrong = [
            name for name, value in ours.items() if getattr(state.get(name), "shape", None) != value.shape
        ]
        if wrong:
            raise UserError(f"{path}: {wrong[0]} is missing or has another shape than expected")
        model.load_state_dict({name: state[name] for name in ours})
        return model

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # its tensor cores need channels-last; the format of the input is that of all layers
            x = x.contiguous(memory_format=torch.channels_last)
        for side in self.block_resolutions:
            x = self.get_submodule(f"b{side}")(x)
        return self.b4(x)


def random_crops(images: list[Tensor], resolution: int) -> list[Tensor]:
    """Cut the same random windows of side `resolution` from each (B, 3, H, W) batch, one window per sample.

    A side that is shorter than the window is kept; images that fit into the window are returned unchanged.
    Positions come from torch's global random state.
    """
    B, _, height, width = images[0].shape
    if height <= resolution and width <= resolution:
        return images
    h, w = min(height, resolution), min(width, resolution)
    tops = torch.randint(0, height - h + 1, (B,)).tolist()
    lefts = torch.randint(0, width - w + 1, (B,)).tolist()
    return [
        torch.stack([x[:, i : i + h, j : j + w] for x, i, j in zip(batch, tops, lefts, strict=True)])
        for batch in images
    ]
