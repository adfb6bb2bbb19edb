"""Conversion of diffusers' and LDM's autoencoders to arguments and weights of `NestedAutoencoderKL`.

Both are fixed-rate autoencoders with one tap and load into a model with one ratio. Our layers have diffusers'
names. LDM uses other names and numbers the decoder's levels in reverse order.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.weights.published import Published
from cat_fast.weights.state_file import read_state

_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
_PART = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\.")
_FIRST_STAGE = "first_stage_model."
_SCALE = "scale_factor"


def from_autoencoder_kl(theirs: Any, name: str) -> Published:
    """Convert an AutoencoderKL of diffusers, such as Stable Diffusion's.

    Args:
        name: its folder or hub name, for error messages.

    Raises:
        UserError: blocks or an activation that `NestedAutoencoderKL` does not have, or a single level.
    """
    config: Mapping[str, Any] = theirs.config
    channels = tuple(config["block_out_channels"])
    kinds = (*config["down_block_types"], *config["up_block_types"])
    if unknown := set(kinds) - _DOWN.keys() - _UP.keys():
        raise UserError(f"{name}: block type {min(unknown)} is not supported")
    attention = [_DOWN[kind] for kind in config["down_block_types"]]
    if attention != [_UP[kind] for kind in reversed(config["up_block_types"])]:
        raise UserError(f"{name}: attention at different levels of encoder and decoder is not supported")
    if config["act_fn"] != "silu":
        raise UserError(f"{name}: act_fn {config['act_fn']!r} is not supported, expected 'silu'")
    if not config["mid_block_add_attention"]:
        raise UserError(f"{name}: a mid block without attention is not supported")
    _check_levels(name, channels)
    arguments = {
        "sample_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": config["layers_per_block"],
        "latent_channels": config["latent_channels"],
        "norm_num_groups": config["norm_num_groups"],
        "mid_block_num_layers": 1,
        "mid_block_attention_head_dim": channels[-1],
        "ratios": (2 ** (len(channels) - 1),),
        "attention_levels": tuple(level for level, present in enumerate(attention) if present),
        "scaling_factor": config["scaling_factor"],
        "shift_factor": config["shift_factor"] or 0.0,
        "latents_mean": config["latents_mean"],
        "latents_std": config["latents_std"],
        "force_upcast": config["force_upcast"],
    }
    return Published(arguments, _with_quant_convs(theirs.state_dict(), config["latent_channels"]))


def _check_levels(name: str, channels: tuple[int, ...]) -> None:
    if len(channels) < 2:
        raise UserError(
            f"{name}: an autoencoder with one level, of {channels[0]} channels, does not downsample; "
            "expected at least two levels"
        )


def from_ldm_checkpoint(source: Path | Mapping[str, Any]) -> Published:
    """Convert an LDM autoencoder (`kl-f8`, `kl-f16`, `kl-f32`), alone or as the first stage of a whole model.

    Only tensors are read from the file; code in it is never run.

    Args:
        source: a `.safetensors` file, a file of torch.save, or the content of one.

    Raises:
        UserError: an unreadable file, one without such an autoencoder, or an autoencoder of another kind.
    """
    name = str(source) if isinstance(source, Path) else "state dict"
    tensors = _read_tensors(source)
    if any(key.startswith("encoder.down_blocks.") for key in tensors):
        raise UserError(
            f"{name}: its layers are named as in diffusers; load its folder, which has a config.json, with "
            "from_pretrained"
        )
    widths: list[int] = []
    while (first := tensors.get(f"encoder.down.{len(widths)}.block.0.conv1.weight")) is not None:
        widths.append(first.shape[0])
    if missing := {"encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out"} - {
        key.removesuffix(".weight") for key in tensors
    }:
        raise UserError(f"{name}: no KL autoencoder in LDM's layout found ({min(missing)} is missing)")
    if not widths:
        raise UserError(f"{name}: no KL autoencoder in LDM's layout found (it has no encoder levels)")
    _check_levels(name, tuple(widths))
    _check_attention(name, tensors)
    latent_channels = tensors["decoder.conv_in.weight"].shape[1]
    moments = tensors.get("quant_conv.weight", tensors["encoder.conv_out.weight"]).shape[0]
    if moments != 2 * latent_channels:
        raise UserError(
            f"{name}: expected 2 x {latent_channels} moments for {latent_channels} latent channels, got "
            f"{moments}; only KL autoencoders are supported"
        )
    arguments = {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": latent_channels,
        "norm_num_groups": 32,
        "mid_block_num_layers": 1,
        "mid_block_attention_head_dim": widths[-1],
        "ratios": (2 ** (len(widths) - 1),),
        "attention_levels": tuple(
            level for level in range(len(widths)) if f"encoder.down.{level}.attn.0.q.weight" in tensors
        ),
        "scaling_factor": float(tensors.get(_SCALE, 1.0)),
    }
    renamed = {
        diffusers_name(key, len(widths)): value.flatten(1) if _is_projection(key) else value
        for key, value in tensors.items()
        if _PART.match(key)
    }
    return Published(arguments, _with_quant_convs(renamed, latent_channels))


_RENAMED = (
    (r"\bdown\.(\d+)\.", r"down_blocks.\1."),
    (r"\bblock\.(\d+)\.", r"resnets.\1."),
    (r"\battn\.(\d+)\.", r"attentions.\1."),
    (r"\bdownsample\.", "downsamplers.0."),
    (r"\bupsample\.", "upsamplers.0."),
    (r"\bmid\.block_1\.", "mid_block.resnets.0."),
    (r"\bmid\.block_2\.", "mid_block.resnets.1."),
    (r"\bmid\.attn_1\.", "mid_block.attentions.0."),
    (r"\bnin_shortcut\.", "conv_shortcut."),
    (r"\bnorm_out\.", "conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def diffusers_name(name: str, levels: int) -> str:
    """Return diffusers' name of an LDM parameter; LDM counts decoder levels from the image side."""
    name = re.sub(r"\bup\.(\d+)\.", lambda match: f"up_blocks.{levels - 1 - int(match[1])}.", name)
    for theirs, ours in _RENAMED:
        name = re.sub(theirs, ours, name)
    return name


