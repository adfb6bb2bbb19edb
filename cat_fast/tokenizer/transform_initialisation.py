"""Transform initialisation, which makes the untrained nested VAE a block transform coder.

The pyramid initialisation carries three latent channels, the mean colours of a token. Here all latent
channels carry information from the start: the most important coefficients of a DCT of the token's YCbCr
colours, scaled to about unit variance. Residual branches start at zero, and the stream transforms:

- Downsampling combines the coefficients of 2 x 2 blocks to those of the block of twice the side.
- Upsampling predicts the coefficients of the four smaller blocks from those of 3 x 3 larger ones. Nearest-
  neighbour upsampling and a 3 x 3 convolution cannot invert the transform, so these convolutions are fitted,
  in the least-squares sense, to noise with the spectrum of natural images.

A value is stored in pairs of channels, x and -x, or, from the first ratio's level on and before the last
GroupNorm and SiLU, in the quads of `initialisation`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_fast.tokenizer.blocks import Attention, DownBlock, ResnetBlock, UpBlock
from cat_fast.tokenizer.initialisation import OFFSETS, SIGNS
from cat_fast.tokenizer.networks import NestedDecoder, NestedEncoder, level_of

_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_LUMA, _CHROMA = 0.5, 0.15
"""Standard deviations of the components' means."""
_CHROMA_RANK = 0.45
"""Importance of a chroma coefficient relative to the luma one of the same frequency."""
_SPREAD = (4.0 + 0.8) ** 0.5
"""Standard deviation of a group of quads whose values have a mean square of 0.8."""
_MOST_VALUES = 32
"""Values per position above the first ratio's level."""
_IMAGES, _SIDE, _ROWS, _RIDGE = 48, 128, 20_000, 1e-4
"""Noise images of the fit, their side in pixels, positions per convolution, and its regularization."""


@dataclass(frozen=True)
class _Layout:
    """Storage of `count` values in `width` channels."""

    count: int
    width: int
    quads: bool

    def write(self) -> tuple[Tensor, Tensor]:
        """Return (width, count) and (width,): channels are the matrix times the values, plus the offsets."""
        matrix, offsets = torch.zeros(self.width, self.count), torch.zeros(self.width)
        for channel in range(self.width):
            if self.quads:
                quad, place = divmod(channel, 4)
                matrix[channel, quad % self.count], offsets[channel] = SIGNS[place], OFFSETS[place]
            else:
                repeat, value = divmod(channel, self.count)
                matrix[channel, value] = (-1.0) ** repeat
        return matrix, offsets

    def read(self) -> Tensor:
        """Return (count, width): values are the matrix times the channels."""
        matrix = self.write()[0].T
        return matrix / matrix.abs().sum(1, keepdim=True)


@torch.no_grad()
def transform_initialise(
    encoder: NestedEncoder, decoder: NestedDecoder, quant_conv: nn.Conv2d, post_quant_conv: nn.Conv2d
) -> None:
    """Initialise the parts of an autoencoder of RGB images.

    Raises:
        ValueError: too few channels for the values: 12 in the first block, 16 in the second, four per latent
            channel from the first ratio's level on.
    """
    widths, latents = encoder.widths, decoder.conv_in.in_channels
    first = level_of(min(widths.ratios))
    if min(*widths.channels[first : widths.levels], widths.mid) < 4 * latents or widths.channels[0] < 12:
        raise ValueError(
            f"initialisation: transform needs block_out_channels of at least 12, and {4 * latents} at every "
            f"ratio, got {list(widths.channels)}"
        )
    if encoder.conv_in.weight.is_meta:
        return  # no memory to initialise: the model is counted, or its weights are loaded later
    for part in (*encoder.modules(), *decoder.modules()):
        if isinstance(part, ResnetBlock):
            _zero(part.conv2)
        elif isinstance(part, Attention):
            _zero(part.to_out[0])
    _initialise_encoder(encoder, latents, first)
    _initialise_decoder(decoder, latents, first)
    for conv in (quant_conv, post_quant_conv):
        _zero(conv)
        conv.weight[:, :, 0, 0] = torch.eye(conv.out_channels)


