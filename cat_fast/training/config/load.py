"""Loading of a run's configuration from a YAML file and overrides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cat_fast.config import fill, read_yaml
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.training.config.settings import RunConfig


def load_run(path: str, overrides: list[str]) -> RunConfig:
    """Load the configuration in `path`, with `key=value` overrides; its `task` key selects the dataclass.

    Raises:
        UserError: the file, its task, a key or a value is invalid.
    """
    values = read_yaml(path)
    # Imported here because it imports torch: a missing file is reported without that delay.
    from cat_fast.training.config.runs import RUNS

    kind = values.get("task")
    if kind not in RUNS:
        raise UserError(f"configuration {path}: task {kind!r} is not one of {', '.join(RUNS)}")
    return fill(RUNS[kind], values, overrides, source=f"configuration {path}")
