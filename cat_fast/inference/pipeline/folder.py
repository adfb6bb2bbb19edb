"""Layout of a saved pipeline: checks before loading, search for a damaged part, digest of its files.

A folder holds

    model_index.json    class of every component, and the settings of `CATPipeline`
    vae/, transformer/  configuration and weights
    scheduler/          configuration of the noise schedule
    text_encoder/       name and fingerprint of the text encoder, for a transformer trained with text
"""

import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from cat_fast.errors import UserError, one_line
from cat_fast.inference.pipeline.components import COMPONENTS, OPTIONAL, class_names
from cat_fast.models.load import load_model
from cat_fast.weights.shipped import shipped_folder

INDEX = "model_index.json"
PIPELINE = "CATPipeline"

_FORMER_INDEX = "pipeline.json"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def find_folder(name: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """Return the local folder of a pipeline; download it if `name` is a repository on the Hugging Face hub.

    Args:
        name: a folder, the name of a model that ships with the package, such as "nano", or the name of a
            repository, "owner/name".
        options: those of diffusers' `from_pretrained`, of which the hub's are used.

    Raises:
        UserError: there is neither such a folder nor such a repository.
    """
    if Path(name).is_dir():
        return Path(name)
    if (shipped := shipped_folder(os.fspath(name))) is not None:
        return shipped
    reason = "no such folder"
    if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            return Path(
                snapshot_download(name, **{key: options[key] for key in _HUB_OPTIONS if key in options})
            )
        except Exception as error:  # of the network, of the hub, of its cache
            reason += f", and not found on the hub ({one_line(error)})"
    raise UserError(f"{name} is not a pipeline: {reason}; expected a folder that `cat-fast pipeline` wrote")


def check_folder(folder: Path, given: Collection[str] = ()) -> None:
    """Check that a folder holds the components of a `CATPipeline`, each of a class that it can use.

    Args:
        folder: written by `CATPipeline.save_pretrained`.
        given: names of components that are not loaded from the folder.

    Raises:
        UserError: model_index.json or a component is missing, or is of another class.
    """
    if not (folder / INDEX).is_file():
        if (folder / _FORMER_INDEX).is_file():
            raise UserError(
                f"{folder} has the layout of an earlier version; remake it: cat-fast pipeline --tokenizer"
                f" {folder / 'tokenizer'} --generator RUN/model --latents LATENTS --out {folder}"
            )
        raise UserError(f"{folder} is not a pipeline: {INDEX} is missing; make one with `cat-fast pipeline`")
    index = _read_json(folder, folder / INDEX)
    if index.get("_class_name") != PIPELINE:
        raise UserError(f"{folder} holds a {index.get('_class_name')}, expected a {PIPELINE}")
    for part in COMPONENTS:
        if part not in given:
            _check_component(folder, part, index.get(part))


def find_damage(folder: Path, given: Collection[str] = ()) -> str | None:
    """Load each component that is not given by itself; return the error of the first that fails, or None."""
    for part in ("vae", "transformer"):
        (kind,) = COMPONENTS[part]
        if part in given:
            continue
        try:
            load_model(kind, part, folder / part, "cpu")
        except UserError as error:
            return str(error)
    if "scheduler" in given:
        return None
    try:
        name = _read_json(folder, folder / "scheduler" / "scheduler_config.json")["_class_name"]
        kinds: dict[str, Any] = {kind.__name__: kind for kind in COMPONENTS["scheduler"]}
        kinds[name].from_pretrained(str(folder / "scheduler"))
    except Exception as error:  # diffusers raises several types
        return f"{folder / 'scheduler'}: the scheduler cannot be loaded ({one_line(error)})"
    return None


def pipeline_digest(folder: Path) -> str:
    """Return 16 hex digits that change with any file of a pipeline; other files in its folder are ignored."""
    parts = [path for part in COMPONENTS if (folder / part).is_dir() for path in (folder / part).iterdir()]
    digest = hashlib.sha256()
    for path in sorted([folder / INDEX, *parts]):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _check_component(folder: Path, part: str, entry: Any) -> None:
    expected = [kind.__name__ for kind in COMPONENTS[part]]
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if name is None:
        if part in OPTIONAL:
            return
        raise UserError(f"{folder} is not a complete pipeline: {INDEX} does not list {part!r}")
    config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if name not in expected:
        source = folder / INDEX
    elif not config.is_file():
        raise UserError(f"{folder} is not a complete pipeline: {config} is missing")
    else:
        source, name = config, _read_json(folder, config).get("_class_name")
    if name not in expected:
        raise UserError(f"{source}: {part} is a {name}, expected a {class_names(part)}")


def _read_json(folder: Path, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not a complete pipeline: {path} is not valid JSON ({one_line(error)})"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{folder} is not a complete pipeline: {path} does not hold an object")
    return values
