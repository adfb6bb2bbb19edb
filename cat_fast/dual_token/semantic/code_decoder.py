"""Decoder of semantic codes: codes -> causal embeddings, trained by cosine similarity (equation 7)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CodeDecoder(nn.Module):
    """Transformer over the codebook vectors of one image.

    Args:
        code_channels: features of a codebook vector.
        width: features of a causal embedding.
        length: number of codes per image.
        layers: number of transformer layers.
        heads: attention heads per layer.
    """

    def __init__(self, code_channels: int, width: int, length: int, layers: int, heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(code_channels, width)
        self.positions = nn.Parameter(torch.randn(1, length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return embeddings (B, L, D) of codebook vectors (B, L, C)."""
        return self.out(self.layers(self.project(vectors) + self.positions))


def cosine_loss(decoded: Tensor, embeddings: Tensor) -> Tensor:
    """Return the negative mean cosine similarity of embeddings (B, L, D)."""
    return -F.cosine_similarity(decoded.float(), embeddings.float(), dim=-1).mean()
