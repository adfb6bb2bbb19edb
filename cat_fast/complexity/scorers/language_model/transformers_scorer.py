"""Scorer that runs a causal language model with transformers, on any of its devices."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from cat_fast.complexity.description import Description
from cat_fast.complexity.prompt import Prompt
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration
from cat_fast.complexity.scorers.language_model.causal_model import CausalModel
from cat_fast.complexity.scorers.language_model.replies import ModelReply, Token, read_score
from cat_fast.complexity.scorers.language_model.versions import calibrated_version, scorer_version
from cat_fast.errors import UserError, one_line

if TYPE_CHECKING:
    import torch

MAX_PROMPT_TOKENS = 16384
"""Longest prompt, also if the model accepts more: attention takes quadratic memory."""
_BATCH_TOKENS = 16384
"""Most tokens after the common prefix in a batch, padding included."""
_BEGIN = "Score:"
"""Start of the reply that a model is given if its own reply contains no valid score."""
_NUMBER_TOKENS = 6
"""Length of the rest of such a reply."""
_NUMBER = re.compile(r"[\s*_]*[0-9]+")
_PROBES = Description("a cat"), Description("The sea", has_text=True)


class TransformersScorer:
    """Causal language model of transformers that scores by the rubric, with greedy decoding.

    Scores depend on the caption alone, up to rounding errors that depend on the other captions of a batch;
    with `batch_size=1` they do not depend on them at all.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        prompt: Prompt | None = None,
        scale: int = 9,
        device: str | None = None,
        dtype: "str | torch.dtype | None" = None,
        batch_size: int = 16,
        max_new_tokens: int = 48,
        calibration: ScoreCalibration | None = None,
    ) -> None:
        """Load the model and compute the states of the prompt's common start.

        Args:
            model: folder, name on the Hugging Face hub, or GGUF file, which needs the extra `llm`. Code of
                the model's authors is not run.
            prompt: by default the rubric for `scale`.
            scale: highest score of the prompt, 9 or 10.
            device: by default CUDA if available, else the CPU.
            dtype: such as "bfloat16". Default: that of the weights; float32 on the CPU.
            batch_size: captions per forward pass; lower it if you run out of memory.
            max_new_tokens: length of a reply, score and reasons.
            calibration: fitted for this model, prompt and scale.

        Raises:
            UserError: an argument is not valid, or the model cannot be loaded.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.prompt = prompt if prompt is not None else Prompt.default(scale)
        scorer_version(
            "", self.prompt, scale, max_new_tokens
        )  # refuses its arguments before a model is loaded
        self.scale = scale
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self._model = CausalModel(model, device, dtype)
        first, second = (self._model.encode(self._text(probe)) for probe in _PROBES)
        self._limit = min(self._model.context or MAX_PROMPT_TOKENS, MAX_PROMPT_TOKENS) - max_new_tokens
        if len(first) > self._limit:
            raise UserError(f"{model}: the prompt has {len(first)} tokens, more than the model's context")
        self._model.share_prefix(first, second)
        self.name = f"llm:{Path(model).name if Path(model).exists() else model}"
        self.version = scorer_version(self._model.fingerprint(), self.prompt, scale, max_new_tokens)
        self._calibration = calibration
        if calibration:
            calibration.check(self.name, self.version)
            self.version = calibrated_version(self.version, calibration)

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        """Score each description, in order.

        A description whose reply contains no valid score is tried once more with the form of the reply
        given: "Score:", a number by the model, " out of 9". If the model continues with anything else, or if
        a prompt exceeds the model's context, the result is a `ScoringFailure`.

        Raises:
            UserError: a batch does not fit in memory.
        """
        texts = dict(enumerate(map(self._text, descriptions)))
        results, invalid = self._attempt(texts, "")
        again, failed = self._attempt({i: texts[i] for i in invalid}, _BEGIN)
        results |= again | {i: ScoringFailure(error) for i, error in failed.items()}
        return [results[i] for i in range(len(descriptions))]

    def _text(self, description: Description) -> str:
        return self._model.chat(self.prompt.render(description))

    def _attempt(
        self, texts: Mapping[int, str], begin: str
    ) -> tuple[dict[int, Score | ScoringFailure], dict[int, str]]:
        """Return the results of texts whose replies start with `begin`, and the errors of invalid replies."""
        results: dict[int, Score | ScoringFailure] = {}
        invalid: dict[int, str] = {}
        prompts = {i: self._model.encode(text + begin) for i, text in texts.items()}
        for i in [i for i, ids in prompts.items() if len(ids) > self._limit]:
            results[i] = ScoringFailure(
                f"the prompt has {len(prompts.pop(i))} tokens, but at most {self._limit} are supported;"
                " shorten the caption"
            )
        for batch in self._batches(prompts):
            length = _NUMBER_TOKENS if begin else self.max_new_tokens
            replies = self._model.reply_many([prompts[i] for i in batch], length)
            for i, reply in zip(batch, replies, strict=True):
                reply = self._complete(reply) if begin else reply
                try:
                    results[i] = read_score(reply, self.scale, self._calibration)
                except UserError as error:
                    invalid[i] = one_line(error)
        return results, invalid

    def _complete(self, reply: ModelReply) -> ModelReply:
        """Return a reply to a prompt that ends with `_BEGIN`, in the required form if it is a number."""
        number = _NUMBER.match(reply.text)
        if not number:
            return ModelReply(_BEGIN + reply.text)
        ends = list(accumulate(len(token.text) for token in reply.tokens))
        used = bisect_left(ends, number.end()) + 2  # the next token shows whether a 1 becomes 10
        text = f"{_BEGIN}{number[0]} out of {self.scale}"
        return ModelReply(text, [Token(_BEGIN, {_BEGIN: 1.0}), *reply.tokens[:used]])

    def _batches(self, prompts: Mapping[int, Sequence[int]]) -> Iterator[list[int]]:
        """Yield batches of prompts of similar length, in the order of length."""
        batch: list[int] = []
        for i in sorted(prompts, key=lambda i: len(prompts[i])):
            tokens = len(prompts[i]) - self._model.prefix_length
            if batch and (len(batch) == self.batch_size or (len(batch) + 1) * tokens > _BATCH_TOKENS):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch
