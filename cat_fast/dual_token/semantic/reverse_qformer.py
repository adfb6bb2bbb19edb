"""Reverse Q-Former: codes -> the states of a text encoder, as the condition of a diffusion model.

The paper's 77 generation embeddings are the states of Stable Diffusion's text encoder, which pads every text
to 77 tokens. Other encoders have as many states as the text has tokens. The model then also predicts their
number.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class ReverseQFormer(nn.Module):
    """Learned queries that see each other and all embeddings of an image.

    Args:
        config: of the Q-Former; `encoder_hidden_size` is the width of the decoded causal embeddings.
        num_states: number of queries, the maximum number of states.
        text_width: features of a state.
        variable_length: predict the number of states.
    """

    def __init__(
        self, config: Blip2QFormerConfig, num_states: int, text_width: int, variable_length: bool
    ) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, num_states, config.hidden_size) * 0.02)
        self.qformer = Blip2QFormerModel(config)
        self.out = nn.Linear(config.hidden_size, text_width)
        self.length = nn.Linear(config.hidden_size, num_states) if variable_length else None

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return states (B, N, T) and, for variable lengths, logits (B, N) of the lengths 1 .. N.

        Args:
            embeddings: (B, L, D).
        """
        queries = self.query_tokens.expand(len(embeddings), -1, -1)
        hidden = self.qformer(query_embeds=queries, encoder_hidden_states=embeddings).last_hidden_state
        lengths = None if self.length is None else self.length(hidden.mean(1))
        return self.out(hidden), lengths


def state_loss(
    states: Tensor, lengths: Tensor | None, targets: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean squared error to the true states (equation 8), the cross-entropy of the number of
    states, 0 for a fixed one, and the mean cosine similarity of the states.

    Args:
        states: (B, N, T).
        lengths: (B, N) logits, or None.
        targets: B texts of (n, T), n at most N; N each for a fixed length.
    """
    count, width = states.shape[1:]
    padded = torch.stack([F.pad(target, (0, 0, 0, count - len(target))) for target in targets]).to(states)
    sizes = torch.tensor([len(target) for target in targets], device=states.device)
    real = torch.arange(count, device=states.device) < sizes[:, None]
    error = (states.float() - padded.float()).square().sum(-1)
    # Images weigh alike, whatever the length of their texts.
    per_image = (error * real).sum(1) / (sizes * width)
    similarity = F.cosine_similarity(states.float(), padded.float(), dim=-1)
    cosine = ((similarity * real).sum(1) / sizes).mean()
    entropy = error.new_zeros(()) if lengths is None else F.cross_entropy(lengths.float(), sizes - 1)
    return per_image.mean(), entropy, cosine.detach()
