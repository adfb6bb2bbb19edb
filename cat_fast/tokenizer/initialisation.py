"""How the untrained nested VAE treats a picture: as an image pyramid.

With torch's default initialisation each convolution on the residual stream shrinks it, while every residual
branch, being normalised, adds at full scale: after six blocks nothing is left of the picture's own colours,
and short runs spend most of their steps digging them out again. Here the residual branches start at zero and
the stream's convolutions keep what they carry: downsampling averages, upsampling repeats, and changes of
width copy channels as far as there are any.

The first layer of encoder and of decoder gives each channel a constant of its own. GroupNorm divides by the
spread over a group's channels and positions: beside constants of size one, that spread hardly depends on the
picture, and its brightness and contrast survive the normalisation.
"""

import torch
from torch import nn

from cat_fast.tokenizer.blocks import Attention, Downsample, ResnetBlock, Upsample


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Apply to a whole autoencoder; submodules of other kinds keep torch's initialisation."""
    for part in module.modules():
        if isinstance(part, ResnetBlock):
            _zero(part.conv2)
            if part.conv_shortcut is not None:
                _keep(part.conv_shortcut)
        elif isinstance(part, Attention):
            _zero(part.to_out[0])
        elif isinstance(part, Downsample):
            _average(part.conv)
        elif isinstance(part, Upsample):
            _keep(part.conv)


def mark_channels(conv: nn.Conv2d) -> None:
    """Random constants of standard deviation 1 as the bias of the layer that opens a residual stream."""
    assert conv.bias is not None
    nn.init.normal_(conv.bias)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _keep(conv: nn.Conv2d) -> None:
    """Channel i to channel i (modulo the input's width when it grows), the centre tap only."""
    conv.weight.zero_()
    centre = conv.kernel_size[0] // 2
    for channel in range(conv.out_channels):
        conv.weight[channel, channel % conv.in_channels, centre, centre] = 1.0
    if conv.bias is not None:
        conv.bias.zero_()


def _average(conv: nn.Conv2d) -> None:
    """Each channel's mean over the kernel."""
    conv.weight.zero_()
    for channel in range(conv.out_channels):
        conv.weight[channel, channel] = 1.0 / (conv.kernel_size[0] * conv.kernel_size[1])
    if conv.bias is not None:
        conv.bias.zero_()
