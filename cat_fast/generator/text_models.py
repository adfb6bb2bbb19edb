"""Local lookup and download of text encoder models."""

import json
from pathlib import Path

from cat_fast.complexity.sentence_package import HUB_NAME, package_folder
from cat_fast.errors import UserError, one_line

ENCODER_HINT = "give the name of a text encoder on the Hugging Face hub, or the folder of one"
PACKAGED = {HUB_NAME: package_folder}
"""Lookup of the models that Python packages contain, by their names on the hub."""

_CONFIG_AND_TOKENIZER = ["*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""In order of preference."""


def find_text_model(name: str) -> Path | None:
    """Return the folder of the model `name` on this machine, without access to the network.

    It is the folder `name`, or that of the model in an installed Python package, or in the cache of the
    Hugging Face hub. Return None if the model is missing or incomplete, for example after an interrupted
    download.
    """
    if Path(name).is_dir():
        return Path(name)
    if name in PACKAGED and (packaged := PACKAGED[name]()) is not None:
        return packaged
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a valid hub name
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if _is_complete(folder) else None


def published_name(name: str) -> str:
    """Return a name of a text encoder that a saved reference can hold.

    It is the name on the hub, also for the folder of a package that contains the model, and the absolute path
    of any other folder.
    """
    if not Path(name).is_dir():
        return name
    folder = Path(name).resolve()
    for hub_name, packaged in PACKAGED.items():
        if (found := packaged()) is not None and found.resolve() == folder:
            return hub_name
    return str(folder)


def is_hub_name(name: str) -> bool:
    """Check that `name` is a valid model name on the hub."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def fetch_text_model(name: str) -> Path:
    """Download a model from the hub into the local cache, weights last, and return its folder.

    Raises:
        UserError: the model does not exist, or the hub is not reachable.
    """
    import huggingface_hub

    try:
        for patterns in (_CONFIG_AND_TOKENIZER, *([weights] for weights in _WEIGHTS)):
            if not find_text_model(name):
                # transformers reads the top-level files; subfolders contain other formats
                huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"])
    except Exception as error:  # errors of the hub, the network or the disk
        raise UserError(
            f"text encoder {name!r} cannot be downloaded ({one_line(error)[:200]}); {ENCODER_HINT}"
        ) from error
    folder = find_text_model(name)
    if folder is None:
        raise UserError(
            f"text encoder {name!r}: config.json, tokenizer or weights are missing on the hub; {ENCODER_HINT}"
        )
    return folder


def _is_complete(folder: Path) -> bool:
    """Check that a folder with config.json has a tokenizer and all weights, in either format."""
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")) and any(
        any(folder.glob(weights))
        and all((folder / shard).exists() for shard in _weight_shards(folder, weights))
        for weights in _WEIGHTS
    )


def _weight_shards(folder: Path, weights: str) -> set[str]:
    """Return the names of sharded weight files; empty if the weights are a single file."""
    return {
        shard
        for index in folder.glob(f"{weights}.index.json")
        for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    }
