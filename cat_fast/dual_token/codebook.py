"""Vector quantiser: nearest codebook vector, straight-through gradients, statistics, revival of dead codes.

The module itself never communicates. `statistics` sums a batch, the caller adds the sums of all ranks, and
`update` applies them, so that the codebooks of all ranks stay equal.

Shapes: ... any leading dimensions, N vectors, K codes, D features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("ema", "gradient")
_CHUNK = 1 << 24
"""Maximum number of distances computed at a time."""


class Quantized(NamedTuple):
    """Result of quantising vectors."""

    values: Tensor
    """(..., D): the codebook vectors; gradients pass straight through to the input."""
    codes: Tensor
    """(...) int64: their indices."""
    commitment: Tensor
    """Scalar: mean squared distance to the codebook vectors, whose gradients reach the input only."""
    codebook: Tensor
    """Scalar: the same distance, whose gradients reach the codebook only; 0 for an EMA codebook."""


class Statistics(NamedTuple):
    """Sums over the vectors of a batch, to be added over batches and ranks."""

    counts: Tensor
    """(K,) float64: number of vectors per code."""
    sums: Tensor
    """(K, D) float64: sum of the vectors of each code; (0, D) for a gradient codebook, which needs none."""


class Usage(NamedTuple):
    """Use of a codebook by a set of images."""

    share: float
    """Fraction of the codes that occur at least once."""
    perplexity: float
    """exp of the entropy of the codes: the number of codes that would be as diverse if used uniformly."""


class VectorQuantizer(nn.Module):
    """Codebook of `size` vectors with `dim` features.

    `cluster_size` is an average of the share of vectors per code, times K: 1 if all codes are used alike. A
    code whose value falls below a limit is dead, and `update` replaces it by a vector of the batch.

    Args:
        kind: `ema` moves each code to the exponential moving average of its vectors (van den Oord et al.,
            2017, appendix A); `gradient` trains the codes by the gradient of `Quantized.codebook`.

    Raises:
        ValueError: fewer than two codes, or an unknown kind.
    """

    codebook: Tensor
    cluster_size: Tensor
    cluster_sum: Tensor

    def __init__(self, size: int, dim: int, kind: str = "ema") -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"codebook: expected {' or '.join(KINDS)}, got {kind!r}")
        if size < 2 or dim < 1:
            raise ValueError(f"codebook: expected at least 2 codes of 1 feature, got {size} of {dim}")
        self.size, self.dim, self.ema = size, dim, kind == "ema"
        codebook = torch.randn(size, dim) / dim**0.5
        if self.ema:
            self.register_buffer("codebook", codebook)
            self.register_buffer("cluster_sum", torch.zeros(size, dim))
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("cluster_size", torch.zeros(size))

    def forward(self, z: Tensor) -> Quantized:
        """Quantise vectors (..., D); distances are computed in float32."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codes = self.nearest(z)
            values = self.lookup(codes)
            commitment = F.mse_loss(z, values.detach())
            codebook = z.new_zeros(()) if self.ema else F.mse_loss(values, z.detach())
            return Quantized(z + (values - z).detach(), codes, commitment, codebook)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the index of the nearest code of each vector (..., D) -> (...), int64 (equation 2)."""
        flat, codebook = z.float().flatten(0, -2), self.codebook.float()
        norms = codebook.square().sum(1)
        rows = max(1, _CHUNK // self.size)
        # |z|^2 is the same for all codes
        nearest = [(norms - 2 * part @ codebook.T).argmin(1) for part in flat.split(rows)]
        return torch.cat(nearest).view(z.shape[:-1])

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors (..., D) of codes (...)."""
        return F.embedding(codes, self.codebook)

    @torch.no_grad()
    def statistics(self, z: Tensor, codes: Tensor) -> Statistics:
        """Return the sums of one batch of vectors (..., D) and their codes (...)."""
        vectors, index = z.flatten(0, -2).double(), codes.flatten()
        counts = torch.bincount(index, minlength=self.size).double()
        sums = vectors.new_zeros(self.size if self.ema else 0, self.dim)
        if self.ema:
            sums.index_add_(0, index, vectors)
        return Statistics(counts, sums)

    @torch.no_grad()
    def update(self, statistics: Statistics, decay: float) -> None:
        """Move the averages, and with them an EMA codebook, by the statistics of all ranks.

        Steps weigh alike, whatever their number of vectors.
        """
        counts = statistics.counts.to(self.codebook.device)
        scale = self.size / counts.sum().clamp(min=1)
        self.cluster_size.lerp_((counts * scale).to(self.cluster_size), 1 - decay)
        if self.ema:
            sums = statistics.sums.to(self.codebook.device) * scale
            self.cluster_sum.lerp_(sums.to(self.cluster_sum), 1 - decay)
            used = self.cluster_size > 0
            self.codebook[used] = self.cluster_sum[used] / self.cluster_size[used, None]

    @torch.no_grad()
    def revive(self, candidates: Tensor, limit: float) -> Tensor:
        """Replace dead codes by candidates, in order; return the indices of the replaced codes.

        Args:
            candidates: (M, D), vectors of a batch in random order, the same on all ranks. If there are fewer
                than dead codes, the rest stays dead until the next call.
            limit: value of `cluster_size` below which a code is dead.
        """
        dead = (self.cluster_size < limit).nonzero().flatten()[: len(candidates)]
        vectors = candidates[: len(dead)].to(self.codebook)
        self.codebook.data[dead] = vectors
        self.cluster_size[dead] = 1.0
        if self.ema:
            self.cluster_sum[dead] = vectors
        return dead


def usage(counts: Tensor) -> Usage:
    """Return the use of a codebook from the number of vectors per code, (K,)."""
    shares = counts.double() / counts.sum().clamp(min=1)
    used = shares[shares > 0]
    return Usage((counts > 0).double().mean().item(), torch.exp(-(used * used.log()).sum()).item())
