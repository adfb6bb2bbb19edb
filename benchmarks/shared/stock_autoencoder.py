"""The autoencoder of one ratio, built from diffusers' blocks: the baseline of ours."""

from typing import Any

import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from torch import Tensor, nn

from cat_fast import NestedAutoencoderKL
from cat_fast.tokenizer.blocks import NORM_EPS
from cat_fast.tokenizer.networks import Widths, level_of

_NO_TIMESTEP: Any = None  # the blocks were written for diffusion models


class StockAutoencoder(nn.Module):
    """An equivalent of `model` at its only ratio, with its weights, in blocks of diffusers.

    encode: (B, 3, H, W) -> moments (B, 2c, H/f, W/f). decode: (B, c, h, w) -> (B, 3, h * f, w * f).
    """

    def __init__(self, model: NestedAutoencoderKL) -> None:
        super().__init__()
        config = model.config
        (ratio,) = config["ratios"]
        self.encoder = _Encoder(config, ratio, model.encoder.widths)
        self.decoder = _Decoder(config, ratio, model.decoder.widths)
        latent_channels = config["latent_channels"]
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.load_state_dict(model.state_dict())

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class _Encoder(nn.Module):
    def __init__(self, config: Any, ratio: int, widths: Widths) -> None:
        super().__init__()
        channels, last = widths.channels, level_of(ratio)
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(
                in_channels=channels[max(level - 1, 0)],
                out_channels=channels[level],
                num_layers=config["layers_per_block"],
                resnet_eps=NORM_EPS,
                resnet_groups=widths.groups,
                downsample_padding=0,
                add_downsample=level < last,
            )
            for level in range(last + 1)
        )
        self.channel_matching = _matching(widths.encoder_matching, channels[last], widths.mid, widths)
        self.mid_block = _mid_block(widths)
        self.conv_norm_out = nn.GroupNorm(widths.groups, widths.mid, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths.mid, 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        for matching in self.channel_matching.values():
            h = matching(h, None)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class _Decoder(nn.Module):
    def __init__(self, config: Any, ratio: int, widths: Widths) -> None:
        super().__init__()
        channels, first = widths.channels, level_of(ratio)
        self.conv_in = nn.Conv2d(config["latent_channels"], widths.mid, 3, padding=1)
        self.mid_block = _mid_block(widths)
        entry = widths.entry(ratio)
        self.channel_matching = _matching(widths.decoder_matching, widths.mid, entry, widths)
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(
                in_channels=widths.entry(2**level),
                out_channels=channels[level],
                num_layers=config["layers_per_block"] + 1,
                resnet_eps=NORM_EPS,
                resnet_groups=widths.groups,
                add_upsample=level > 0,
            )
            for level in range(first, -1, -1)
        )
        self.conv_norm_out = nn.GroupNorm(widths.groups, channels[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels[0], config["out_channels"], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for matching in self.channel_matching.values():
            h = matching(h, None)
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def _mid_block(widths: Widths) -> UNetMidBlock2D:
    return UNetMidBlock2D(
        in_channels=widths.mid,
        temb_channels=_NO_TIMESTEP,
        num_layers=widths.mid_layers,
        resnet_eps=NORM_EPS,
        resnet_groups=widths.groups,
        attention_head_dim=widths.head_dim,
    )


def _matching(ratios: tuple[int, ...], inputs: int, outputs: int, widths: Widths) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            str(ratio): ResnetBlock2D(
                in_channels=inputs,
                out_channels=outputs,
                temb_channels=_NO_TIMESTEP,
                groups=widths.groups,
                eps=NORM_EPS,
            )
            for ratio in ratios
        }
    )
