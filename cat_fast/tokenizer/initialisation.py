"""Pyramid initialisation, which makes the untrained nested VAE a low-pass autoencoder.

With torch's default initialisation, each convolution on the residual stream shrinks it, while every residual
branch is normalised and adds at full scale. After six blocks the colours of the image are lost, and short
runs spend most of their steps on recovering them. Here, residual branches start at zero and the stream
carries the colours: downsampling averages, upsampling interpolates, changes of width copy channels. The first
three latent channels are then the image at 1/f of its size.

To make this exact through the last GroupNorm and SiLU, a value x is stored as a *quad* of channels

    x + d,  -(x + d),  x - d,  -(x - d)        because silu(u) - silu(-u) = u.

The first two give x + d, the others x - d. With the constant d, the group's spread sqrt(d^2 + E[x^2]) hardly
depends on the image, so brightness and contrast survive the normalisation.
"""

import itertools

import torch
from torch import nn

from cat_fast.tokenizer.blocks import Attention, Downsample, ResnetBlock, Upsample
from cat_fast.tokenizer.networks import NestedDecoder, NestedEncoder

SIGNS = (1.0, -1.0, 1.0, -1.0)
_D = 2.0
OFFSETS = (_D, -_D, -_D, _D)
_SPREAD = (_D**2 + 0.3) ** 0.5  # 0.3 is about the mean square of images in [-1, 1]


@torch.no_grad()
def pyramid_initialise(
    encoder: NestedEncoder, decoder: NestedDecoder, quant_conv: nn.Conv2d, post_quant_conv: nn.Conv2d
) -> None:
    """Initialise the parts of an autoencoder; widths and group sizes should be multiples of 4, one quad."""
    for part in itertools.chain(encoder.modules(), decoder.modules()):
        if isinstance(part, ResnetBlock):
            _zero(part.conv2)
            if part.conv_shortcut is not None:
                _copy(part.conv_shortcut)
        elif isinstance(part, Attention):
            _zero(part.to_out[0])
        elif isinstance(part, Downsample):
            _average(part.conv)
        elif isinstance(part, Upsample):
            _blur(part.conv)
    colours = encoder.conv_in.in_channels
    _open_stream(encoder.conv_in)
    origins = _origins(encoder.conv_in.out_channels, encoder.widths.channels)
    _close_stream(encoder.conv_out, [(origin // 4) % colours for origin in origins], colours)
    _copy(quant_conv)
    _copy(post_quant_conv)
    _open_stream(decoder.conv_in)
    latents = decoder.conv_in.in_channels
    carried = [(channel // 4) % latents for channel in range(decoder.conv_out.in_channels)]
    _close_stream(decoder.conv_out, carried, colours)


def _open_stream(conv: nn.Conv2d) -> None:
    """Map input channel i to quad i, repeating the channels until all quads are used."""
    _zero(conv)
    assert conv.bias is not None
    for channel in range(conv.out_channels):
        quad, place = divmod(channel, 4)
        conv.weight[channel, quad % conv.in_channels, 1, 1] = SIGNS[place]
        conv.bias[channel] = OFFSETS[place]


def _close_stream(conv: nn.Conv2d, carried: list[int], values: int) -> None:
    """Set output i < `values` to the mean of the quads that carry value i; other outputs stay random.

    Args:
        carried: index of the value each input channel carries; channel i has place i modulo 4 in its quad.
    """
    assert conv.bias is not None
    conv.bias.zero_()
    for value in range(values):
        members = [channel for channel, i in enumerate(carried) if i == value]
        conv.weight[value] = 0.0
        for channel in members:
            conv.weight[value, channel, 1, 1] = SIGNS[channel % 4] * 2 * _SPREAD / len(members)


def _origins(opening: int, widths: tuple[int, ...]) -> list[int]:
    """Return the source of each final channel among the stream's first `opening` ones, after all copies."""
    origins = list(range(opening))
    for width in widths:
        origins = [origins[channel % len(origins)] for channel in range(width)]
    return origins


def _copy(conv: nn.Conv2d) -> None:
    """Copy channel i to channel i (modulo the input's width where it grows), at the centre tap only."""
    _zero(conv)
    centre = conv.kernel_size[0] // 2
    for channel in range(conv.out_channels):
        conv.weight[channel, channel % conv.in_channels, centre, centre] = 1.0


def _average(conv: nn.Conv2d) -> None:
    """Average each channel over the 2 x 2 positions that become one; the rest of the kernel is 0."""
    _zero(conv)
    for channel in range(conv.out_channels):
        conv.weight[channel, channel, :2, :2] = 0.25


def _blur(conv: nn.Conv2d) -> None:
    """Filter each channel with a binomial kernel, which turns repeated positions into an interpolation."""
    _zero(conv)
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    for channel in range(conv.out_channels):
        conv.weight[channel, channel] = torch.outer(taps, taps)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
