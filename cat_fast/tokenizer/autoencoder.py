"""The nested VAE: one autoencoder whose encoder is tapped, and whose decoder is entered, at several depths.

Six blocks downsample five times. The feature map that has been halved k times is the one at ratio
f = 2^k: an image spends its compression by where it leaves the encoder (spec: "nested VAE"). A
channel-matching residual block carries the taps that lie before the deepest one to the width of the shared
mid block; the decoder mirrors it, so the output always has the size of the input.
"""

import hashlib
import json
import math

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from cat_fast.tokenizer.initialisation import pyramid_initialise
from cat_fast.tokenizer.networks import NestedDecoder, NestedEncoder, Widths


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
            pyramid_initialise(self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
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
