"""Conversion of checkpoints of the original DiT (facebookresearch/DiT) to arguments and weights of `DiT`."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.generator.diffusion import ORIGINAL_DIT_BETAS
from cat_fast.generator.embeddings import position_embedding
from cat_fast.weights.published import Published
from cat_fast.weights.tensor_pickle import load_checkpoint

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Heads of DiT-S, -B, -L and -XL by width, which the state dict does not contain; others have heads of 64."""
REQUIRED_KEYS = {
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.mlp.fc1.weight",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
    "pos_embed",
}
SD_VAE_SCALING = 0.18215
SD_VAE_RATIO = 8
"""Scaling factor and ratio of the Stable Diffusion autoencoder, which the published models use."""


def from_dit_checkpoint(path: Path) -> Published:
    """Load published weights such as DiT-XL-2-512x512.pt, or the EMA of a training checkpoint.

    Published models also predict variances (learn_sigma), the second half of the output channels of each
    latent pixel; these are dropped. The stored position embedding is checked and replaced by
    `position_frame`. Only tensors are read from the file; no code in it is executed.

    Raises:
        UserError: the file is not a checkpoint, not of a DiT, or its positions differ from the original's.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint.get("ema", checkpoint) if isinstance(checkpoint, Mapping) else {}
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    depth = len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})
    if not depth or not state.keys() >= REQUIRED_KEYS:
        raise UserError(f"{path}: expected a DiT checkpoint of facebookresearch/DiT, found other keys")
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
        "position_frame": _grid_size(path, state.pop("pos_embed")[0]),
        "scaling_factor": SD_VAE_SCALING,
        "beta_schedule": ORIGINAL_DIT_BETAS,
    }
    return Published(arguments, state)


def _grid_size(path: Path, stored: Tensor) -> int:
    """Return the side of the grid whose position embedding (side^2, D) is stored; check it against ours."""
    side = math.isqrt(len(stored))
    ticks = torch.arange(side)
    ours = position_embedding(torch.cartesian_prod(ticks, ticks), stored.shape[1])
    if side * side != len(stored) or (ours - stored.float()).abs().max() > 1e-4:
        raise UserError(
            f"{path}: expected the pos_embed of facebookresearch/DiT for a square grid, got other values"
        )
    return side
