"""Run configurations: YAML files and `key=value` overrides, parsed into self-validating dataclasses."""

import difflib
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from cat_fast.errors import UserError, first_line

T = TypeVar("T")


def read_yaml(path: str | Path) -> dict:
    """Read the mapping in a YAML file and merge it over the file named by its key `base`, if any.

    The path in `base` is relative to the file that contains it.

    Raises:
        UserError: the file or one of its bases is missing, is not valid YAML or not a mapping, or bases form
            a cycle.
    """
    values = _read_layers(Path(path), ())
    return {str(key): value for key, value in values.items()}


def _read_layers(path: Path, above: tuple[Path, ...]) -> dict:
    if path in above:
        raise UserError(f"configuration {path}: the file is its own base, through {above[-1]}")
    values = _read_one(path)
    base = values.pop("base", None)
    if base is None:
        return values
    below = _read_layers(path.parent / str(base), (*above, path))
    merged = OmegaConf.to_container(OmegaConf.merge(below, values))
    assert isinstance(merged, dict)
    return merged


def _read_one(path: Path) -> dict:
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; the folder contains {', '.join(near)}" if near else ""
        raise UserError(f"configuration {path}: no such file{hint}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:
        raise UserError(f"configuration {path}: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"configuration {path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def fill(schema: type[T], values: dict, overrides: list[str], source: str = "configuration") -> T:
    """Build an instance of the dataclass `schema` from a mapping and dotted `key=value` overrides.

    Raises:
        UserError: an unknown key (the message suggests the nearest known one), a value of the wrong type, or
            a value that the dataclass rejects.
    """
    layers = [_read_override(override) for override in overrides]
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), values, *layers)
        filled = OmegaConf.to_object(config)
    except ConfigKeyError as error:
        raise UserError(f"{source}: {_unknown_key(error, schema)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {error.full_key or 'value'}: {first_line(error)}") from error
    assert isinstance(filled, schema)
    return filled


def _read_override(override: str) -> DictConfig:
    if "=" not in override or override.startswith("="):
        raise UserError(f"override {override!r}: expected key=value, such as schedule.total_steps=100")
    if override.endswith("="):
        override += "''"  # the shell strips the quotes of key=''
    try:
        return OmegaConf.from_dotlist([override])
    except YAMLError as error:
        raise UserError(f"override {override!r}: value is not valid YAML ({first_line(error)})") from error


def _unknown_key(error: ConfigKeyError, schema: type) -> str:
    key = str(error.full_key or error.key)
    known = list(_dotted_keys(OmegaConf.to_container(OmegaConf.structured(schema))))
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _dotted_keys(values: object, prefix: str = "") -> list[str]:
    if not isinstance(values, dict):
        return []
    keys = []
    for name, value in values.items():
        keys.append(f"{prefix}{name}")
        keys.extend(_dotted_keys(value, f"{prefix}{name}."))
    return keys
