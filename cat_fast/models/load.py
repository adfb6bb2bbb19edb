"""Loading a trained model from its folder or file, with one-line errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from cat_fast.errors import UserError, one_line
from cat_fast.models.device import find_device
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.weights.shipped import TOKENIZER, shipped_folder
from cat_fast.weights.state_file import SUFFIXES, is_state_file

Model = TypeVar("Model", bound=torch.nn.Module)


def load_tokenizer(
    source: Path, device: str = "auto", dtype: torch.dtype | None = None
) -> NestedAutoencoderKL:
    """Load a tokenizer from everything that its class takes; see `load_model`.

    Args:
        source: a folder of `NestedAutoencoderKL` or of diffusers' `AutoencoderKL`, `nano` or
            `nano-fixed-16x`, which ship with the package, the name of one in the cache of the Hugging Face
            hub, or an LDM checkpoint file.
        dtype: dtype to run in; that of the weights if None. The fingerprint is that of the weights.
    """
    kind: Any = NestedAutoencoderKL
    source = shipped_folder(str(source), TOKENIZER) or source
    load = kind.from_single_file if is_state_file(source) else kind.from_pretrained
    tokenizer = _load(load, kind, "tokenizer", source, device)
    if dtype is not None and dtype != tokenizer.dtype:
        tokenizer.keep_fingerprint()
        tokenizer.to(dtype)
    return in_fast_layout(tokenizer)


def in_fast_layout(tokenizer: NestedAutoencoderKL) -> NestedAutoencoderKL:
    """Convert the weights of a tokenizer on a GPU to channels-last, as its tensor cores need them."""
    module: Any = tokenizer  # diffusers' wrapper of `to` hides its arguments
    return module.to(memory_format=torch.channels_last) if tokenizer.device.type == "cuda" else tokenizer


def load_model(kind: type[Model], what: str, source: Path, device: str = "auto") -> Model:
    """Load a model in evaluation mode on `device`; the hub is never contacted.

    Args:
        kind: class of the model, a `CheckedModel`.
        what: name of the model in errors, such as "tokenizer".
        source: folder or file that its `from_pretrained` takes, or a name in the cache of the hub.
        device: "auto" (CUDA if available, else the CPU) or a torch device such as "cpu" or "cuda:1".

    Raises:
        UserError: the source or its content cannot be used, or the device is not available.
    """
    checked: Any = kind
    return _load(checked.from_pretrained, kind, what, source, device)


def _load(load: Callable[..., Any], kind: Any, what: str, source: Path, device: str) -> Any:
    target = find_device(device)
    source = _in_hub_cache(source) or source
    _require(kind, what, source)
    try:
        model = load(str(source), local_files_only=True)
    except Exception as error:  # missing, truncated and mismatched files raise different exceptions
        if isinstance(error, UserError) and str(source) in str(error):
            raise
        raise UserError(f"{source}: the checkpoint cannot be loaded ({one_line(error)[:200]})") from error
    return model.to(target).eval()


def _in_hub_cache(name: Path) -> Path | None:
    """Return the cached folder of a model on the hub, unless there is a file or folder of this name."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = None if name.exists() else try_to_load_from_cache(str(name), "config.json")
    except ValueError:  # not a valid hub name
        return None
    return Path(config).parent if isinstance(config, str) else None


def _require(kind: Any, what: str, source: Path) -> None:
    expected = f"expected the folder of a trained {what}, or a checkpoint file ({', '.join(SUFFIXES)})"
    if not source.exists():
        raise UserError(f"{source}: no such folder or file; {expected}")
    if source.is_dir() and not (source / "config.json").is_file():
        inside = sorted(path.parent for path in source.rglob("config.json") if _is_of(kind, path))
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise UserError(f"{source}: config.json is missing, so this is not a trained {what}{hint}")
    if source.is_file() and not is_state_file(source):
        raise UserError(f"{source}: is another kind of file; {expected}")


def _is_of(kind: Any, config: Path) -> bool:
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return False
    return name in [each.__name__ for each in (kind, *kind._converted_classes)]
