"""StyleGAN2-architecture discriminator, used patch-wise.

Residual architecture of Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (2020), with
equalised learning rate, low-pass filtered downsampling and a minibatch-stddev channel. Parameter names are
those of the published networks (`b64.conv0.weight`, `b4.fc.weight`, …).

The autoencoder's images are larger than the discriminator's own resolution: it judges random crops of
that size, and the minibatch-stddev channel is fed zeros, because crops of different images say nothing
about each other.
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
    """Convolution whose weight is scaled at run time by 1/sqrt(fan-in); leaky ReLU with gain sqrt(2)."""

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

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight = (self.weight * self.weight_gain).to(x_BCHW.dtype)
        bias = None if self.bias is None else self.bias.to(x_BCHW.dtype)
        if self.down == 2:
            x_BCHW = self._low_pass(x_BCHW)
            x_BCHW = F.conv2d(x_BCHW, weight, bias, stride=2)
        else:
            x_BCHW = F.conv2d(x_BCHW, weight, bias, padding=self.padding)
        if self.activation:
            x_BCHW = F.leaky_relu(x_BCHW, 0.2) * _LRELU_GAIN
        return x_BCHW * self.gain

    def _low_pass(self, x_BCHW: Tensor) -> Tensor:
        channels = x_BCHW.shape[1]
        kernel = self.resample_filter.to(x_BCHW.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(x_BCHW, kernel, padding=self.padding + 1, groups=channels)


class EqualizedLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int, activation: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.weight_gain = 1 / math.sqrt(in_features)
        self.activation = activation

    def forward(self, x_BC: Tensor) -> Tensor:
        x_BC = F.linear(x_BC, (self.weight * self.weight_gain).to(x_BC.dtype), self.bias.to(x_BC.dtype))
        return F.leaky_relu(x_BC, 0.2) * _LRELU_GAIN if self.activation else x_BC


class DiscriminatorBlock(nn.Module):
    """Two convolutions and a skip path, halving the side: (B, C, R, R) -> (B, C', R/2, R/2)."""

    def __init__(self, in_channels: int, out_channels: int, from_rgb: bool) -> None:
        super().__init__()
        self.fromrgb = EqualizedConv(3, in_channels, 1) if from_rgb else None
        half = math.sqrt(0.5)
        self.conv0 = EqualizedConv(in_channels, in_channels, 3)
        self.conv1 = EqualizedConv(in_channels, out_channels, 3, down=2, gain=half)
        self.skip = EqualizedConv(
            in_channels, out_channels, 1, bias=False, activation=False, down=2, gain=half
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.fromrgb is not None:
            x_BCHW = self.fromrgb(x_BCHW)
        return self.skip(x_BCHW) + self.conv1(self.conv0(x_BCHW))


class DiscriminatorEpilogue(nn.Module):
    """4 x 4 features and one (zero) minibatch-stddev channel -> one logit per crop."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = EqualizedConv(channels + 1, channels, 3)
        self.fc = EqualizedLinear(channels * 16, channels, activation=True)
        self.out = EqualizedLinear(channels, 1, activation=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        zeros = x_BCHW.new_zeros(x_BCHW.shape[0], 1, 4, 4)
        x_BCHW = self.conv(torch.cat([x_BCHW, zeros], dim=1))
        return self.out(self.fc(x_BCHW.flatten(1))).squeeze(1)


class StyleGANDiscriminator(nn.Module):
    """One logit per crop: (B, 3, resolution, resolution) in [-1, 1] -> (B,).

    Args:
        resolution: side of the crops it judges, a power of two >= 8.
        channel_base: channels at resolution r are channel_base / r, at most channel_max.
    """

    def __init__(self, resolution: int = 256, channel_base: int = 32768, channel_max: int = 512) -> None:
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"discriminator resolution {resolution}: a power of two, at least 8, is needed")
        self.resolution = resolution

        def width(side: int) -> int:
            return min(channel_base // side, channel_max)

        self.block_resolutions = [resolution >> i for i in range(resolution.bit_length() - 3)]
        for side in self.block_resolutions:
            self.add_module(f"b{side}", DiscriminatorBlock(width(side), width(side // 2), side == resolution))
        self.b4 = DiscriminatorEpilogue(width(4))

    @classmethod
    def from_pickle(cls, path: Path) -> "StyleGANDiscriminator":
        """The discriminator of a published StyleGAN2-ADA pickle, of which only tensors are read.

        Raises:
            UserError: no such pickle, or one without a residual discriminator for RGB images.
        """
        networks = load_pickle(path)
        if not isinstance(networks, dict) or "D" not in networks:
            raise UserError(f"{path}: there is no discriminator D in it")
        state = module_state(networks["D"])
        sides = [int(match[1]) for name in state if (match := re.match(r"b(\d+)\.fromrgb\.weight", name))]
        if not sides:
            raise UserError(f"{path}: D is no residual StyleGAN2 discriminator")
        widths = [w.shape[0] for name, w in state.items() if name.endswith("conv0.weight")]
        model = cls(
            sides[0],
            channel_base=state[f"b{sides[0]}.conv0.weight"].shape[0] * sides[0],
            channel_max=max(widths),
        )
        ours = model.state_dict()
        wrong = [
            name for name, value in ours.items() if getattr(state.get(name), "shape", None) != value.shape
        ]
        if wrong:
            raise UserError(f"{path}: {wrong[0]} is missing or has another shape than expected")
        model.load_state_dict({name: state[name] for name in ours})
        return model

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for side in self.block_resolutions:
            x_BCHW = self.get_submodule(f"b{side}")(x_BCHW)
        return self.b4(x_BCHW)


def random_crops(images: list[Tensor], resolution: int) -> list[Tensor]:
    """The same random window of side `resolution` from each (B, 3, H, W) batch, one window per sample.

    Images no larger than the window are returned as they are. Randomness comes from torch's global state.
    """
    B, _, height, width = images[0].shape
    if height <= resolution and width <= resolution:
        return images
    tops = torch.randint(0, height - resolution + 1, (B,)).tolist()
    lefts = torch.randint(0, width - resolution + 1, (B,)).tolist()
    return [
        torch.stack(
            [x[:, i : i + resolution, j : j + resolution] for x, i, j in zip(batch, tops, lefts, strict=True)]
        )
        for batch in images
    ]
