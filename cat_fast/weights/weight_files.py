"""Files of saved models: modes of ordinary files, and no paths of this machine."""

import json
import os
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from cat_fast.data.files import set_default_mode

_SOURCE = "_name_or_path"
"""Entry of diffusers' config.json with the folder that a model was loaded from."""


class WeightFiles:
    """Mixin of diffusers models: weight files get the mode of any new file, not 0600 as by safetensors.

    The folder that the model was loaded from, often an absolute path, is not written to config.json.
    """

    @wraps(ModelMixin.save_pretrained)  # pipelines pass on the options in its signature
    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]
        for weights in Path(save_directory).glob("*.safetensors"):
            set_default_mode(weights)
        path = Path(save_directory) / "config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop(_SOURCE, None) is not None:
                text = json.dumps(config, indent=2, sort_keys=True) + "\n"
                path.write_text(text, encoding="utf-8")
