"""One-directional InfoNCE, image to text (equation 6), with a fixed or a learned temperature."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_TEMPERATURE = 0.01
"""Limit of a learned temperature, as in CLIP, where logits are scaled by at most 100."""


class Temperature(nn.Module):
    """Temperature of the contrastive loss.

    Args:
        value: the temperature, or its start.
        learned: train its logarithm.
    """

    log_scale: Tensor

    def __init__(self, value: float = 0.07, learned: bool = True) -> None:
        super().__init__()
        if not MIN_TEMPERATURE <= value <= 10:
            raise ValueError(f"temperature: expected {MIN_TEMPERATURE} to 10, got {value}")
        log_scale = torch.tensor([-math.log(value)])  # DeepSpeed cannot broadcast scalars
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self) -> Tensor:
        """Return the temperature, (1,)."""
        return torch.exp(-self.log_scale).clamp(min=MIN_TEMPERATURE)


def info_nce(images: Tensor, texts: Tensor, own: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss over this rank's images and the fraction whose own text is the most similar.

    -log(exp(sim(z_i, t_i) / tau) / sum_j exp(sim(z_i, t_j) / tau)), with cosine similarity. The texts of the
    images are the candidates; the reverse direction, text to image, has no loss.

    Args:
        images: (B, P), this rank's image embeddings.
        texts: (N, P), the text embeddings of all ranks.
        own: (B,) int64, index of each image's text.
        temperature: scalar or (1,).
    """
    similarity = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    loss = F.cross_entropy(similarity / temperature, own)
    return loss, (similarity.argmax(1) == own).float().mean()
