"""The models' linear layer."""

import torch
from torch import nn

from .op import linear


class Linear(nn.Linear):
    """torch's linear layer, with the selected library's products."""

    backend: str | None = None
    """Library of this layer; by default that of the process."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias, self.backend)
