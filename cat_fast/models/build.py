"""From the `model:` section of a configuration to the model."""

from typing import Any, TypeVar

from torch import nn

from cat_fast.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


def build_model(kind: type[Model], arguments: dict[str, Any]) -> Model:
    """An untrained `kind` of model.

    Raises:
        UserError: an unknown argument, or values that the model refuses.
    """
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"model: {error}") from error
