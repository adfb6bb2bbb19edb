"""The nested VAE: one autoencoder whose encoder is tapped, and whose decoder is entered, at several depths.

Six blocks downsample five times. The feature map that has been halved k times is the one at ratio
f = 2^k: an image spends its compression by where it leaves the encoder (spec: "nested VAE"). A
channel-matching residual block carries the taps that lie before the deepest one to the width of the shared
mid block; the decoder mirrors it, so the output always has the size of the input.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from cat_fast.tokenizer.blocks import DownBlock, GroupNorm, MidBlock, ResnetBlock, UpBlock, ghost
from cat_fast.tokenizer.initialisation import pyramid_initialise


@dataclass(frozen=True)
class Widths:
    """The shape that encoder and decoder share."""

    channels: tuple[int, ...]  # per level; level k has been downsampled k times
    mid: int
    mid_layers: int
    head_dim: int
    groups: int
    ratios: tuple[int, ...]

    @property
    def levels(self) -> int:
        """How many levels are built: those past the deepest ratio are left out."""
        return level_of(max(self.ratios)) + 1

    @property
    def matched(self) -> tuple[int, ...]:
        """Ratios that need channel matching: all that do not end at the full depth."""
        return tuple(f for f in self.ratios if level_of(f) < len(self.channels) - 1)

    def mid_block(self) -> MidBlock:
        return MidBlock(self.mid, self.mid_layers, self.head_dim, self.groups)


def level_of(ratio: int) -> int:
    """Downsamplings that make `ratio`: 8 -> 3, 16 -> 4, 32 -> 5."""
    return ratio.bit_length() - 1


class NestedEncoder(nn.Module):
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
                downsample=level < widths.levels - 1,
            )
            for level in range(widths.levels)
        )
        self.channel_matching = nn.ModuleDict(
            {str(f): ResnetBlock(channels[level_of(f)], widths.mid, widths.groups) for f in widths.matched}
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
                h = block(h)
            elif level == tap:
                h = block.features(h)
                if ghost_pass:
                    for downsampler in block.downsamplers:
                        nothing = nothing + ghost(downsampler, block.out_channels, like=h)
            elif ghost_pass:
                nothing = nothing + ghost(block, block.in_channels, like=h)
        for f, matching in self.channel_matching.items():
            if int(f) == ratio:
                h = matching(h)
            elif ghost_pass:
                nothing = nothing + ghost(matching, self.widths.channels[level_of(int(f))], like=h)
        if ghost_pass:
            h = h + nothing
        return self.conv_out(self.conv_norm_out(self.mid_block(h)))


class NestedDecoder(nn.Module):
    """(B, c, H/f, W/f) -> (B, 3, H, W): enters the up blocks at the level of the ratio."""

    def __init__(
        self, widths: Widths, out_channels: int, latent_channels: int, layers_per_block: int
    ) -> None:
        super().__init__()
        self.widths = widths
        self.conv_in = nn.Conv2d(latent_channels, widths.mid, 3, padding=1)
        self.mid_block = widths.mid_block()
        levels = range(widths.levels - 1, -1, -1)
        inputs = {level: self._input_width(level) for level in levels}
        self.channel_matching = nn.ModuleDict(
            {str(f): ResnetBlock(widths.mid, inputs[level_of(f)], widths.groups) for f in widths.matched}
        )
        self.up_blocks = nn.ModuleList(
            UpBlock(
                inputs[level], widths.channels[level], layers_per_block, widths.groups, upsample=level > 0
            )
            for level in levels
        )
        self.conv_norm_out = GroupNorm(widths.groups, widths.channels[0])
        self.conv_out = nn.Conv2d(widths.channels[0], out_channels, 3, padding=1)

    def _input_width(self, level: int) -> int:
        """Width entering the up block of `level`: what the block below it puts out."""
        deepest = len(self.widths.channels) - 1
        return self.widths.mid if level == deepest else self.widths.channels[level + 1]

    def forward(self, z_BCHW: Tensor, ratio: int, ghost_pass: bool = False) -> Tensor:
        entry = self.widths.levels - 1 - level_of(ratio)
        h = self.mid_block(self.conv_in(z_BCHW))
        nothing = h.new_zeros(())
        for f, matching in self.channel_matching.items():
            if int(f) == ratio:
                h = matching(h)
            elif ghost_pass:
                nothing = nothing + ghost(matching, self.widths.mid, like=h)
        for i, block in enumerate(cast(Iterable[UpBlock], self.up_blocks)):
            if i >= entry:
                h = block(h)
            elif ghost_pass:
                nothing = nothing + ghost(block, block.in_channels, like=h)
        if ghost_pass:
            h = h + nothing
        return self.conv_out(self.conv_norm_out(h))


class NestedAutoencoderKL(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """KL autoencoder that compresses each side by 8, 16 or 32 with one set of weights.

    Args:
        sample_size: side in pixels of the pictures it is meant for (informative).
        block_out_channels: width per level; n blocks downsample n - 1 times.
        layers_per_block: residual blocks per encoder block; decoder blocks have one more.
        latent_channels: c, the same at every ratio.
        norm_num_groups: groups of every GroupNorm.
        mid_block_num_layers: attention layers of each mid block.
        mid_block_attention_head_dim: 1 is the paper's literal reading (as many heads as channels); the width
            of the mid block gives one head.
        ratios: the ratios this model serves; one ratio makes a fixed-rate autoencoder, built without the
            blocks it would not use.
        scaling_factor: latents are multiplied by it before a diffusion model sees them.
        initialisation: `default` is torch's, as in diffusers; `pyramid` makes the untrained model a low-pass
            autoencoder, which short runs need (`cat_fast.tokenizer.initialisation`).
        initial_logvar: log-variance of the posterior before training. At 0 the noise drowns the untrained
            mean and short runs spend their first hundred steps finding that out; -6 is a standard deviation
            of 0.05.

    Raises:
        ValueError: ratios that are no powers of two within the depth, widths the groups do not divide.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 512,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 16,
        norm_num_groups: int = 32,
        mid_block_num_layers: int = 8,
        mid_block_attention_head_dim: int = 1,
        ratios: tuple[int, ...] = (8, 16, 32),
        scaling_factor: float = 1.0,
        initialisation: str = "default",
        initial_logvar: float = 0.0,
    ) -> None:
        super().__init__()
        _check_ratios(ratios, len(block_out_channels))
        if initialisation not in ("default", "pyramid"):
            raise ValueError(f"initialisation {initialisation!r} is not default or pyramid")
        for width in block_out_channels:
            if width % norm_num_groups:
                raise ValueError(
                    f"block_out_channels {width} is not divisible by norm_num_groups {norm_num_groups}"
                )
        self.ratios = tuple(sorted(ratios))
        widths = Widths(
            channels=tuple(block_out_channels),
            mid=block_out_channels[-1],
            mid_layers=mid_block_num_layers,
            head_dim=mid_block_attention_head_dim,
            groups=norm_num_groups,
            ratios=self.ratios,
        )
        self.encoder = NestedEncoder(widths, in_channels, latent_channels, layers_per_block)
        self.decoder = NestedDecoder(widths, out_channels, latent_channels, layers_per_block + 1)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        if initialisation == "pyramid":
            pyramid_initialise(self)
        if initial_logvar and self.quant_conv.bias is not None:
            self.quant_conv.bias.data[latent_channels:] += initial_logvar

    def encode(self, x_BCHW: Tensor, ratio: int, ghost_pass: bool = False) -> AutoencoderKLOutput:
        """Posterior of pictures in [-1, 1], (B, 3, H, W) -> latents (B, c, H/ratio, W/ratio).

        Only the layers up to the tap of `ratio` run; `ghost_pass` also touches the others (see `ghost`).

        Raises:
            ValueError: a ratio this model does not have, or sides that are not multiples of it.
        """
        self._check_ratio(ratio)
        height, width = x_BCHW.shape[-2:]
        if height % ratio or width % ratio:
            raise ValueError(
                f"picture of {height} x {width} px: both sides must be multiples of the ratio {ratio}"
            )
        moments = self.quant_conv(self.encoder(x_BCHW, ratio, ghost_pass))
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, z_BCHW: Tensor, ratio: int, ghost_pass: bool = False) -> DecoderOutput:
        """Pictures of latents: (B, c, h, w) -> `.sample` (B, 3, h * ratio, w * ratio), about [-1, 1]."""
        self._check_ratio(ratio)
        return DecoderOutput(sample=self.decoder(self.post_quant_conv(z_BCHW), ratio, ghost_pass))

    def forward(
        self, x_BCHW: Tensor, ratio: int, sample_posterior: bool = True, ghost_pass: bool = False
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction (B, 3, H, W) and posterior, as training needs them.

        `ghost_pass` makes every parameter of every ratio receive a gradient (zero for the unused ones).
        """
        posterior = self.encode(x_BCHW, ratio, ghost_pass).latent_dist
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z, ratio, ghost_pass).sample, posterior

    def fingerprint(self) -> str:
        """16 hex digits that change with any weight or setting: latents name the tokenizer they came from."""
        settings = {k: v for k, v in sorted(self.config.items()) if not k.startswith("_")}
        digest = hashlib.sha256(json.dumps(settings, default=list, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _check_ratio(self, ratio: int) -> None:
        if ratio not in self.ratios:
            served = ", ".join(map(str, self.ratios))
            raise ValueError(f"ratio {ratio} is not served by this tokenizer (it has {served})")


def _check_ratios(ratios: tuple[int, ...], num_blocks: int) -> None:
    deepest = 2 ** (num_blocks - 1)
    for f in ratios:
        if f < 2 or not math.log2(f).is_integer() or f > deepest:
            raise ValueError(
                f"ratio {f}: with {num_blocks} blocks a ratio is a power of two from 2 to {deepest}"
            )
    if not ratios or len(set(ratios)) != len(ratios):
        raise ValueError(f"ratios {tuple(ratios)}: give at least one, each once")
