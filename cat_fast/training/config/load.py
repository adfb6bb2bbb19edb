"""From a YAML file and overrides to the configuration of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cat_fast.config import fill, read_yaml
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.training.config.settings import RunConfig


def load_run(path: str, overrides: list[str]) -> RunConfig:
    """The configuration that `path` and `key=value` overrides describe; its `task` key says of which kind.

    Raises:
        UserError: the file, its task, a key or a value cannot be used.
    """
    values = read_yaml(path)
    # Imports torch: a file that is missing is told without waiting for it.
    from cat_fast.training.config.settings import RUNS

    kind = values.get("task")
    if kind not in RUNS:
        raise UserError(f"configuration {path}: task {kind!r} is not one of {', '.join(RUNS)}")
    return fill(RUNS[kind], values, overrides, source=f"configuration {path}")
