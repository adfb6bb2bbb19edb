"""Published autoencoders as arguments and weights of `NestedAutoencoderKL`: diffusers' and LDM's.

Both are fixed-rate autoencoders with one tap, so that they load into a model with one ratio. The layers are
named as in diffusers; LDM has other names and numbers the decoder's levels the other way.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.weights.published import Published
from cat_fast.weights.tensor_pickle import load_checkpoint

_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


def from_autoencoder_kl(theirs: Any) -> Published:
    """An AutoencoderKL of diffusers, such as Stable Diffusion's.

    Raises:
        UserError: blocks or an activation that `NestedAutoencoderKL` does not have.
    """
    config: Mapping[str, Any] = theirs.config
    channels = tuple(config["block_out_channels"])
    kinds = (*config["down_block_types"], *config["up_block_types"])
    if unknown := set(kinds) - _DOWN.keys() - _UP.keys():
        raise UserError(f"AutoencoderKL with {min(unknown)}: there is no counterpart here")
    attention = [_DOWN[kind] for kind in config["down_block_types"]]
    if attention != [_UP[kind] for kind in reversed(config["up_block_types"])]:
        raise UserError("AutoencoderKL whose encoder and decoder have attention at different levels")
    if config["act_fn"] != "silu" or not config["mid_block_add_attention"]:
        raise UserError("AutoencoderKL without SiLU, or without attention in the mid block")
    latent_channels = config["latent_channels"]
    state = dict(theirs.state_dict())
    for name, width in (("quant_conv", 2 * latent_channels), ("post_quant_conv", latent_channels)):
        if f"{name}.weight" not in state:  # left out: the same as the identity
            state[f"{name}.weight"] = torch.eye(width, dtype=theirs.dtype)[:, :, None, None]
            state[f"{name}.bias"] = torch.zeros(width, dtype=theirs.dtype)
    arguments = {
        "sample_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": config["layers_per_block"],
        "latent_channels": latent_channels,
        "norm_num_groups": config["norm_num_groups"],
        "mid_block_num_layers": 1,
        "mid_block_attention_head_dim": channels[-1],
        "ratios": (2 ** (len(channels) - 1),),
        "attention_levels": tuple(level for level, present in enumerate(attention) if present),
        "scaling_factor": config["scaling_factor"],
        "shift_factor": config["shift_factor"] or 0.0,
    }
    return Published(arguments, state)


def from_ldm_checkpoint(path: Path) -> Published:
    """An autoencoder of LDM (`kl-f8`, `kl-f16`, `kl-f32`), alone or as the first stage of a whole model.

    Only tensors are read from the file; nothing in it is run.

    Raises:
        UserError: no checkpoint, no autoencoder in it, or latents of another width than the encoder's.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else {}
    tensors = {
        name.removeprefix("first_stage_model."): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    widths = [
        tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0]
        for level in range(_count(tensors, r"encoder\.down\.(\d+)\."))
    ]
    if not widths or "quant_conv.weight" not in tensors:
        raise UserError(f"{path}: there is no KL autoencoder of LDM in it")
    latent_channels = tensors["decoder.conv_in.weight"].shape[1]
    if tensors["quant_conv.weight"].shape[0] != 2 * latent_channels:
        raise UserError(f"{path}: its embedding has another width than its latents, {latent_channels}")
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
        "scaling_factor": float(tensors.get("scale_factor", 1.0)),
    }
    renamed = {
        diffusers_name(name, len(widths)): value.squeeze((2, 3)) if _is_projection(name) else value
        for name, value in tensors.items()
        if re.match(r"(encoder|decoder|quant_conv|post_quant_conv)\.", name)
    }
    return Published(arguments, renamed)


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
    """LDM's name of a parameter as diffusers has it; LDM's decoder counts its levels from the image."""
    name = re.sub(r"\bup\.(\d+)\.", lambda match: f"up_blocks.{levels - 1 - int(match[1])}.", name)
    for theirs, ours in _RENAMED:
        name = re.sub(theirs, ours, name)
    return name


def _is_projection(name: str) -> bool:
    """Whether it is a weight of attention, a 1 x 1 convolution there and a linear layer here."""
    return re.search(r"\battn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", name) is not None


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many values the number in `pattern` takes among the names."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})
