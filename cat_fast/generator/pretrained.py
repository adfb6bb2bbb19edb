"""Published checkpoints of the original DiT (facebookresearch/DiT) as arguments and weights of our `DiT`."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.generator.embeddings import position_embedding
from cat_fast.weights.published import Published
from cat_fast.weights.tensor_pickle import load_checkpoint

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Of DiT-S, -B, -L and -XL by their widths, as a state dict does not say; others are given heads of 64."""
WANTED = {
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.mlp.fc1.weight",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
    "pos_embed",
}
SD_VAE_SCALING = 0.18215
SD_VAE_RATIO = 8
"""Of the Stable Diffusion autoencoder, whose latents the published models draw."""


def from_dit_checkpoint(path: Path) -> Published:
    """Weights such as DiT-XL-2-512x512.pt, or a checkpoint of that project's training, whose EMA is taken.

    Published models also predict variances (learn_sigma), the second half of the output channels of each
    latent pixel, which are left out; and hold their fixed positions, which `position_frame` makes anew. Only
    tensors are read from the file; nothing in it is run.

    Raises:
        UserError: no checkpoint, none of a DiT, or positions other than the original's.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint.get("ema", checkpoint) if isinstance(checkpoint, Mapping) else {}
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    depth = len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})
    if not depth or not state.keys() >= WANTED:
        raise UserError(f"{path}: there is no DiT of facebookresearch/DiT in it")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    for kind in ("weight", "bias"):
        outputs = state[f"final_layer.linear.{kind}"].unflatten(0, (patch * patch, -1))
        state[f"final_layer.linear.{kind}"] = outputs[:, :channels].flatten(0, 1)
    heads = HEADS.get(width, max(1, width // 64))
    arguments = {
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "ratios": (SD_VAE_RATIO,),
        "position_frame": _side(path, state.pop("pos_embed")[0]),
        "scaling_factor": SD_VAE_SCALING,
    }
    return Published(arguments, state)


def _side(path: Path, stored: Tensor) -> int:
    """Tokens a side of the grid whose positions (side^2, D) are stored, which must be the ones we compute."""
    side = math.isqrt(len(stored))
    ticks = torch.arange(side)
    ours = position_embedding(torch.cartesian_prod(ticks, ticks), stored.shape[1])
    if side * side != len(stored) or (ours - stored.float()).abs().max() > 1e-4:
        raise UserError(f"{path}: its positions (pos_embed) are not the original's for a square grid")
    return side
