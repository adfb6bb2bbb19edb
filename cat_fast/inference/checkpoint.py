"""A trained tokenizer from a folder, or one line that says what is wrong with the folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from cat_fast.errors import UserError
from cat_fast.tokenizer import NestedAutoencoderKL


def load_tokenizer(folder: Path, device: str = "auto") -> NestedAutoencoderKL:
    """The tokenizer that `save_pretrained` wrote to `folder`, in eval mode, on `device`.

    Args:
        folder: holds config.json and the weights as safetensors.
        device: "auto" (CUDA where there is one, else the CPU) or a torch device such as "cpu" or "cuda:1".

    Raises:
        UserError: the folder or its content cannot be used, or there is no such device.
    """
    target = find_device(device)
    _require_tokenizer(folder)
    try:
        # Everything is in the folder: never ask a hub. Without accelerate the low-memory path only warns.
        tokenizer = NestedAutoencoderKL.from_pretrained(
            str(folder), local_files_only=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # a missing, truncated or mismatched file each raise something else
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the checkpoint cannot be loaded ({reason})") from error
    return tokenizer.to(target).eval()


def _require_tokenizer(folder: Path) -> None:
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {problem}; expected the folder of a trained tokenizer (--checkpoint)")
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent for path in folder.rglob("config.json") if _is_tokenizer(path))
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise UserError(f"{folder}: no config.json in it, so it is not a trained tokenizer{hint}")
    if not _is_tokenizer(folder / "config.json"):
        raise UserError(f"{folder}: its config.json is not that of a NestedAutoencoderKL")


def _is_tokenizer(config: Path) -> bool:
    try:
        return json.loads(config.read_text()).get("_class_name") == NestedAutoencoderKL.__name__
    except (OSError, ValueError, AttributeError):
        return False


def find_device(name: str) -> torch.device:
    """CUDA where there is one for "auto", else the device of that name; UserError where it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); try --device cpu") from error
    return device
