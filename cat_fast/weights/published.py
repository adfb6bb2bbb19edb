"""Published models, converted to our classes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cat_fast.errors import UserError, one_line

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Published:
    """Constructor arguments and state dict of a converted model."""

    arguments: dict[str, Any]
    state: dict[str, Tensor]

    def build(self, kind: type[Model], name: str, dtype: torch.dtype | None = None) -> Model:
        """Return the model in evaluation mode, with exactly these weights.

        Args:
            kind: class of the model.
            name: file or folder, for error messages.
            dtype: dtype of the model; None keeps that of the weights.

        Raises:
            UserError: invalid arguments, or missing, unexpected or mismatched weights.
        """
        try:
            model = kind(**self.arguments)
        except (ValueError, TypeError) as error:
            raise UserError(f"{name}: the model cannot be built ({one_line(error)[:200]})") from error
        own = model.state_dict()
        check_keys(name, missing=own.keys() - self.state.keys(), unexpected=self.state.keys() - own.keys())
        check_shapes(name, own, self.state)
        model.load_state_dict(self.state)
        return model.to(dtype or next(iter(self.state.values())).dtype).eval()


def check_keys(name: str, *, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Check that a model's weights were complete and all known.

    Raises:
        UserError: a weight is missing or unexpected.
    """
    if missing:
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{name}: {min(missing)} is missing from its weights{others}")
    if unexpected:
        others = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise UserError(
            f"{name}: its weights contain {min(unexpected)}{others}, which the model does not have; expected "
            "the weights of this model alone"
        )


def check_shapes(name: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Check the shapes of weights.

    Raises:
        UserError: a weight has another shape than the model's.
    """
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise UserError(
                f"{name}: {key} has shape {tuple(state[key].shape)}, expected {tuple(tensor.shape)}"
            )
