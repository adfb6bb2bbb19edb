"""DINOv2 (Oquab et al., 2024), for FD-DINOv2 (Stein et al., 2023): the class token after the last norm."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cat_fast.evaluation.features.network import FeatureNetwork, normalise

SIDE = 224


class DINOv2(FeatureNetwork):
    """Features of a transformers `Dinov2Model`; ViT-L/14 with 1,024 gives the published figures.

    Images are scaled to 224 px by Pillow's antialiased bicubic filter, as in dgm-eval.

    Args:
        folder: local folder with `config.json` and safetensors.
    """

    name = "dinov2"
    resize = f"antialiased bicubic (Pillow), {SIDE} px"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import Dinov2Model

        kind: Any = Dinov2Model
        self.network = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.sizes = {"pool": self.network.config.hidden_size}
        self.freeze()

    @property
    def is_published(self) -> bool:
        """True for ViT-L/14, the network of the published figures."""
        config = self.network.config
        return (config.hidden_size, config.num_hidden_layers, config.patch_size) == (1024, 24, 14)

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        scaled = [_scale(image) for image in images.cpu()]
        x = normalise(torch.stack(scaled).float().to(images.device))
        return {"pool": self.network(pixel_values=x).pooler_output}


def _scale(image: Tensor) -> Tensor:
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    resized = pixels.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
