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
from transformers.models.bert.modeling_bert import BertLayer

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

    def __init__(self, linears: Sequence[nn.Linear], rank: int) -> None:
        """Join the outputs of linear maps of the same input."""
        super().__init__()
        weight = torch.cat([linear.weight for linear in linears])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]))
        outputs, inputs = weight.shape
        self.down = nn.Parameter(torch.randn(inputs, rank) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs) to (N, outputs)."""
        return torch.addmm(F.linear(x, self.weight, self.bias), x @ self.down, self.up)

    def merged(self) -> nn.Linear:
        """Return the plain linear map with the update added to the weight."""
        linear = nn.Linear(*reversed(self.weight.shape), device="meta")
        linear.weight = nn.Parameter(self.weight + (self.down @ self.up).T, requires_grad=False)
        linear.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        return linear


class AdaptedLayer(nn.Module):
    """One layer of the encoder with low-rank updates; without them, equal to transformers' layer."""

    def __init__(self, layer: BertLayer, rank: int) -> None:
        super().__init__()
        attention = layer.attention.self
        self.heads = attention.num_attention_heads
        projections = (attention.query, attention.key, attention.value)
        self.attend: nn.Module = LowRankLinear(projections, 2 * rank)
        self.attended: nn.Module = LowRankLinear([layer.attention.output.dense], rank)
        self.widen: nn.Module = LowRankLinear([layer.intermediate.dense], rank)
        self.narrow: nn.Module = LowRankLinear([layer.output.dense], rank)
        self.norm_1 = copy.deepcopy(layer.attention.output.LayerNorm)
        self.norm_2 = copy.deepcopy(layer.output.LayerNorm)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map states (N, L, D); `mask` is False for padding, bool (N, 1, 1, L)."""
        n, length, width = x.shape
        x = x.reshape(n * length, width)
        shape = (n, length, 3, self.heads, width // self.heads)
        q, k, v = self.attend(x).view(shape).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norm_1(x + self.attended(attended.transpose(1, 2).reshape(n * length, width)))
        x = self.norm_2(x + self.narrow(F.gelu(self.widen(x))))
        return x.view(n, length, width)

    def merge(self) -> None:
        """Replace the low-rank linear maps by plain ones, for inference."""
        for name in ("attend", "attended", "widen", "narrow"):
            setattr(self, name, getattr(self, name).merged())


class RatingModel(nn.Module):
    """Estimates the distribution of ratings from the hidden states of a caption and its flags."""

    def __init__(self, encoder: BertModel, rank: int = RANK) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.layers = nn.ModuleList(
            AdaptedLayer(layer, rank) for layer in encoder.encoder.layer[FROZEN_LAYERS:]
        ).requires_grad_(True)
        for layer in self.layers:
            for module in layer.modules():
                if isinstance(module, LowRankLinear):
                    module.weight.requires_grad_(False)
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
        for layer in self.layers:
            layer.merge()
        return self.eval().requires_grad_(False)
