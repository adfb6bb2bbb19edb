"""Settings of a folder's content, stored in a JSON file in the folder."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cat_fast.data.files import write_json
from cat_fast.errors import UserError

_ADVICE = "choose another folder, or delete this one"
_MAX_SHOWN = 60
"""Maximum length of a value quoted in an error, in characters."""
_EARLIER = {"linear_backend": "mkl"}
"""Values that earlier versions stored as null or left out, by setting."""


def claim_folder(path: Path, settings: Mapping[str, Any], content: str) -> bool:
    """Write `settings` to `path`, or compare them with those stored there.

    If several processes or machines claim a folder at the same time, the settings of the first one count.

    Args:
        path: JSON file in the folder, which is created if missing.
        settings: all settings that the folder's content depends on, as JSON values.
        content: name of the content for error messages, such as "latents".

    Returns:
        True if the folder was claimed before with the same settings.

    Raises:
        UserError: the folder was claimed with other settings, or the file cannot be read or written.
    """
    claimed = path.exists()
    if not claimed:
        write_json(path, settings, keep=True)
    _require_equal(path, _read(path), settings, content)
    return claimed


def require_same_settings(path: Path, settings: Mapping[str, Any], content: str) -> None:
    """Compare some of the settings that a folder was claimed with, if it was; see `claim_folder`.

    Raises:
        UserError: the folder was claimed with other settings, or the file cannot be read.
    """
    if path.exists():
        found = _read(path)
        if isinstance(found, dict):
            found = {name: value for name, value in found.items() if name in settings}
        _require_equal(path, found, settings, content)


def stored_settings(path: Path) -> dict[str, Any]:
    """Return the settings that a folder was claimed with; none if it was not.

    Raises:
        UserError: the file cannot be read.
    """
    found = _read(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object of settings; {_ADVICE}")
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_ADVICE}") from error


def _require_equal(path: Path, found: Any, settings: Mapping[str, Any], content: str) -> None:
    wanted = json.loads(json.dumps(settings))
    if differing := list(_differences(found, wanted)):
        raise UserError(
            f"{path.parent} contains {content} made with other settings ({', '.join(differing)}); {_ADVICE}"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of differing values, with both values if they are short."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in wanted | found:
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
    elif found is None and wanted == _EARLIER.get(name.rpartition(".")[2]):
        return
    elif found != wanted:
        values = f"{found!r}, not {wanted!r}"
        yield f"{name}: {values}" if name and len(values) <= _MAX_SHOWN else name or "not an object"
