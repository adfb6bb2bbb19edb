"""Conversion of checkpoints of the original DiT (facebookresearch/DiT) to arguments and weights of `DiT`."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.generator.diffusion import ORIGINAL_DIT_BETAS
from cat_fast.generator.embeddings import position_embedding
from cat_fast.weights.published import Published
from cat_fast.weights.state_file import read_state

CHECKPOINT_ENTRIES = (
    "class_dropout_prob",
    "num_classes",
    "num_heads",
    "ratios",
    "scaling_factor",
    "shift_factor",
    "tokenizer_fingerprint",
)
"""Config entries that a state dict does not show."""
HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}
"""Heads of DiT-S, -B, -L and -XL by width and depth; the state dict does not contain them."""
CLASSES = (10, 100, 1000)
"""Classes of CIFAR and ImageNet; other tables may or may not have a row for the null class."""
REQUIRED_KEYS = (
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.mlp.fc1.weight",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
    "pos_embed",
)
RATIO_TABLE = "ratio_embedder.embedding_table.weight"
"""The one parameter that the original lacks; at zero it leaves the output unchanged."""
SD_VAE_SCALING = 0.18215
SD_VAE_RATIO = 8
"""Scaling factor and ratio of the Stable Diffusion autoencoder, which the published models use."""
_POSITION_TOLERANCE = 0.01
"""Above the rounding error of bf16; positions of other grids or orders differ by 0.1 and more."""


def from_dit_checkpoint(path: Path, entries: Mapping[str, Any]) -> Published:
    """Load published weights such as DiT-XL-2-512x512.pt, or the EMA of a training checkpoint.

    Published models also predict variances (learn_sigma), the second half of the output channels of each
    latent pixel; these are dropped. The stored position embedding is checked and replaced by
    `position_frame`. Only tensors are read from the file; no code in it is executed.

    Args:
        entries: those of `CHECKPOINT_ENTRIES` that are known.

    Raises:
        UserError: the file is not a checkpoint, not of a DiT, or its positions differ from the original's;
            its heads or classes are neither given nor those of a published model; it has no null class.
    """
    state = read_state(path)
    depth = len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})
    if absent := [name for name in REQUIRED_KEYS if name not in state]:
        raise UserError(
            f"{path}: expected a DiT checkpoint of facebookresearch/DiT, found other keys ({absent[0]} is "
            "missing)"
        )
    if (embedder := state["x_embedder.proj.weight"]).ndim != 4:
        raise UserError(
            f"{path}: x_embedder.proj.weight has shape {tuple(embedder.shape)}, expected (D, c, p, p)"
        )
    width, channels, patch, _ = embedder.shape
    for kind in ("weight", "bias"):
        name = f"final_layer.linear.{kind}"
        state[name] = _without_variances(path, name, state[name], patch * patch, channels)
    ratios = tuple(entries.get("ratios", (SD_VAE_RATIO,)))
    state[RATIO_TABLE] = torch.zeros(len(ratios), width, dtype=embedder.dtype)
    arguments = {
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "depth": depth,
        "num_heads": _heads(path, width, depth, entries.get("num_heads")),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": _classes(
            path, state["y_embedder.embedding_table.weight"].shape[0], entries.get("num_classes")
        ),
        "position_frame": _grid_size(path, state.pop("pos_embed"), width),
        "beta_schedule": ORIGINAL_DIT_BETAS,
    }
    return Published({"scaling_factor": SD_VAE_SCALING, **entries, **arguments, "ratios": ratios}, state)


def _heads(path: Path, width: int, depth: int, given: int | None) -> int:
    if given is not None:
        return given
    if (width, depth) not in HEADS:
        raise UserError(
            f"{path}: a DiT of width {width} and depth {depth} is not a published one, and its weights do "
            "not show the number of attention heads; pass num_heads"
        )
    return HEADS[width, depth]


def _classes(path: Path, rows: int, given: int | None) -> int:
    """Return the number of classes of a label table with `rows` rows, the last of which is the null class."""
    if given is None and rows - 1 in CLASSES:
        return rows - 1
    if given is None and rows not in CLASSES:
        raise UserError(
            f"{path}: its label table has {rows} rows, and its weights do not show whether the last is the "
            f"null class; pass num_classes={rows - 1} if it is (a DiT without a null class is not supported)"
        )
    if given is None or given == rows:
        raise UserError(
            f"{path}: its label table has {rows} rows for {rows} classes, but DiT needs one more for the "
            "null class; only models trained with label dropout are supported"
            + (
                ""
                if given
                else f" (if it has {rows - 1} classes and a null class, pass num_classes={rows - 1})"
            )
        )
    if given != rows - 1:
        raise UserError(
            f"{path}: its label table has {rows} rows, expected {given + 1} for num_classes={given} and the "
            "null class"
        )
    return given


def _without_variances(path: Path, name: str, tensor: Tensor, pixels: int, channels: int) -> Tensor:
    """Return the rows of the final layer that predict noise."""
    if tensor.shape[0] not in (pixels * channels, 2 * pixels * channels):
        raise UserError(
            f"{path}: {name} has {tensor.shape[0]} outputs, expected {pixels * channels}, or twice as many "
            "with variances"
        )
    return tensor.unflatten(0, (pixels, -1))[:, :channels].flatten(0, 1)


def _grid_size(path: Path, stored: Tensor, width: int) -> int:
    """Return the side of the grid whose position embedding (1, side^2, D) is stored; check its values."""
    side = math.isqrt(stored.numel() // width)
    ticks = torch.arange(side)
    expected = position_embedding(torch.cartesian_prod(ticks, ticks), width)[None]
    if stored.shape != expected.shape or not torch.allclose(
        stored.float(), expected.float(), rtol=0, atol=_POSITION_TOLERANCE
    ):
        raise UserError(
            f"{path}: expected the pos_embed of facebookresearch/DiT for a square grid, got other values"
        )
    return side
