"""A trained model from its folder, or one line that says what is wrong with the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch

from cat_fast.errors import UserError, one_line
from cat_fast.models.device import find_device
from cat_fast.tokenizer import NestedAutoencoderKL

Model = TypeVar("Model", bound=torch.nn.Module)


def load_tokenizer(folder: Path, device: str = "auto") -> NestedAutoencoderKL:
    """The tokenizer in `folder`; see `load_model`."""
    return load_model(NestedAutoencoderKL, "tokenizer", folder, device)


def load_model(kind: type[Model], what: str, folder: Path, device: str = "auto") -> Model:
    """The model that `save_pretrained` wrote to `folder`, in eval mode, on `device`.

    Args:
        kind: its class, one of diffusers' ModelMixin.
        what: a word for it in errors.
        folder: holds config.json and the weights as safetensors.
        device: "auto" (CUDA where there is one, else the CPU) or a torch device such as "cpu" or "cuda:1".

    Raises:
        UserError: the folder or its content cannot be used, or there is no such device.
    """
    target = find_device(device)
    _require(kind, what, folder)
    source: Any = kind
    try:
        # everything is in the folder: never ask a hub
        model, found = source.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except Exception as error:  # a missing, truncated or mismatched file each raise something else
        raise UserError(f"{folder}: the checkpoint cannot be loaded ({one_line(error)[:200]})") from error
    if lacking := found["missing_keys"]:  # diffusers only warns of it
        raise UserError(f"{folder}: the checkpoint cannot be loaded ({min(lacking)} is not in its weights)")
    return model.to(target).eval()


def _require(kind: type[torch.nn.Module], what: str, folder: Path) -> None:
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {problem}; expected the folder of a trained {what}")
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent for path in folder.rglob("config.json") if _is_of(kind, path))
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise UserError(f"{folder}: no config.json in it, so it is not a trained {what}{hint}")
    if not _is_of(kind, folder / "config.json"):
        raise UserError(f"{folder}: its config.json is not that of a {kind.__name__}")


def _is_of(kind: type[torch.nn.Module], config: Path) -> bool:
    try:
        return json.loads(config.read_text()).get("_class_name") == kind.__name__
    except (OSError, ValueError, AttributeError):
        return False