def _initialise_encoder(encoder: NestedEncoder, latents: int, first: int) -> None:
    channels = encoder.widths.channels
    now = _Layout(3, channels[0], first == 0)
    _write(encoder.conv_in, None, now, torch.einsum("vchw,cd->vdhw", coefficients(1, 3), _YCBCR))
    realised = coefficients(1, 3)
    for level, block in enumerate(cast(Iterable[DownBlock], encoder.down_blocks)):
        now = _relay(
            cast(ResnetBlock, block.resnets[0]), now, _Layout(now.count, channels[level], level >= first)
        )
        for down in block.downsamplers:
            opened = level >= first or (level + 1 == first and channels[level] == channels[first])
            after = _Layout(_count(level + 1, first, latents, now.width), now.width, opened)
            kernel = _combine(realised, coefficients(2 ** (level + 1), after.count))
            _write(cast(nn.Conv2d, down.conv), now, after, kernel)
            now, realised = (
                after,
                torch.einsum("ovij,vchw->ocihjw", kernel, realised).reshape(
                    after.count, 3, 2 ** (level + 1), 2 ** (level + 1)
                ),
            )
    mid = _Layout(latents, encoder.widths.mid, True)
    for ratio, matching in encoder.channel_matching.items():
        _relay(cast(ResnetBlock, matching), _Layout(latents, encoder.widths.tap(int(ratio)), True), mid)
    _write_last(encoder.conv_out, mid, torch.eye(latents))


def _initialise_decoder(decoder: NestedDecoder, latents: int, first: int) -> None:
    widths = decoder.widths
    top = widths.levels - 1
    kernels = _fit_upsampling(
        [_count(level, first, latents, widths.channels[level]) for level in range(top + 1)], first
    )
    mid = _Layout(latents, widths.mid, True)
    _write(decoder.conv_in, None, mid, torch.eye(latents)[:, :, None, None])
    for ratio, matching in decoder.channel_matching.items():
        _relay(cast(ResnetBlock, matching), mid, _Layout(latents, widths.entry(int(ratio)), True))
    now = _Layout(latents, widths.entry(2**top), True)
    for level, block in zip(range(top, -1, -1), cast(Iterable[UpBlock], decoder.up_blocks), strict=True):
        quads = level >= first or level == 0
        now = _relay(
            cast(ResnetBlock, block.resnets[0]), now, _Layout(now.count, widths.channels[level], quads)
        )
        for up in block.upsamplers:
            kernel = kernels[level]
            same = widths.channels[level] == widths.channels[level - 1]
            opened = level - 1 >= first or (level == 1 and same)
            after = _Layout(len(kernel), now.width, opened)
            _write(cast(nn.Conv2d, up.conv), now, after, kernel)
            now = after
    colours = torch.linalg.inv(_YCBCR) @ torch.diag(torch.tensor([_LUMA, _CHROMA, _CHROMA]))
    _write_last(decoder.conv_out, now, colours)


def coefficients(side: int, count: int) -> Tensor:
    """Return the most important DCT functionals of a block, (count, 3, side, side), of YCbCr values.

    Amplitudes of natural images fall with the inverse of the frequency; each functional is divided by its
    standard deviation under this model.
    """
    k = torch.arange(side)
    cosines = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / side) * math.sqrt(2 / side)
    cosines[0] /= math.sqrt(2)
    ranked = []
    for component in range(3):
        for u in range(side):
            for v in range(side):
                falloff = 1 / (1 + 2 * math.hypot(u, v))
                rank = falloff * (_CHROMA_RANK if component else 1.0) + (u == v == 0)
                scale = falloff * (_CHROMA if component else _LUMA)
                ranked.append((-rank, component, u, v, scale))
    chosen = torch.zeros(count, 3, side, side)
    for i, (_, component, u, v, scale) in enumerate(sorted(ranked)[:count]):
        chosen[i, component] = torch.outer(cosines[u], cosines[v]) / (side * scale)
    return chosen


def _count(level: int, first: int, latents: int, width: int) -> int:
    """Return the number of values per position of a level, of which `width` channels can store that many."""
    return latents if level >= first else min(_MOST_VALUES, 3 * 4**level, width)


def _combine(parts: Tensor, wanted: Tensor) -> Tensor:
    """Return (wanted, parts, 2, 2): the functionals of four blocks combined to about the wanted ones."""
    count, _, half, _ = parts.shape
    placed = torch.zeros(count, 2, 2, 3, 2 * half, 2 * half)
    for i in range(2):
        for j in range(2):
            placed[:, i, j, :, i * half : (i + 1) * half, j * half : (j + 1) * half] = parts
    basis = placed.flatten(3).flatten(0, 2).double()
    return (
        torch.linalg.lstsq(basis.T, wanted.flatten(1).T.double())
        .solution.T.float()
        .unflatten(1, (count, 2, 2))
    )


