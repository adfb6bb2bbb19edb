"""Reverse Q-Former: codes -> the states of a text encoder, as the condition of a diffusion model.

The paper's 77 generation embeddings are the states of Stable Diffusion's text encoder, which pads every text
to 77 tokens. Other encoders have as many states as the text has tokens. The model then predicts their number
first. Its queries depend on it, since texts end alike, wherever they end.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class ReverseQFormer(nn.Module):
    """Learned queries that see each other and all embeddings of an image.

    With a variable length, a query is the sum of a vector for its distance from the start of the text and one
    for that from the end, and queries see those up to the end only.

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
        width: int = config.hidden_size
        self.query_tokens = nn.Parameter(torch.randn(1, num_states, width) * 0.02)
        self.qformer = Blip2QFormerModel(config)
        self.out = nn.Linear(width, text_width)
        self.length = self.end_tokens = None
        if variable_length:
            source: int = config.encoder_hidden_size
            self.length = nn.Linear(source, num_states)
            self.end_tokens = nn.Parameter(torch.randn(num_states, width) * 0.02)

    def forward(self, embeddings: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return states (B, N, T) and, for variable lengths, logits (B, N) of the lengths 1 .. N.

        Args:
            embeddings: (B, L, D).
            lengths: (B,) int64, the number of states of each text; None for the most probable. States from
                there on have no meaning.
        """
        queries = self.query_tokens.expand(len(embeddings), -1, -1)
        if self.length is None or self.end_tokens is None:
            return self._states(queries, embeddings, None), None
        logits = self.length(embeddings.mean(1))
        if lengths is None:
            lengths = logits.argmax(1) + 1
        before_end = lengths[:, None] - 1 - torch.arange(queries.shape[1], device=lengths.device)
        queries = queries + self.end_tokens[before_end.clamp(min=0)]
        return self._states(queries, embeddings, (before_end >= 0).to(queries.dtype)), logits

    def _states(self, queries: Tensor, embeddings: Tensor, mask: Tensor | None) -> Tensor:
        output = self.qformer(query_embeds=queries, attention_mask=mask, encoder_hidden_states=embeddings)
        return self.out(output.last_hidden_state)


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
