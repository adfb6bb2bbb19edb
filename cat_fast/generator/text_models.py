"""Where the model of a text encoder lies on this machine, and how it comes there."""

import json
from pathlib import Path

from cat_fast.errors import UserError, one_line

BY_HAND = "give the name of a text encoder on the Hugging Face hub, or the folder of one"

_REST = ["*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""The second where a model has none of the first."""


def find_text_model(name: str) -> Path | None:
    """The folder called `name`, or what the cache of the Hugging Face hub holds of the model called so.

    None where it is not there, or not whole, as after a download that was cut short. Asks no network.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub could have
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if _is_whole(folder) else None


def is_hub_name(name: str) -> bool:
    """Whether a model on the hub could be called so."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def fetch_text_model(name: str) -> Path:
    """Download a model from the hub into its cache, weights last; returns its folder there.

    Raises:
        UserError: there is no such model, or no way to the hub.
    """
    import huggingface_hub

    try:
        for patterns in (_REST, *([weights] for weights in _WEIGHTS)):
            if not find_text_model(name):
                # what transformers reads lies at the top; folders hold other formats
                huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"])
    except Exception as error:  # of the hub, of the network or of the disk
        raise UserError(
            f"text encoder {name!r} cannot be downloaded ({one_line(error)[:200]}); {BY_HAND}"
        ) from error
    folder = find_text_model(name)
    if folder is None:
        raise UserError(
            f"text encoder {name!r} lacks config.json, a tokenizer or weights on the hub; {BY_HAND}"
        )
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a folder with config.json has a tokenizer and all of its weights, in either format."""
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")) and any(
        any(folder.glob(weights)) and all((folder / piece).exists() for piece in _pieces(folder, weights))
        for weights in _WEIGHTS
    )


def _pieces(folder: Path, weights: str) -> set[str]:
    """The files that large weights are cut into; none where they are one file."""
    return {
        piece
        for index in folder.glob(f"{weights}.index.json")
        for piece in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    }
