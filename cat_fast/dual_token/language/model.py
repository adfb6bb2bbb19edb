"""`DualLanguageModel`: an autoregressive transformer over the flat sequences of images, with text as prefix.

    [states of the caption, projected] begin semantic s1 ... guide height width g1 ... end

The transformer is transformers' Llama. Sequences are packed without padding: a block-causal mask keeps them
apart, and positions restart at each one, so that the loss of a pack is that of its sequences one by one.

Shapes: S sequences, L_s text states and n_s ids of sequence s, T = sum of L_s + n_s.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from cat_fast.dual_token.packed_ids import block_causal
from cat_fast.weights.checked_model import CheckedModel


class SequenceLosses(NamedTuple):
    """Losses of packed sequences."""

    losses: Tensor
    """(P,) in nats: one per predicted id, all ids but the first of each sequence."""
    targets: Tensor
    """(P,): the predicted ids, counted from the vocabulary's offset."""
    owners: Tensor
    """(P,): number of the sequence."""


class DualLanguageModel(CheckedModel):
    """Llama over the ids of a `Vocabulary` without offset, after a projected caption.

    Args:
        vocab_size: number of ids.
        hidden_size, intermediate_size, num_layers, num_heads: of the transformer.
        text_width: features of a text state.
        max_length: maximum number of text states and ids.
        text_fingerprint: identifies the text encoder.
        tokenizer_fingerprint: identifies the tokenizer whose sequences the model speaks.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 192,
        intermediate_size: int = 512,
        num_layers: int = 4,
        num_heads: int = 4,
        text_width: int = 384,
        max_length: int = 512,
        text_fingerprint: str | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=False,
        )
        self.llama = LlamaModel(config)
        self.prefix = nn.Linear(text_width, hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, sequences: Sequence[Sequence[int]], texts: Sequence[Tensor]) -> SequenceLosses:
        """Return the losses of packed sequences.

        Args:
            sequences: complete flat sequences of ids from 0.
            texts: text states (L, text_width) of each; (0, text_width) for none.
        """
        pieces, positions, owners = [], [], []
        for number, (sequence, text) in enumerate(zip(sequences, texts, strict=True)):
            embedded = self._embed(sequence, text)
            pieces.append(embedded)
            positions.append(torch.arange(len(embedded)))
            owners.append(torch.full((len(embedded),), number))
        owner = torch.cat(owners).to(self.device)
        hidden = self.llama(
            inputs_embeds=torch.cat(pieces)[None],
            attention_mask=_additive(block_causal(owner), pieces[0].dtype),
            position_ids=torch.cat(positions)[None].to(self.device),
            use_cache=False,
        ).last_hidden_state[0]
        # The state at an id predicts the next one; the last id of a sequence predicts nothing.
        places, targets, of = [], [], []
        start = 0
        for number, (sequence, text) in enumerate(zip(sequences, texts, strict=True)):
            first = start + len(text)
            places.append(torch.arange(first, first + len(sequence) - 1))
            targets.append(torch.tensor(sequence[1:]))
            of.append(torch.full((len(sequence) - 1,), number))
            start = first + len(sequence)
        target = torch.cat(targets).to(self.device)
        logits = self.head(hidden[torch.cat(places).to(self.device)]).float()
        losses = F.cross_entropy(logits, target, reduction="none")
        return SequenceLosses(losses, target, torch.cat(of).to(self.device))

    def _embed(self, sequence: Sequence[int], text: Tensor) -> Tensor:
        """Return the input vectors (L + n, hidden) of one sequence."""
        ids = torch.tensor(list(sequence), device=self.device)
        states = self.prefix(text.to(self.device, self.prefix.weight.dtype))
        return torch.cat([states, self.llama.embed_tokens(ids)])


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask (1, 1, T, T) to add to scores: 0 where a position is visible."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[None, None]
