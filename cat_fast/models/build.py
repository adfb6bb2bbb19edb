"""Building a model from the `model:` section of a configuration."""

from typing import Any, TypeVar

from torch import nn

from cat_fast.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


def build_model(kind: type[Model], arguments: dict[str, Any]) -> Model:
    """Return an untrained model of class `kind`.

    Raises:
        UserError: an unknown argument or invalid values.
    """
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"model: {error}") from error
