"""Loading a trained model from its folder, with one-line errors."""

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
    """Load the tokenizer in `folder`; see `load_model`."""
    return load_model(NestedAutoencoderKL, "tokenizer", folder, device)


def load_model(kind: type[Model], what: str, folder: Path, device: str = "auto") -> Model:
    """Load a model written by `save_pretrained`, in eval mode, on `device`.

    Args:
        kind: class of the model, a subclass of diffusers' ModelMixin.
        what: name of the model in errors, such as "tokenizer".
        folder: folder with config.json and the weights as safetensors.
        device: "auto" (CUDA if available, else the CPU) or a torch device such as "cpu" or "cuda:1".

    Raises:
        UserError: the folder or its content cannot be used, or the device is not available.
    """
    target = find_device(device)
    _require(kind, what, folder)
    source: Any = kind
    try:
        # The folder is complete, so the hub is never contacted.
        model, found = source.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except Exception as error:  # missing, truncated and mismatched files raise different exceptions
        raise UserError(f"{folder}: the checkpoint cannot be loaded ({one_line(error)[:200]})") from error
    if missing := found["missing_keys"]:  # diffusers only warns
        raise UserError(
            f"{folder}: the checkpoint cannot be loaded ({min(missing)} is missing from its weights)"
        )
    return model.to(target).eval()


def _require(kind: type[torch.nn.Module], what: str, folder: Path) -> None:
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {problem}; expected the folder of a trained {what}")
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent for path in folder.rglob("config.json") if _is_of(kind, path))
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise UserError(f"{folder}: config.json is missing, so this is not a trained {what}{hint}")
    if not _is_of(kind, folder / "config.json"):
        raise UserError(f"{folder}: expected the config.json of a {kind.__name__}, got another")


def _is_of(kind: type[torch.nn.Module], config: Path) -> bool:
    try:
        return json.loads(config.read_text()).get("_class_name") == kind.__name__
    except (OSError, ValueError, AttributeError):
        return False
