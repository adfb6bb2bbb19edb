"""Replies from generated tokens, with the probabilities of all tokens that are numbers."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

from cat_fast.complexity.scorers.language_model.replies import ModelReply, Token

_NUMBERS = {str(number) for number in range(11)}
_SPACES = "Ġ▁ "
"""Marks of a leading space in the vocabularies of BPE and SentencePiece."""


class ReplyReader:
    """Reads replies from the tokens that a model generated.

    Args:
        tokenizer: the model's.
        ends: tokens that end a reply.
        device: device of the logits.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int], device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._ends = set(ends)
        vocabulary = tokenizer.get_vocab()
        numbers = [(index, token) for token, index in vocabulary.items() if token.lstrip(_SPACES) in _NUMBERS]
        self._number_ids = torch.tensor([index for index, _ in numbers], dtype=torch.long, device=device)
        self._number_texts = [_visible(token) for _, token in numbers]

    def recorder(self) -> "ProbabilityRecorder":
        """Return a logits processor for one call of `generate`, to be passed to `read`."""
        return ProbabilityRecorder(self._number_ids)

    def read(self, rows: Sequence[Sequence[int]], recorder: "ProbabilityRecorder") -> list[ModelReply]:
        """Return the replies of a batch, given the generated tokens of each without its prompt."""
        probabilities = torch.stack(recorder.steps, dim=1).exp().tolist()
        return [self._reply(row, steps) for row, steps in zip(rows, probabilities, strict=True)]

    def _reply(self, ids: Sequence[int], steps: Sequence[Sequence[float]]) -> ModelReply:
        length = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))
        texts = [self._decode(ids[:end]) for end in range(length + 1)]
        tokens = []
        for before, after, row in zip(texts, texts[1:], steps, strict=False):
            alternatives: dict[str, float] = {}
            for text, probability in zip(self._number_texts, row, strict=False):
                alternatives[text] = alternatives.get(text, 0.0) + probability
            own = after[len(before) :]
            alternatives.setdefault(own, row[-1])
            tokens.append(Token(own, alternatives))
        return ModelReply(texts[-1], tokens, length < len(ids))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class ProbabilityRecorder(LogitsProcessor):
    """Records log-probabilities per step: those of given tokens, and the largest one, the chosen token's."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        log_probabilities = scores.float().log_softmax(-1)
        largest = log_probabilities.amax(-1, keepdim=True)
        self.steps.append(torch.cat([log_probabilities[:, self._ids], largest], dim=1).cpu())
        return scores


def _visible(token: str) -> str:
    text = token.lstrip(_SPACES)
    return " " + text if text != token else text
