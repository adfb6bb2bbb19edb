"""Nested VAE: one set of weights that encodes and decodes images at several downsampling ratios.

Six blocks downsample five times. The feature map after k halvings belongs to ratio f = 2^k: the ratio decides
where an image leaves the encoder ("nested VAE" in the paper). A channel-matching residual block widens taps
above the deepest one to the width of the shared mid block. The decoder mirrors this, so outputs have the size
of the inputs.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # pipelines look it up here
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from cat_fast.errors import UserError
from cat_fast.integers import as_integer, to_integer, to_integers
from cat_fast.tokenizer.initialisation import pyramid_initialise
from cat_fast.tokenizer.networks import NestedDecoder, NestedEncoder, Widths
from cat_fast.tokenizer.pretrained import from_autoencoder_kl, from_ldm_checkpoint
from cat_fast.tokenizer.tiling import check_tiles, tiled
from cat_fast.tokenizer.transform_initialisation import transform_initialise
from cat_fast.weights.checked_model import (
    FILE_OPTIONS,
    HANDLED,
    LOADING_OPTIONS,
    CheckedModel,
    check_options,
    init_arguments,
    pop_dtype,
    without_warnings,
)
from cat_fast.weights.fingerprint import fingerprint
from cat_fast.weights.published import Published, check_keys
from cat_fast.weights.shipped import TOKENIZER, shipped_folder
from cat_fast.weights.state_file import is_state_file

_SINGLE_FILE_CONFIG = (
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
)
_NOT_IN_FINGERPRINT = ("default_ratio", "force_upcast", "latents_mean", "latents_std", "latents_of")
_PREFERRED_RATIO = 16
_INITIALISATIONS = {"pyramid": pyramid_initialise, "transform": transform_initialise}


class NestedAutoencoderKL(CheckedModel):
    """KL autoencoder that compresses each side by 8, 16 or 32 with one set of weights.

    It has the interface of diffusers' `AutoencoderKL`, plus a `ratio` argument. A model with one ratio is a
    drop-in replacement for `AutoencoderKL` in diffusers' pipelines.

    Args:
        sample_size: side in pixels of the images the model is meant for (informative).
        block_out_channels: width per level; n blocks downsample n - 1 times.
        layers_per_block: residual blocks per encoder block; decoder blocks have one more.
        latent_channels: c, the same at every ratio.
        norm_num_groups: groups of every GroupNorm.
        mid_block_num_layers: attention layers of each mid block.
        mid_block_attention_head_dim: 1 is the paper's literal reading (as many heads as channels); the width
            of the mid block gives one head.
        ratios: downsampling ratios of the model; with a single ratio, blocks it does not need are not built.
        default_ratio: ratio of `encode`, `decode` and `forward` if they are called without one. None selects
            16 if the model has it, else the smallest ratio.
        encoder_matching: ratios with a channel-matching residual block between features and mid block.
            None selects all ratios above the full depth. Required where the widths differ.
        decoder_matching: likewise after the decoder's mid block.
        attention_levels: levels (k halvings) whose blocks have attention after each residual block, as in the
            f16 and f32 autoencoders of LDM.
        scaling_factor, shift_factor: a diffusion model sees (latent - shift_factor) * scaling_factor.
        latents_mean, latents_std: per-channel statistics of the latents, for pipelines that normalise with
            them; not applied by the autoencoder, as in diffusers.
        force_upcast: pipelines run the autoencoder in float32 even if they run in float16, as in diffusers.
        initialisation: `default` is torch's, as in diffusers; short runs need `pyramid`, which makes the
            untrained model a low-pass autoencoder (`cat_fast.tokenizer.initialisation`), or `transform`,
            which makes it a block transform coder (`cat_fast.tokenizer.transform_initialisation`).
        initial_logvar: log-variance of the posterior before training. At 0 the noise drowns the untrained
            mean, which costs short runs their first hundred steps; -6 is a standard deviation of 0.05.
        latents_of: fingerprint of the tokenizer from which only the encoder or the decoder was trained
            further; each decodes latents of the other.

    Raises:
        ValueError: ratios that are not powers of two within the depth, widths not divisible by the groups, a
            required channel-matching block left out, or a default ratio that is not one of the ratios.
    """

    _converted_classes = (AutoencoderKL,)
    _supports_gradient_checkpointing = True
    # Encoder and decoder stay on one device each: they call parts of blocks without forward hooks.
    _no_split_modules = ["NestedEncoder", "NestedDecoder"]  # type: ignore[assignment]  # noqa: RUF012
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]  # noqa: RUF012

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
        default_ratio: int | None = None,
        encoder_matching: tuple[int, ...] | None = None,
        decoder_matching: tuple[int, ...] | None = None,
        attention_levels: tuple[int, ...] = (),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        initialisation: str = "default",
        initial_logvar: float = 0.0,
        latents_of: str | None = None,
    ) -> None:
        super().__init__()
        self._kept_fingerprint: str | None = None
        ratios = to_integers("ratios", ratios)
        default_ratio = None if default_ratio is None else to_integer("default_ratio", default_ratio)
        encoder_matching, decoder_matching = (
            None if given is None else to_integers(name, given)
            for name, given in (
                ("encoder_matching", encoder_matching),
                ("decoder_matching", decoder_matching),
            )
        )
        self.register_integers(
            ratios=ratios,
            default_ratio=default_ratio,
            encoder_matching=encoder_matching,
            decoder_matching=decoder_matching,
        )
        _check_ratios(ratios, len(block_out_channels))
        if initialisation not in ("default", *_INITIALISATIONS):
            raise ValueError(
                f"initialisation: expected default, {' or '.join(_INITIALISATIONS)}, got {initialisation!r}"
            )
        for width in block_out_channels:
            if width % norm_num_groups:
                raise ValueError(
                    f"block_out_channels {width} is not divisible by norm_num_groups {norm_num_groups}"
                )
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            if values is not None and len(values) != latent_channels:
                raise ValueError(
                    f"{name}: expected one value per latent channel, {latent_channels}, got {len(values)}"
                )
        self.ratios = tuple(sorted(ratios))
        self.default_ratio = _choose_default_ratio(default_ratio, self.ratios)
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
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = max(512, 4 * max(self.ratios))
        self.tile_overlap_factor = 0.25
        if initialisation in _INITIALISATIONS:
            initialise = _INITIALISATIONS[initialisation]
            initialise(self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
        if initial_logvar and self.quant_conv.bias is not None:
            self.quant_conv.bias.data[latent_channels:] += initial_logvar

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **options: Any
    ) -> Self:
        """Load a model in evaluation mode from a folder or a name on the Hugging Face hub.

        Folders of diffusers' `AutoencoderKL`, such as Stable Diffusion's `sd-vae-ft-mse`, load as models with
        one ratio. `nano` is the tokenizer that ships with the package, and `nano-fixed-16x` its twin of one
        ratio, unless there is a local folder of this name.

        Args:
            options: those of diffusers' `from_pretrained`, and config entries to override.

        Raises:
            UserError: a single file, which `from_single_file` reads; an unknown option; a folder of another
                class; weights that do not match the model's, or layers without a counterpart here; a shipped
                model that this installation lacks.
        """
        name = str(pretrained_model_name_or_path)
        name = str(shipped_folder(name, TOKENIZER) or name)
        if is_state_file(name):
            raise UserError(f"{name}: expected a folder; load a single file with from_single_file")
        if cls.read_config(name, options)["_class_name"] != AutoencoderKL.__name__:
            return super().from_pretrained(name, **options)
        known = init_arguments(AutoencoderKL) | set(LOADING_OPTIONS)
        check_options("from_pretrained of an AutoencoderKL", options, known)
        with_info = options.pop("output_loading_info", False)
        with without_warnings(*HANDLED):
            theirs, info = AutoencoderKL.from_pretrained(name, output_loading_info=True, **options)
        check_keys(name, missing=info["missing_keys"], unexpected=info["unexpected_keys"])
        if any(tensor.is_meta for tensor in theirs.state_dict().values()):
            raise UserError(
                f"{name}: an AutoencoderKL cannot be offloaded while it is converted; save it with "
                "save_pretrained of NestedAutoencoderKL and load that folder with device_map"
            )
        model = from_autoencoder_kl(theirs, name).build(cls, name).to(theirs.device)
        loaded: Any = (model, info) if with_info else model
        return loaded

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        **options: Any,
    ) -> Self:
        """Load the autoencoder of an LDM or Stable Diffusion checkpoint, in evaluation mode.

        The file may hold an autoencoder or a complete model with one as its first stage. Only tensors are
        read, code in a pickle is never run, and nothing is downloaded. The model has one ratio.

        Args:
            pretrained_model_link_or_path_or_dict: path of a `.ckpt` or `.safetensors` file, or a state dict.
            options: `torch_dtype`, by default that of the file; options of downloads, which have no effect;
                and config entries that the file does not hold: `sample_size`, `scaling_factor`,
                `shift_factor`, `latents_mean`, `latents_std`, `force_upcast`. Stable Diffusion's files lack
                the scaling factor, which is 1 by default and 0.18215 for Stable Diffusion 1 and 2.

        Raises:
            UserError: a missing or unreadable file, a file without such an autoencoder, an autoencoder of
                another kind, or an unknown option.
        """
        check_options("from_single_file", options, {*_SINGLE_FILE_CONFIG, *FILE_OPTIONS})
        dtype = pop_dtype(options)
        config = {key: value for key, value in options.items() if key in _SINGLE_FILE_CONFIG}
        source = pretrained_model_link_or_path_or_dict
        if not isinstance(source, Mapping):
            if "://" in str(source):
                raise UserError(f"{source}: links are not supported; download the file and pass its path")
            if Path(source).is_dir():
                raise UserError(f"{source}: expected a file; load a folder with from_pretrained")
            source = Path(source)
        published = from_ldm_checkpoint(source)
        name = "state dict" if isinstance(source, Mapping) else str(source)
        return Published(published.arguments | config, published.state).build(cls, name, dtype)

    @apply_forward_hook
    def encode(
        self, x: Tensor, ratio: int | None = None, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode images at one ratio; only the layers up to that ratio's tap run.

        The ratio is not chosen by the complexity of the images: without one, all are encoded at
        `default_ratio`. `cat_fast.complexity` chooses ratios, and `encode_mixed` takes one per image.

        Args:
            x: images (B, 3, H, W) in [-1, 1]; H and W are multiples of the ratio.
            ratio: one of `ratios`; None for `default_ratio`.
            return_dict: return an `AutoencoderKLOutput` instead of a tuple.

        Returns:
            The posterior of latents (B, c, H/f, W/f), as `.latent_dist` or as the tuple's only element.

        Raises:
            TypeError: an input other than a tensor, or a ratio other than an integer.
            ValueError: another shape, a ratio the model does not have, or sides that are not multiples of it.
        """
        ratio = self._check_ratio(ratio)
        self._check_input(x, self.config["in_channels"], "encode")
        posterior = DiagonalGaussianDistribution(self._moments(x, ratio))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        ratio: int | None = None,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents of one ratio.

        Latents do not carry their ratio: without one, all are taken to be of `default_ratio`.

        Args:
            z: latents (B, c, h, w).
            ratio: the ratio they were encoded at; None for `default_ratio`.
            return_dict: return a `DecoderOutput` instead of a tuple.
            generator: unused; accepted because diffusers' pipelines pass it.

        Returns:
            Images (B, 3, h * f, w * f), about in [-1, 1], as `.sample` or as the tuple's only element.

        Raises:
            TypeError: an input other than a tensor, or a ratio other than an integer.
            ValueError: another shape, or a ratio the model does not have.
        """
        ratio = self._check_ratio(ratio)
        self._check_input(z, self.config["latent_channels"], "decode")
        sample = self._images(z, ratio)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode_mixed(
        self, images: Tensor | Sequence[Tensor], ratios: Sequence[int]
    ) -> list[DiagonalGaussianDistribution]:
        """Encode each image at its own ratio, with one call per ratio and image size.

        Args:
            images: (B, 3, H, W), or a list of (3, H, W) of any sizes, in [-1, 1].
            ratios: one of `ratios` per image.

        Returns:
            One posterior of a latent (1, c, H/f, W/f) per image, in order.

        Raises:
            ValueError: a number of ratios other than that of images, or anything that `encode` refuses.
        """
        moments = _by_ratio_and_shape(lambda x, f: self.encode(x, f).latent_dist.parameters, images, ratios)
        return [DiagonalGaussianDistribution(each[None]) for each in moments]

    def decode_mixed(self, latents: Sequence[Tensor], ratios: Sequence[int]) -> list[Tensor]:
        """Decode each latent (c, h, w) at its own ratio, with one call per ratio and latent size.

        Returns:
            Images (3, h * f, w * f), in order.

        Raises:
            ValueError: a number of ratios other than that of latents, or anything that `decode` refuses.
        """
        return _by_ratio_and_shape(lambda z, f: self.decode(z, f).sample, latents, ratios)

    def forward(
        self,
        sample: Tensor,
        ratio: int | None = None,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode images at one ratio.

        Args:
            sample: images (B, 3, H, W) in [-1, 1].
            ratio: one of `ratios`; None for `default_ratio`, whatever the complexity of the images.
            sample_posterior: decode a draw from the posterior instead of its mode.
            return_dict: return a `DecoderOutput` instead of a tuple.
            generator: random numbers for `sample_posterior`.

        Returns:
            Reconstructions (B, 3, H, W), as `.sample` or as the tuple's only element.
        """
        posterior = self.encode(sample, ratio).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, ratio, return_dict=return_dict)

    def reconstruct(
        self, x: Tensor, ratio: int, *, sample_posterior: bool = True, ghost_pass: bool = False
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Return reconstructions (B, 3, H, W) and their posterior, for a training loss.

        Args:
            ghost_pass: give every parameter of every ratio a gradient, zero for the unused ones (`ghost`).
        """
        ratio = self._check_ratio(ratio)
        posterior = DiagonalGaussianDistribution(self._moments(x, ratio, ghost_pass))
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self._images(z, ratio, ghost_pass), posterior

    def freeze_all_but(self, half: str) -> None:
        """Freeze the half that is not named, `encoder` or `decoder`, so that latents still fit the other."""
        for name in {"encoder": ("post_quant_conv", "decoder"), "decoder": ("encoder", "quant_conv")}[half]:
            getattr(self, name).requires_grad_(False)

    def enable_tiling(
        self, tile_sample_min_size: int | None = None, tile_overlap_factor: float | None = None
    ) -> None:
        """Encode and decode large images in overlapping tiles that are blended.

        Memory then depends on the tile instead of the image. Normalisation and attention see one tile at a
        time, so results differ slightly from those without tiling.

        Args:
            tile_sample_min_size: side of a tile in pixels; smaller images are not tiled. None keeps the
                current one, initially 512 or, if larger, four times the largest ratio.
            tile_overlap_factor: overlap of neighbouring tiles, as a part of their side. None keeps the
                current one, initially 0.25.

        Raises:
            ValueError: sizes or overlaps that are not multiples of every ratio, or a factor over 0.5.
        """
        size = self.tile_sample_min_size if tile_sample_min_size is None else tile_sample_min_size
        factor = self.tile_overlap_factor if tile_overlap_factor is None else tile_overlap_factor
        check_tiles(size, factor, self.ratios)
        self.tile_sample_min_size, self.tile_overlap_factor = size, factor
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Encode and decode images in one piece."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Encode and decode one image of a batch at a time: less memory, the same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode batches in one call."""
        self.use_slicing = False

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify the weights and the config.

        Config entries that do not change latents are left out. After `keep_fingerprint`, it is the one of
        that time.
        """
        if self._kept_fingerprint is not None:
            return self._kept_fingerprint
        settings = {
            key: value
            for key, value in self.config.items()
            if not key.startswith("_") and key not in _NOT_IN_FINGERPRINT
        }
        return fingerprint(settings, self.state_dict())

    def latents_fingerprint(self) -> str:
        """Return the fingerprint that is stored with latents: `latents_of`, or its own."""
        return self.config["latents_of"] or self.fingerprint()

    def keep_fingerprint(self) -> None:
        """Compute the fingerprint now, before a cast to another dtype: weights do not change afterwards."""
        self._kept_fingerprint = self.fingerprint()

    def _moments(self, x_BCHW: Tensor, ratio: int, ghost_pass: bool = False) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        if height % ratio or width % ratio:
            raise ValueError(
                f"image of {height} x {width} px: both sides must be multiples of the ratio {ratio}"
            )

        def encode(x: Tensor) -> Tensor:
            return self.quant_conv(self.encoder(x, ratio, ghost_pass))

        return self._sliced_and_tiled(encode, x_BCHW, ratio, cell_in=ratio, cell_out=1)

    def _images(self, z_BCHW: Tensor, ratio: int, ghost_pass: bool = False) -> Tensor:
        def decode(z: Tensor) -> Tensor:
            return self.decoder(self.post_quant_conv(z), ratio, ghost_pass)

        return self._sliced_and_tiled(decode, z_BCHW, ratio, cell_in=1, cell_out=ratio)

    def _sliced_and_tiled(
        self, function: Callable[[Tensor], Tensor], x_BCHW: Tensor, ratio: int, *, cell_in: int, cell_out: int
    ) -> Tensor:
        """Apply `function` to x, in slices and tiles where these are enabled."""
        if self.use_slicing and x_BCHW.shape[0] > 1:
            slices = [
                self._sliced_and_tiled(function, x, ratio, cell_in=cell_in, cell_out=cell_out)
                for x in x_BCHW.split(1)
            ]
            return torch.cat(slices)
        size = self.tile_sample_min_size
        if not self.use_tiling or max(x_BCHW.shape[-2:]) // cell_in * ratio <= size:
            return function(x_BCHW)
        return tiled(
            function,
            x_BCHW,
            cell_in=cell_in,
            cell_out=cell_out,
            size=size // ratio,
            overlap=round(size * self.tile_overlap_factor) // ratio,
        )

    def _check_ratio(self, ratio: int | None) -> int:
        if ratio is None:
            return self.default_ratio
        integer = as_integer(ratio)
        if integer is None:
            raise TypeError(
                f"expected an integer ratio, got {ratio!r}; pass return_dict by keyword, and use "
                "encode_mixed or decode_mixed for one ratio per image"
            )
        if integer not in self.ratios:
            available = ", ".join(map(str, self.ratios))
            raise ValueError(f"ratio {integer} is not available in this model; expected one of {available}")
        return integer

    def _check_input(self, x: Any, channels: int, method: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{method}: expected a tensor (B, {channels}, H, W), got {type(x).__name__}; "
                f"use {method}_mixed for a list"
            )
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"{method}: expected shape (B, {channels}, H, W), got {tuple(x.shape)}")


def _by_ratio_and_shape(
    function: Callable[[Tensor, int], Tensor], items: Tensor | Sequence[Tensor], ratios: Sequence[int]
) -> list[Tensor]:
    """Apply `function` to each item at its ratio, batching those of one ratio and shape; results in order."""
    if as_integer(ratios) is not None and not getattr(ratios, "ndim", 0):
        raise TypeError(f"expected one ratio per image or latent, got {ratios} for all; use encode or decode")
    ratios = to_integers("ratios", ratios)
    if len(items) != len(ratios):
        raise ValueError(f"expected one ratio per image or latent, got {len(ratios)} for {len(items)}")
    groups: dict[tuple[int, torch.Size], list[int]] = {}
    for i, (item, ratio) in enumerate(zip(items, ratios, strict=True)):
        groups.setdefault((ratio, item.shape), []).append(i)
    results: dict[int, Tensor] = {}
    for (ratio, _), members in groups.items():
        results |= zip(members, function(torch.stack([items[i] for i in members]), ratio), strict=True)
    return [results[i] for i in range(len(ratios))]


def _choose_default_ratio(given: int | None, ratios: tuple[int, ...]) -> int:
    if given is None:
        return _PREFERRED_RATIO if _PREFERRED_RATIO in ratios else ratios[0]
    if given not in ratios:
        raise ValueError(f"default_ratio: expected one of {', '.join(map(str, ratios))}, got {given}")
    return given


def _matching(given: Sequence[int] | None, ratios: tuple[int, ...], num_blocks: int) -> tuple[int, ...]:
    """Return the ratios with a channel-matching block, in the encoder or the decoder."""
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
            raise ValueError(f"{side}_matching: expected ratios among {widths.ratios}, got {min(unknown)}")


def _check_ratios(ratios: tuple[int, ...], num_blocks: int) -> None:
    deepest = 2 ** (num_blocks - 1)
    for f in ratios:
        if f < 2 or not math.log2(f).is_integer() or f > deepest:
            raise ValueError(
                f"ratios: expected powers of two from 2 to {deepest} with {num_blocks} blocks, got {f}"
            )
    if not ratios or len(set(ratios)) != len(ratios):
        raise ValueError(f"ratios: expected at least one, without repetition, got {tuple(ratios)}")
