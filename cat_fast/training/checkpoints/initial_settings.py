"""Settings that the trained weights depend on, which a resumed run cannot change."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from cat_fast.errors import UserError


def model_settings(config: Mapping[str, Any], free: Collection[str]) -> dict[str, Any]:
    """Return the entries of a model's config by their names in a configuration (`model.num_heads`).

    Args:
        config: complete config of the model, defaults included.
        free: entries left out, because the function of given weights does not depend on them.
    """
    return {f"model.{key}": config[key] for key in config if not key.startswith("_") and key not in free}


def require_same_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare a run's settings with those of its checkpoint; what the checkpoint does not record is ignored.

    Raises:
        UserError: a setting differs.
    """
    for name, value in json.loads(json.dumps(now)).items():
        if (started := before.get(name, value)) != value:
            raise UserError(
                f"{name}: expected {started!r}, as at the start of the run, got {value!r}: restore the "
                "setting, or start a new run in another output_dir"
            )
