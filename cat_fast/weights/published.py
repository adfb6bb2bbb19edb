"""A published checkpoint, translated for one of our models."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Published:
    """What a model is built from."""

    arguments: dict[str, Any]
    state: dict[str, Tensor]
