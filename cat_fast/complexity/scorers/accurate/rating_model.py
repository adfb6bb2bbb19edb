"""`RatingModel`: adapted upper layers of the sentence encoder, pooling and a head over ratings 1 to 9.

The lower layers stay frozen and are shared; each of the upper layers' linear maps gets a low-rank update
(Hu et al. 2021, LoRA). The flags enter at the head, so that one pass serves every state of the flags.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cat_fast.complexity.description import Description
from cat_fast.complexity.sentence_encoder import SentenceEncoder, frozen_linear
from cat_fast.data.images.label_fields import SCORES
from cat_fast.kernels.linear.layer import Linear

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
        outputs, inputs = linear.weight.shape
        self.down = nn.Parameter(torch.randn(inputs, rank) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs) to (N, outputs)."""
        return torch.addmm(F.linear(x, self.weight, self.bias), x @ self.down, self.up)

    def merged(self) -> Linear:
        """Return the plain linear map with the update added to the weight."""
        return frozen_linear(self.weight + (self.down @ self.up).T, self.bias.detach())


ADAPTED = {"attend": 2 * RANK, "attended": RANK, "widen": RANK, "narrow": RANK}
"""Linear maps of a layer and the ranks of their updates; the first joins three maps."""


class RatingModel(nn.Module):
    """Estimates the distribution of ratings from the hidden states of a caption and its flags."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        super().__init__()
        width = encoder.width
        self.layers = nn.ModuleList(map(_adapted, encoder.layers[FROZEN_LAYERS:]))
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
        for layer in self.layers:
            hidden = layer(hidden, real)
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

    def predict(self, hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probabilities of ratings per state of the flags, and those of the flags.

        Args:
            hidden, real: as for `pool`.

        Returns:
            float64 (N, 4, 9), with the flags (no, no), (no, yes), (yes, no), (yes, yes); float64 (N, 2).
        """
        features = self.pool(hidden, real)
        states = [(text, faces) for text in (NO, YES) for faces in (NO, YES)]
        logits = [self.ratings(features, torch.tensor([state]).expand(len(hidden), 2)) for state in states]
        return torch.stack(logits, 1).double().softmax(2), self.flags(features).double().sigmoid()

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
        for layer in self.layers:
            for name in ADAPTED:
                setattr(layer, name, getattr(layer, name).merged())
        return self.eval().requires_grad_(False)


def _adapted(layer: nn.Module) -> nn.Module:
    """Return a copy of an encoder layer with trainable norms and updates of its linear maps."""
    result = copy.copy(layer)
    result._modules = dict(layer._modules)
    for name in ("norm_1", "norm_2"):
        setattr(result, name, copy.deepcopy(getattr(layer, name)).requires_grad_(True))
    for name, rank in ADAPTED.items():
        setattr(result, name, LowRankLinear(getattr(layer, name), rank))
    return result
