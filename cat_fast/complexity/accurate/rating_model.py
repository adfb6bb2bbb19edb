"""`RatingModel`: adapted upper layers of the sentence encoder, pooling and a head over ratings 1 to 9.

The lower layers stay frozen and are shared; each of the upper layers' linear maps gets a low-rank update
(Hu et al. 2021, LoRA). The flags enter at the head, so that one pass serves every state of the flags.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel

from cat_fast.complexity.description import Description
from cat_fast.data.images.label_fields import SCORES

FROZEN_LAYERS = 3
"""Number of lower layers that no adapter changes."""
RANK = 8
QUERIES = 4
"""Number of learned attention queries that pool the tokens, next to their mean."""
WIDTH = 128
"""Width of the head."""
UNKNOWN, NO, YES = 0, 1, 2
"""States of a flag."""


def flag_states(descriptions: Sequence[Description]) -> Tensor:
    """Return the states of the flags (text, faces) of each description, int64 (N, 2)."""
    state = {None: UNKNOWN, False: NO, True: YES}
    rows = [(state[d.has_text], state[d.has_faces]) for d in descriptions]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


class LowRankLinear(nn.Module):
    """Linear map with a frozen weight, a trained low-rank update of it and a trained bias."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight, requires_grad=False)
        self.bias = nn.Parameter(linear.bias.clone())
        self.down = nn.Parameter(torch.randn(linear.in_features, rank) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(rank, linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return F.linear(x, self.weight, self.bias) + x @ self.down @ self.up

    def merged(self) -> nn.Linear:
        """Return the plain linear map with the update added to the weight."""
        linear = nn.Linear(*reversed(self.weight.shape), device="meta")
        linear.weight = nn.Parameter(self.weight + (self.down @ self.up).T, requires_grad=False)
        linear.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        return linear


class RatingModel(nn.Module):
    """Estimates the distribution of ratings from the hidden states of a caption and its flags."""

    def __init__(self, encoder: BertModel, rank: int = RANK) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.layers = copy.deepcopy(encoder.encoder.layer[FROZEN_LAYERS:])
        self.layers.requires_grad_(True)
        for parent, name, linear in _linears(self.layers, nn.Linear):
            setattr(parent, name, LowRankLinear(linear, rank))
        for module in self.layers.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.queries = nn.Parameter(torch.zeros(width, QUERIES))
        self.inner = nn.Linear(width * (QUERIES + 1), WIDTH)
        self.outer = nn.Linear(WIDTH, len(SCORES))
        self.flag_scale = nn.Parameter(torch.zeros(9, WIDTH))
        self.flag_shift = nn.Parameter(torch.randn(9, WIDTH) * 0.3)
        self.flag_logits = nn.Parameter(torch.zeros(9, len(SCORES)))
        self.flags = nn.Linear(width * (QUERIES + 1), 2)
        self.dropout = nn.Dropout(0.2)

    def pool(self, hidden: Tensor, real: Tensor) -> Tensor:
        """Return the features of each caption, (N, 384 · 5).

        Args:
            hidden: states after the frozen layers, (N, L, 384).
            real: False for padding, bool (N, L).
        """
        mask = real[:, None, None]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        weights = (hidden @ self.queries).masked_fill(~real[..., None], -1e9).softmax(1)
        attended = torch.einsum("nld,nlq->nqd", hidden, weights).flatten(1)
        lengths = real.sum(1, keepdim=True).clamp(min=1)
        mean = (hidden * real[..., None]).sum(1) / lengths
        return self.dropout(torch.cat([attended, mean], 1))

    def ratings(self, features: Tensor, flags: Tensor) -> Tensor:
        """Return the logits of the ratings 1..9, (N, 9).

        Args:
            features: result of `pool`.
            flags: states of the flags (text, faces), int64 (N, 2).
        """
        state = flags[:, 0] * 3 + flags[:, 1]
        inner = self.inner(features) * (1 + self.flag_scale[state]) + self.flag_shift[state]
        return self.outer(F.gelu(inner)) + self.flag_logits[state]

    def adapter(self) -> dict[str, Tensor]:
        """Return the trained parameters, without the encoder's weights."""
        return {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}

    def load_adapter(self, adapter: dict[str, Tensor]) -> None:
        """Set the trained parameters; raise ValueError if the names or shapes differ."""
        own = self.adapter()
        if adapter.keys() != own.keys() or any(adapter[n].shape != own[n].shape for n in own):
            raise ValueError("the parameters differ from those of the model")
        for name, value in adapter.items():
            own[name].copy_(value)

    def merge(self) -> "RatingModel":
        """Replace the low-rank linear maps by plain ones, for inference; return the model."""
        for parent, name, linear in _linears(self.layers, LowRankLinear):
            setattr(parent, name, linear.merged())
        return self.eval().requires_grad_(False)


def _linears(layers: nn.Module, kind: type) -> Sequence[tuple[nn.Module, str, nn.Module]]:
    return [
        (parent, name, child)
        for parent in layers.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]
