"""Published models, converted to our classes."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Published:
    """Constructor arguments and state dict of a converted model."""

    arguments: dict[str, Any]
    state: dict[str, Tensor]
