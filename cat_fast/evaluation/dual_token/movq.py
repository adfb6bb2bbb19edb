"""MoVQ as a baseline: diffusers' `VQModel` with spatially conditioned normalisation, such as Kandinsky 2's.

An image is resized so that MoVQ has as many tokens as the guide. Its reconstruction then has the guide's size
if both have the same compression.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor

from cat_fast.dual_token.grid import Grid
from cat_fast.dual_token.resize import resize
from cat_fast.errors import UserError, first_line
from cat_fast.models.device import find_device
from cat_fast.weights.fingerprint import fingerprint


class MoVQ:
    """A trained MoVQ. Weights are read from safetensors files only, which hold no code.

    Args:
        folder: folder of a diffusers `VQModel` with `norm_type: spatial`.

    Raises:
        UserError: the folder is missing, damaged, or of another class.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        _check_config(folder)
        try:
            model: Any = VQModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{folder}: cannot be loaded ({first_line(error)})") from error
        self.model = model.to(find_device(device)).eval().requires_grad_(False)

    @property
    def stride(self) -> int:
        """Pixels per token and side."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    @property
    def bits(self) -> float:
        """Bits per token."""
        return math.log2(self.model.config.num_vq_embeddings)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, grid: Grid) -> Tensor:
        """Return the reconstruction (3, h * stride, w * stride) of an image (3, H, W) by h x w tokens."""
        size = grid[0] * self.stride, grid[1] * self.stride
        x = resize(image[None].to(self.model.device, self.model.dtype), size)
        return self.model.decode(self.model.encode(x).latents).sample[0].float().clamp(-1, 1)

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify the weights and settings."""
        settings = {name: value for name, value in self.model.config.items() if not name.startswith("_")}
        return fingerprint(settings, self.model.state_dict())


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        problem = "config.json is missing" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {problem}; expected the folder of a diffusers VQModel, such as a MoVQ")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, norm = config["_class_name"], config.get("norm_type", "group")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the config of a model ({first_line(error)})") from error
    if kind != "VQModel":
        raise UserError(f"{folder}: expected a VQModel, got a {kind}")
    if norm != "spatial":
        raise UserError(f"{folder}: expected a MoVQ, with norm_type spatial; its norm_type is {norm}")
