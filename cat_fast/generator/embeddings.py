"""Embeddings of the DiT: patches, image positions, timestep, class, ratio and text."""

import math

import torch
from torch import nn

from cat_fast.generator.packed_text import PackedText
from cat_fast.kernels.linear.layer import Linear
from cat_fast.packing import PackedSequence


def image_positions(packed: PackedSequence, frame: int) -> torch.Tensor:
    """Return the centre (y, x) of every token, (T, 2) float32, in a coordinate frame shared by all ratios.

    The longer side of an image spans `frame` units and the shorter side is centred in it. Positions are thus
    relative to the image, not to the grid: the four tokens of an 8x8 grid that cover a token of the 4x4 grid
    surround its position. On a square grid of `frame` x `frame` tokens, the positions are the integers
    0 .. frame - 1 of the original DiT.
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
    """Embed (N,) positions as (N, dim): sines, then cosines, of dim / 2 geometrically spaced frequencies."""
    half = dim // 2
    exponent = torch.arange(half, device=position.device, dtype=torch.float32) / half
    angle = position.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def position_embedding(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Embed (T, 2) positions as (T, dim) float32; the first half of the features encodes x, the second y."""
    y, x = positions.unbind(1)
    return torch.cat((sincos_embedding(x, dim // 2), sincos_embedding(y, dim // 2)), dim=1)


def rotation_angles(positions: torch.Tensor, head_dim: int, *, max_period: float = 100.0) -> torch.Tensor:
    """Return the 2-D RoPE angles of (T, 2) positions: (T, head_dim / 2) float32, half for x and half for y.

    The periods range from 2π to almost 200π units of the frame. A frame of 32 is less than one turn of the
    slow frequencies, and the fast ones separate neighbours in the finest grid, which are one unit apart.
    """
    quarter = head_dim // 4
    exponent = torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter
    y, x = (positions[:, None] * torch.exp(-math.log(max_period) * exponent)[:, None]).unbind(2)
    return torch.cat((x, y), dim=1)


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + d / 2) of x (T, H, d) by angle (T, d / 2), in fp32; return x's dtype."""
    a, b = x.float().chunk(2, dim=2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=2).to(x.dtype)


class PatchEmbed(nn.Module):
    """Tokens (T, p*p*c) -> (T, hidden), with the weight layout of DiT's strided convolution."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = _PatchConv(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.proj(tokens)


class _PatchConv(nn.Conv2d):
    """Convolution over input that is already patchified, with features in the order of `kernels.pack`."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (hidden, p, p, c), the tokens' feature order
        return nn.functional.linear(tokens, weight, self.bias)


class TimestepEmbedder(nn.Module):
    """(S,) timesteps -> (S, hidden): sinusoids through a two-layer MLP."""

    def __init__(self, hidden_size: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(
            Linear(frequency_dim, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size)
        )

    def forward(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # unlike in its position embedding, DiT puts the cosines first
        sin, cos = sincos_embedding(timesteps, self.frequency_dim).chunk(2, dim=1)
        return self.mlp(torch.cat((cos, sin), dim=1).to(dtype))


class LabelEmbedder(nn.Module):
    """(S,) classes -> (S, hidden); class `num_classes` is the null class of classifier-free guidance."""

    def __init__(
        self, num_classes: int, hidden_size: int, dropout_prob: float, label_dropout_prob: float = 0.0
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob, self.label_dropout_prob = dropout_prob, label_dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def drop(
        self, labels: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return labels (S,), some replaced by the null class, and a mask (S,) of unconditional sequences.

        In training, a sequence becomes unconditional with probability `dropout_prob`, and loses only its
        label with probability `label_dropout_prob`. In evaluation mode the labels are unchanged and the mask
        is None.
        """
        if not self.training or self.dropout_prob + self.label_dropout_prob == 0:
            return labels, None
        device = labels.device if generator is None else generator.device
        # torch.compile cannot trace torch.rand with a `generator` argument and a symbolic length
        draw = torch.empty(len(labels), device=device).uniform_(generator=generator).to(labels.device)
        unconditional = draw < self.dropout_prob
        unlabelled = draw < self.dropout_prob + self.label_dropout_prob
        return labels.masked_fill(unlabelled, self.num_classes), unconditional

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)


class RatioEmbedder(nn.Module):
    """(S,) compression ratios -> (S, hidden), zero-initialised: published DiT weights act unchanged."""

    def __init__(self, ratios: tuple[int, ...], hidden_size: int) -> None:
        super().__init__()
        self.ratios = ratios
        self.embedding_table = nn.Embedding(len(ratios), hidden_size)

    def forward(self, ratio: torch.Tensor) -> torch.Tensor:
        # Compared one by one: a list of the known ratios would be copied to the GPU at every step.
        index = (ratio == self.ratios[1]).long() if len(self.ratios) > 1 else torch.zeros_like(ratio)
        for number, known in enumerate(self.ratios[2:], start=2):
            index = index.add(ratio == known, alpha=number)
        return self.embedding_table(index)


class TextPool(nn.Module):
    """Mean of each embedded text, null token included: (L + S, hidden) -> (S, hidden), linearly mapped."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, text: PackedText) -> torch.Tensor:
        lengths = text.cu_seqlens.diff()
        tokens = text.tokens
        sequence = torch.arange(len(text), device=tokens.device)
        sequence = sequence.repeat_interleave(lengths, output_size=tokens.shape[0])
        total = tokens.new_zeros(len(text), tokens.shape[1]).index_add(0, sequence, tokens)
        return self.proj(total / lengths[:, None].to(tokens.dtype))


class TextEmbedder(nn.Module):
    """S texts (L, text_dim) -> (L + S, hidden): each text is preceded by a learned null token.

    An empty text is the null token alone. In training, a text is dropped by replacing each of its tokens with
    the null token. Attention to several copies equals attention to one, so dropping changes no length and
    needs no device synchronization.
    """

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(text_dim, hidden_size), nn.GELU(approximate="tanh"), Linear(hidden_size, hidden_size)
        )
        self.null_token = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, text: PackedText, null: torch.Tensor | None) -> PackedText:
        """Embed `text`, dropping the texts selected by `null`, (S,) bool; None drops none."""
        null_token = self.null_token
        count, length = len(text), text.tokens.shape[0]
        sequence = torch.arange(count, device=null_token.device)
        sequence = sequence.repeat_interleave(text.cu_seqlens.diff(), output_size=length)
        embedded = self.mlp(text.tokens.to(null_token.dtype)).to(null_token.dtype)
        if null is not None:
            embedded = torch.where(null[sequence, None], null_token, embedded)
        row = torch.arange(length, device=null_token.device) + sequence + 1
        tokens = null_token.expand(length + count, -1).index_copy(0, row, embedded)
        shift = torch.arange(count + 1, dtype=torch.int32, device=text.cu_seqlens.device)
        return PackedText(tokens=tokens, cu_seqlens=text.cu_seqlens + shift, max_seqlen=text.max_seqlen + 1)
