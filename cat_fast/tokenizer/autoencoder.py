"""The nested VAE: one autoencoder whose encoder is tapped, and whose decoder is entered, at several depths.

Six blocks downsample five times. The feature map that has been halved k times is the one at ratio
f = 2^k: an image spends its compression by where it leaves the encoder (spec: "nested VAE"). A
channel-matching residual block carries the taps that lie before the deepest one to the width of the shared
mid block; the decoder mirrors it, so the output always has the size of the input.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, overload

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from cat_fast.tokenizer.initialisation import pyramid_initialise
from cat_fast.tokenizer.networks import NestedDecoder, NestedEncoder, Widths
from cat_fast.tokenizer.pretrained import from_autoencoder_kl, from_ldm_checkpoint
from cat_fast.tokenizer.tiling import Tiling, tiled
from cat_fast.weights.published import Published

_HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


class NestedAutoencoderKL(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """KL autoencoder that compresses each side by 8, 16 or 32 with one set of weights.

    Args:
        sample_size: side in pixels of the images it is meant for (informative).
        block_out_channels: width per level; n blocks downsample n - 1 times.
        layers_per_block: residual blocks per encoder block; decoder blocks have one more.
        latent_channels: c, the same at every ratio.
        norm_num_groups: groups of every GroupNorm.
        mid_block_num_layers: attention layers of each mid block.
        mid_block_attention_head_dim: 1 is the paper's literal reading (as many heads as channels); the width
            of the mid block gives one head.
        ratios: the ratios this model serves; one ratio makes a fixed-rate autoencoder, built without the
            blocks it would not use.
        encoder_matching: the ratios whose features pass a channel-matching residual block before the mid
            block; None is all that end before the full depth. Where widths differ it cannot be left out.
        decoder_matching: likewise after the decoder's mid block.
        attention_levels: levels (k is downsampled k times) whose blocks have attention after each residual
            block, as in the autoencoders of LDM at f16 and f32.
        scaling_factor, shift_factor: a diffusion model sees (latent - shift_factor) * scaling_factor.
        initialisation: `default` is torch's, as in diffusers; `pyramid` makes the untrained model a low-pass
            autoencoder, which short runs need (`cat_fast.tokenizer.initialisation`).
        initial_logvar: log-variance of the posterior before training. At 0 the noise drowns the untrained
            mean and short runs spend their first hundred steps finding that out; -6 is a standard deviation
            of 0.05.

    Raises:
        ValueError: ratios that are no powers of two within the depth, widths the groups do not divide, a
            ratio that needs channel matching and is left without.
    """

    _supports_gradient_checkpointing = True

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
        encoder_matching: tuple[int, ...] | None = None,
        decoder_matching: tuple[int, ...] | None = None,
        attention_levels: tuple[int, ...] = (),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
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
            encoder_matching=_matching(encoder_matching, self.ratios, len(block_out_channels)),
            decoder_matching=_matching(decoder_matching, self.ratios, len(block_out_channels)),
            attention_levels=tuple(attention_levels),
        )
        _check_matching(widths)
        self.encoder = NestedEncoder(widths, in_channels, latent_channels, layers_per_block)
        self.decoder = NestedDecoder(widths, out_channels, latent_channels, layers_per_block + 1)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.tiling: Tiling | None = None
        self.slicing = False
        if initialisation == "pyramid":
            pyramid_initialise(self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
        if initial_logvar and self.quant_conv.bias is not None:
            self.quant_conv.bias.data[latent_channels:] += initial_logvar

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **options: Any
    ) -> Self:
        """A trained model, in evaluation mode, from a folder or a name on the Hugging Face hub.

        Also loads, as a model with one ratio, a folder of diffusers' AutoencoderKL (such as sd-vae-ft-mse of
        Stable Diffusion) and the `.ckpt` file of an LDM autoencoder, of which only tensors are read.
        `options` are those of diffusers.

        Raises:
            UserError: a checkpoint whose layers have no counterpart here.
        """
        name = str(pretrained_model_name_or_path)
        if Path(name).suffix == ".ckpt":
            return cls._of(from_ldm_checkpoint(Path(name)), **options)
        where = {key: options[key] for key in _HUB_OPTIONS if key in options}
        config: Any = cls.load_config(name, **where)
        if config.get("_class_name") != AutoencoderKL.__name__:
            return super().from_pretrained(name, **options)
        return cls._of(from_autoencoder_kl(AutoencoderKL.from_pretrained(name, **options)))

    @classmethod
    def _of(cls, published: Published, torch_dtype: torch.dtype | None = None) -> Self:
        model = cls(**published.arguments)
        model.load_state_dict(published.state)
        dtype = torch_dtype or next(iter(published.state.values())).dtype
        return model.to(dtype).eval()

    @overload
    def encode(self, x_BCHW: Tensor, ratio: int, ghost_pass: bool = False) -> AutoencoderKLOutput: ...

    @overload
    def encode(
        self, x_BCHW: Tensor | Sequence[Tensor], ratio: Sequence[int]
    ) -> list[DiagonalGaussianDistribution]: ...

    def encode(
        self, x_BCHW: Tensor | Sequence[Tensor], ratio: int | Sequence[int], ghost_pass: bool = False
    ) -> AutoencoderKLOutput | list[DiagonalGaussianDistribution]:
        """Posterior of images in [-1, 1]: (B, 3, H, W) -> `.latent_dist` of latents (B, c, H/f, W/f).

        Only the layers up to the tap of `ratio` run; `ghost_pass` also touches the others (see `ghost`).
        With a ratio for each image, the images, (B, 3, H, W) or a list of (3, H, W) of any sizes, are
        grouped, and a list of posteriors of one image each is returned in their order.

        Raises:
            ValueError: a ratio this model does not have, sides that are not multiples of it, or another
                number of ratios than of images.
        """
        if isinstance(ratio, int):
            assert isinstance(x_BCHW, Tensor)
            return AutoencoderKLOutput(
                latent_dist=DiagonalGaussianDistribution(self._moments(x_BCHW, ratio, ghost_pass))
            )
        moments = grouped(self._moments, x_BCHW, ratio)
        return [DiagonalGaussianDistribution(one[None]) for one in moments]

    @overload
    def decode(self, z_BCHW: Tensor, ratio: int, ghost_pass: bool = False) -> DecoderOutput: ...

    @overload
    def decode(self, z_BCHW: Sequence[Tensor], ratio: Sequence[int]) -> list[Tensor]: ...

    def decode(
        self, z_BCHW: Tensor | Sequence[Tensor], ratio: int | Sequence[int], ghost_pass: bool = False
    ) -> DecoderOutput | list[Tensor]:
        """Images of latents: (B, c, h, w) -> `.sample` (B, 3, h * ratio, w * ratio), about [-1, 1].

        With a ratio for each of a list of latents (c, h, w): a list of images (3, H, W), in their order.
        """
        if isinstance(ratio, int):
            assert isinstance(z_BCHW, Tensor)
            return DecoderOutput(sample=self._images(z_BCHW, ratio, ghost_pass))
        return grouped(self._images, z_BCHW, ratio)

    def forward(
        self, x_BCHW: Tensor, ratio: int, sample_posterior: bool = True, ghost_pass: bool = False
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction (B, 3, H, W) and posterior, as training needs them.

        `ghost_pass` makes every parameter of every ratio receive a gradient (zero for the unused ones).
        """
        posterior = self.encode(x_BCHW, ratio, ghost_pass).latent_dist
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z, ratio, ghost_pass).sample, posterior

    def enable_tiling(self, size: int = 512, overlap: int = 128) -> None:
        """Encode and decode images with a side over `size` pixels in tiles that overlap by `overlap`.

        Memory then depends on the tile and no longer on the image; normalisation and attention see no more
        than a tile.

        Raises:
            ValueError: sizes that are no multiples of every ratio, or an overlap over half a tile.
        """
        tiling = Tiling(size=size, overlap=overlap)
        for ratio in self.ratios:
            tiling.require_multiples_of(ratio)
        self.tiling = tiling

    def disable_tiling(self) -> None:
        self.tiling = None

    def enable_slicing(self) -> None:
        """Encode and decode one image of a batch at a time: less memory, the same result."""
        self.slicing = True

    def disable_slicing(self) -> None:
        self.slicing = False

    def fingerprint(self) -> str:
        """16 hex digits that change with any weight or setting: latents name the tokenizer they came from."""
        settings = {k: v for k, v in sorted(self.config.items()) if not k.startswith("_")}
        digest = hashlib.sha256(json.dumps(settings, default=list, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _moments(self, x_BCHW: Tensor, ratio: int, ghost_pass: bool = False) -> Tensor:
        self._check_ratio(ratio)
        height, width = x_BCHW.shape[-2:]
        if height % ratio or width % ratio:
            raise ValueError(
                f"image of {height} x {width} px: both sides must be multiples of the ratio {ratio}"
            )

        def encode(x: Tensor) -> Tensor:
            return self.quant_conv(self.encoder(x, ratio, ghost_pass))

        return self._in_pieces(encode, x_BCHW, ratio, cell_in=ratio, cell_out=1)

    def _images(self, z_BCHW: Tensor, ratio: int, ghost_pass: bool = False) -> Tensor:
        self._check_ratio(ratio)

        def decode(z: Tensor) -> Tensor:
            return self.decoder(self.post_quant_conv(z), ratio, ghost_pass)

        return self._in_pieces(decode, z_BCHW, ratio, cell_in=1, cell_out=ratio)

    def _in_pieces(
        self, function: Callable[[Tensor], Tensor], x_BCHW: Tensor, ratio: int, *, cell_in: int, cell_out: int
    ) -> Tensor:
        """`function` of x, in slices and tiles where that is switched on."""
        if self.slicing and x_BCHW.shape[0] > 1:
            one_by_one = [
                self._in_pieces(function, x, ratio, cell_in=cell_in, cell_out=cell_out)
                for x in x_BCHW.split(1)
            ]
            return torch.cat(one_by_one)
        if self.tiling is None or max(x_BCHW.shape[-2:]) // cell_in * ratio <= self.tiling.size:
            return function(x_BCHW)
        return tiled(
            function,
            x_BCHW,
            cell_in=cell_in,
            cell_out=cell_out,
            size=self.tiling.size // ratio,
            overlap=self.tiling.overlap // ratio,
        )

    def _check_ratio(self, ratio: int) -> None:
        if ratio not in self.ratios:
            served = ", ".join(map(str, self.ratios))
            raise ValueError(f"ratio {ratio} is not served by this tokenizer (it has {served})")


def grouped(
    function: Callable[[Tensor, int], Tensor], items: Tensor | Sequence[Tensor], ratios: Sequence[int]
) -> list[Tensor]:
    """`function` of each item at its ratio, in their order, with one call for each ratio and shape."""
    if len(items) != len(ratios):
        raise ValueError(f"{len(items)} images or latents but {len(ratios)} ratios: give one for each")
    groups: dict[tuple[int, torch.Size], list[int]] = {}
    for i, (item, ratio) in enumerate(zip(items, ratios, strict=True)):
        groups.setdefault((int(ratio), item.shape), []).append(i)
    results: dict[int, Tensor] = {}
    for (ratio, _), members in groups.items():
        results |= zip(members, function(torch.stack([items[i] for i in members]), ratio), strict=True)
    return [results[i] for i in range(len(ratios))]


def _matching(given: Sequence[int] | None, ratios: tuple[int, ...], num_blocks: int) -> tuple[int, ...]:
    """The ratios that have a channel-matching block, of one side."""
    if given is not None:
        return tuple(sorted(given))
    return tuple(f for f in ratios if f < 2 ** (num_blocks - 1))


def _check_matching(widths: Widths) -> None:
    sides = (
        ("encoder", widths.encoder_matching, widths.tap),
        ("decoder", widths.decoder_matching, widths.entry),
    )
    for side, matching, width in sides:
        for f in widths.ratios:
            if f not in matching and width(f) != widths.mid:
                raise ValueError(
                    f"{side}_matching: ratio {f} is {width(f)} channels wide and the mid block {widths.mid}, "
                    "so it needs channel matching"
                )
        if unknown := set(matching) - set(widths.ratios):
            raise ValueError(f"{side}_matching: ratio {min(unknown)} is none of {widths.ratios}")


def _check_ratios(ratios: tuple[int, ...], num_blocks: int) -> None:
    deepest = 2 ** (num_blocks - 1)
    for f in ratios:
        if f < 2 or not math.log2(f).is_integer() or f > deepest:
            raise ValueError(
                f"ratio {f}: with {num_blocks} blocks a ratio is a power of two from 2 to {deepest}"
            )
    if not ratios or len(set(ratios)) != len(ratios):
        raise ValueError(f"ratios {tuple(ratios)}: give at least one, each once")
