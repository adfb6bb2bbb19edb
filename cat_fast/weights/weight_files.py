"""Weight files of models with the modes of ordinary files."""

import os
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from cat_fast.data.files import set_default_mode


class WeightFiles:
    """Mixin of diffusers models: weight files get the mode of any new file, not 0600 as by safetensors."""

    @wraps(ModelMixin.save_pretrained)  # pipelines pass on the options in its signature
    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]
        for weights in Path(save_directory).glob("*.safetensors"):
            set_default_mode(weights)