def _check_attention(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that the attention is LDM's `attn_type: vanilla`, the only one with weights q, k and v."""
    if any(".to_qkv." in key for key in tensors):
        raise UserError(f"{name}: linear attention is not supported; expected LDM's attn_type: vanilla")
    for half in ("encoder", "decoder"):
        if f"{half}.mid.attn_1.q.weight" not in tensors:
            others = any(key.startswith(f"{half}.mid.attn_1.") for key in tensors)
            kind = (
                "this attention is not supported"
                if others
                else "a mid block without attention is not supported"
            )
            raise UserError(
                f"{name}: {kind} ({half}.mid.attn_1.q.weight is missing); expected LDM's attn_type: vanilla"
            )


def _read_tensors(source: Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the autoencoder under their LDM names, and the scale factor if there is one."""
    return {_ldm_name(key): value for key, value in read_state(source, _is_wanted).items()}


def _ldm_name(key: str) -> str:
    return key.removeprefix(_FIRST_STAGE)


def _is_wanted(key: str) -> bool:
    return key == _SCALE or _PART.match(_ldm_name(key)) is not None


def _with_quant_convs(state: Mapping[str, Tensor], latent_channels: int) -> dict[str, Tensor]:
    """Return the state with the identity for `quant_conv` and `post_quant_conv` where it lacks them."""
    complete = dict(state)
    dtype = next(iter(complete.values())).dtype
    for name, width in (("quant_conv", 2 * latent_channels), ("post_quant_conv", latent_channels)):
        if f"{name}.weight" not in complete:
            complete[f"{name}.weight"] = torch.eye(width, dtype=dtype)[:, :, None, None]
            complete[f"{name}.bias"] = torch.zeros(width, dtype=dtype)
    return complete


def _is_projection(name: str) -> bool:
    """Return True for attention weights: 1 x 1 convolutions in LDM, linear layers here."""
    return re.search(r"\battn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", name) is not None


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Return the number of different values of the number in `pattern` among the names."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})