def _fit_upsampling(counts: list[int], first: int) -> dict[int, Tensor]:
    """Return per level the kernel (values of the next finer level, values, 3, 3) after nearest upsampling."""
    generator = torch.Generator().manual_seed(0)
    images = _noise(generator)
    exact = [F.conv2d(images, coefficients(2**level, n), stride=2**level) for level, n in enumerate(counts)]
    kernels = {}
    for level in range(len(counts) - 1, first, -1):
        kernels[level] = _regress(exact[level], exact[level - 1], generator)
    estimate = exact[first]
    for level in range(first, 0, -1):
        kernels[level] = _regress(estimate, exact[level - 1], generator)
        estimate = F.conv2d(_enlarged(estimate), kernels[level])
    return kernels


def _noise(generator: torch.Generator) -> Tensor:
    """Return YCbCr noise whose amplitude falls with the inverse of the frequency."""
    frequency = torch.hypot(torch.fft.fftfreq(_SIDE)[:, None], torch.fft.rfftfreq(_SIDE)[None])
    frequency[0, 0] = torch.inf
    waves = torch.randn(_IMAGES, 3, *frequency.shape, 2, generator=generator)
    images = torch.fft.irfft2(torch.view_as_complex(waves) / frequency, s=(_SIDE, _SIDE))
    deviation = torch.tensor([_LUMA, _CHROMA, _CHROMA])[:, None, None]
    means = 0.6 * torch.randn(_IMAGES, 3, 1, 1, generator=generator)
    return (images / images.std((2, 3), keepdim=True) + means) * 0.9 * deviation


def _enlarged(values: Tensor) -> Tensor:
    return F.pad(F.interpolate(values, scale_factor=2.0, mode="nearest"), (1, 1, 1, 1), mode="replicate")


def _regress(values: Tensor, finer: Tensor, generator: torch.Generator) -> Tensor:
    images, _, height, width = finer.shape
    chosen = torch.randperm(images * height * width, generator=generator)[:_ROWS]
    n, y, x = chosen // (height * width), chosen // width % height, chosen % width
    enlarged = _enlarged(values)
    taps = (
        torch.stack([enlarged[n, :, y + i, x + j] for i in range(3) for j in range(3)], 2).flatten(1).double()
    )
    gram = taps.T @ taps + _RIDGE * len(taps) * torch.eye(taps.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, taps.T @ finer[n, :, y, x].double())
    return weights.T.float().unflatten(1, (values.shape[1], 3, 3))


def _relay(block: ResnetBlock, before: _Layout, after: _Layout) -> _Layout:
    """Let a block's shortcut keep the values; without one, the layouts must agree."""
    if block.conv_shortcut is None:
        assert before == after
    else:
        _write(block.conv_shortcut, before, after, torch.eye(after.count)[:, :, None, None])
    return after


def _write(conv: nn.Conv2d, before: _Layout | None, after: _Layout, kernel: Tensor) -> None:
    """Set a convolution to a kernel (after, before, h, w) of values; smaller kernels start at the centre, or,
    with a stride, at the first tap."""
    matrix, offsets = after.write()
    if before is not None:
        kernel = torch.einsum("avhw,vb->abhw", kernel, before.read())
    height, width = kernel.shape[2:]
    start = 0 if conv.stride[0] > 1 else (conv.kernel_size[0] - height) // 2
    _zero(conv)
    conv.weight[:, :, start : start + height, start : start + width] = torch.einsum(
        "oa,abhw->obhw", matrix, kernel
    )
    assert conv.bias is not None
    conv.bias.copy_(offsets)


def _write_last(conv: nn.Conv2d, before: _Layout, mix: Tensor) -> None:
    """Set the first outputs of a convolution after GroupNorm and SiLU; others stay random.

    The SiLUs of a quad, with its signs, sum to twice its value over the spread.
    """
    conv.weight[: len(mix)] = 0.0
    conv.weight[: len(mix), :, 1, 1] = 2 * _SPREAD * mix @ before.read()
    assert conv.bias is not None
    conv.bias.zero_()


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
