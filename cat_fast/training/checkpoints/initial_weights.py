"""Start of a run from the weights of a trained model: the key `initial_weights` of its configuration."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cat_fast.data.files import sha256
from cat_fast.errors import UserError
from cat_fast.models.load import load_model
from cat_fast.training.checkpoints.initial_settings import model_settings

RECORD = "initial_weights.json"
"""File in a run's folder that records the weights it started from."""


def load_initial_weights(model: nn.Module, folder: str, free: Collection[str]) -> str | None:
    """Copy the weights of a trained model of the same class and settings into `model`.

    Args:
        folder: folder of the trained model, such as model/ of its run; empty leaves `model` as it is.
        free: config entries that may differ.

    Returns:
        The digest of the weights, `weights_digest`; None without a folder.

    Raises:
        UserError: the folder does not hold a model of this class, or its settings differ.
    """
    if not folder:
        return None
    try:
        trained = load_model(type(model), "model", Path(folder), "cpu")
    except UserError as error:
        raise UserError(f"initial_weights: {error}") from error
    found, expected = (model_settings(_config(one), free) for one in (trained, model))
    different = [name for name, value in expected.items() if not _agree(name, found.get(name), value)]
    if different:
        name = different[0]
        raise UserError(
            f"initial_weights: {folder} has {name} {found.get(name)!r}, this run has {expected[name]!r}; use "
            "the settings and data of that run, or train from scratch with initial_weights=''"
        )
    with torch.no_grad():
        own = model.state_dict()  # with buffers, such as the codebook of a vector quantiser
        for name, value in trained.state_dict().items():
            own[name].copy_(value)
    return weights_digest(Path(folder))


def weights_digest(folder: Path) -> str:
    """Return 16 hex digits that identify the weight files of a model's folder.

    Raises:
        UserError: it has none, such as the name of a model in the hub's cache.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(
            f"initial_weights: {folder}: expected a folder with weights (*.safetensors or *.bin); for a "
            "model of the hub, give its folder in the cache"
        )
    hashes = [sha256(path) for path in files]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def describe_initial_weights(folder: str) -> dict[str, Any]:
    """Return the content of `RECORD`: folder, digest and, as `earlier`, the record of that run, if any."""
    earlier = Path(folder).parent / RECORD
    before = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else None
    return {"folder": folder, "weights": weights_digest(Path(folder)), "earlier": before}


def _agree(name: str, found: Any, expected: Any) -> bool:
    # a published model may not know its tokenizer or text encoder
    return found == expected or (found is None and name.endswith("_fingerprint"))


def _config(model: nn.Module) -> Any:
    # through JSON, as a saved config has lists where a new one has tuples
    config: Any = model.config
    return json.loads(json.dumps(dict(config), default=list))
