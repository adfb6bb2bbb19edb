"""What a DiT block is told beside the tokens: place in the picture, timestep, class and ratio."""

import math

import torch
from torch import nn

from cat_fast.packing import PackedSequence


def picture_positions(packed: PackedSequence, frame: int) -> torch.Tensor:
    """(T, 2) float32 centre (y, x) of every token, in one frame for grids of every ratio.

    The longer side of a picture spans `frame` units and the shorter is centred in it, so a token's position
    says where in the *picture* it lies: the four tokens of an 8x8 grid that cover a token of the 4x4 grid
    surround its position. On a square grid of `frame` tokens a side the positions are the integers 0 .. frame
    - 1 of the original DiT.
    """
    index = packed.sequence_index()
    grid = packed.grid.long()
    width = grid[index, 1]
    offset = torch.arange(packed.num_tokens, device=index.device) - packed.cu_seqlens.long()[index]
    token = torch.stack((offset // width, offset % width), dim=1)
    from_centre = token + 0.5 - grid[index] / 2
    scale = frame / grid.amax(1)
    return from_centre * scale[index, None] + (frame - 1) / 2


def sincos_embedding(position: torch.Tensor, dim: int, *, max_period: float = 10_000.0) -> torch.Tensor:
    """(N,) float positions -> (N, dim): sines, then cosines, of dim / 2 geometrically spaced frequencies."""
    half = dim // 2
    exponent = torch.arange(half, device=position.device, dtype=torch.float32) / half
    angle = position.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def position_embedding(packed: PackedSequence, dim: int, frame: int) -> torch.Tensor:
    """(T, dim) float32 fixed 2-D embedding: the first half of the features encodes x, the second half y."""
    y, x = picture_positions(packed, frame).unbind(1)
    return torch.cat((sincos_embedding(x, dim // 2), sincos_embedding(y, dim // 2)), dim=1)


class PatchEmbed(nn.Module):
    """Tokens (T, p*p*c) -> (T, hidden), holding the weight of the strided convolution that it is in DiT."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = _PatchConv(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.proj(tokens)


class _PatchConv(nn.Conv2d):
    """A convolution whose input is cut into patches already, features in the order of `kernels.pack`."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (hidden, p, p, c) as the tokens have it
        return nn.functional.linear(tokens, weight, self.bias)


class TimestepEmbedder(nn.Module):
    """(S,) timesteps -> (S, hidden): sinusoids through a two-layer MLP."""

    def __init__(self, hidden_size: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(
            nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        # DiT puts the cosines first here, unlike in its position embedding
        sin, cos = sincos_embedding(timesteps, self.frequency_dim).chunk(2, dim=1)
        return self.mlp(torch.cat((cos, sin), dim=1).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """(S,) classes -> (S, hidden); class `num_classes` is the null class of classifier-free guidance.

    In training each label becomes the null class with probability `dropout_prob`.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        if self.training and self.dropout_prob > 0:
            device = labels.device if generator is None else generator.device
            drop = torch.rand(len(labels), generator=generator, device=device) < self.dropout_prob
            labels = labels.masked_fill(drop.to(labels.device), self.num_classes)
        return self.embedding_table(labels)


class RatioEmbedder(nn.Module):
    """(S,) compression ratios -> (S, hidden), zero at the start: published DiT weights load unchanged."""

    def __init__(self, ratios: tuple[int, ...], hidden_size: int) -> None:
        super().__init__()
        self.ratios = ratios
        self.embedding_table = nn.Embedding(len(ratios), hidden_size)

    def forward(self, ratio: torch.Tensor) -> torch.Tensor:
        known = torch.tensor(self.ratios, dtype=ratio.dtype, device=ratio.device)
        return self.embedding_table((ratio[:, None] == known).long().argmax(1))
