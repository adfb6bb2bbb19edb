"""Causal Q-Former: learned queries that see earlier queries and the image (section 3.2.1)."""

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class CausalQFormer(nn.Module):
    """BLIP-2's Q-Former with causal self-attention among its queries.

    `Blip2QFormerModel` masks padding only, so that its queries see each other in both directions. It passes
    on a four-dimensional mask as it is, which makes them causal.

    Args:
        config: of the Q-Former; `encoder_hidden_size` is the width of the image features.
        num_queries: number of learned queries.
    """

    def __init__(self, config: Blip2QFormerConfig, num_queries: int = 32) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, config.hidden_size) * 0.02)
        self.qformer = Blip2QFormerModel(config)

    def forward(self, features: Tensor) -> Tensor:
        """Return causal embeddings (B, Q, D) of image features (B, N, C).

        Embedding i depends on the image and on queries up to i.
        """
        queries = self.query_tokens.expand(len(features), -1, -1)
        mask = causal_mask(queries.shape[1], queries)
        output = self.qformer(query_embeds=queries, attention_mask=mask, encoder_hidden_states=features)
        return output.last_hidden_state


def causal_mask(length: int, like: Tensor) -> Tensor:
    """Return an additive mask (1, 1, length, length): 0 up to the diagonal, the smallest number above it."""
    full = torch.full((length, length), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device)
    return full.triu(1)[None, None]
