"""Causal language model of transformers: loading, a cached common prefix, and greedy replies in batches."""

import copy
import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.cache_utils import DynamicLayer

from cat_fast.complexity.scorers.extras import import_extra
from cat_fast.complexity.scorers.language_model.replies import ModelReply, Token
from cat_fast.errors import UserError, one_line

_NUMBERS = {str(number) for number in range(11)}
_SPACES = "Ġ▁ "
"""Marks of a leading space in the vocabularies of BPE and SentencePiece."""
_SAMPLE = 16
"""Values per weight in the fingerprint."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CausalModel:
    """Causal language model with its tokenizer.

    Prompts are batched with padding after the cached prefix, where attention ignores it, so that positions
    are those of each prompt alone.
    """

    def __init__(self, model: str | Path, device: str | None, dtype: str | torch.dtype | None) -> None:
        """Load the model in evaluation mode; see `TransformersScorer` for the arguments.

        Raises:
            UserError: the device or dtype is not valid, or the model cannot be loaded.
        """
        self.device = _device(device)
        self._model, self._tokenizer = _load(model, self.device, dtype)
        end = self._model.generation_config.eos_token_id
        ends = {*(end if isinstance(end, list) else [end]), self._tokenizer.eos_token_id} - {None}
        self._ends = sorted(ends)
        pad = self._tokenizer.pad_token_id
        self._pad = pad if pad is not None else self._ends[0] if self._ends else 0
        # Penalties and sampling of the published configuration would change the scores.
        self._model.generation_config = GenerationConfig()
        vocabulary = self._tokenizer.get_vocab()
        numbers = [(index, token) for token, index in vocabulary.items() if token.lstrip(_SPACES) in _NUMBERS]
        self._number_ids = torch.tensor([index for index, _ in numbers], device=self.device)
        self._number_texts = [_visible(token) for _, token in numbers]
        self._prefix: list[int] = []
        self._states: DynamicCache | None = None

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens; None if the configuration does not limit it."""
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def chat(self, text: str) -> str:
        """Return a prompt as a user's message in the model's chat template, if it has one.

        Raises:
            UserError: the template cannot be rendered.
        """
        if not self._tokenizer.chat_template:
            return text
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        except Exception as error:  # templates are programs
            raise UserError(f"the model's chat template cannot be rendered ({one_line(error)})") from error

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt from `chat`."""
        special = not self._tokenizer.chat_template  # a template contains its special tokens
        return self._tokenizer(text, add_special_tokens=special)["input_ids"]

    def share_prefix(self, first: Sequence[int], second: Sequence[int]) -> None:
        """Compute the states of the common start of two prompts once, for all prompts that share it.

        Models whose states are not plain keys and values, such as recurrent ones, compute every prompt in
        full.
        """
        length = 0
        while length < min(len(first), len(second)) - 1 and first[length] == second[length]:
            length += 1
        parameters = inspect.signature(self._model.forward).parameters
        if not length or "past_key_values" not in parameters or "position_ids" not in parameters:
            return
        options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        ids = torch.tensor([first[:length]], device=self.device)
        with torch.no_grad():
            states = self._model(input_ids=ids, use_cache=True, **options).past_key_values
        if type(states) is DynamicCache and all(type(layer) is DynamicLayer for layer in states.layers):
            self._prefix, self._states = list(first[:length]), states

    @property
    def prefix_length(self) -> int:
        """Number of tokens whose states are reused."""
        return len(self._prefix)

    def reply_many(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[ModelReply]:
        """Return the greedy reply to each prompt, with the probabilities of all tokens that are numbers.

        Raises:
            UserError: the batch does not fit in memory.
        """
        start = len(self._prefix)
        if any(list(prompt[:start]) != self._prefix or len(prompt) == start for prompt in prompts):
            start = 0
        width = max(map(len, prompts))
        ids = [[*p[:start], *[self._pad] * (width - len(p)), *p[start:]] for p in prompts]
        mask = [[1] * start + [0] * (width - len(p)) + [1] * (len(p) - start) for p in prompts]
        recorder = _Recorder(self._number_ids)
        options: dict[str, Any] = {}
        if start:
            assert self._states is not None
            states = copy.deepcopy(self._states)
            states.batch_repeat_interleave(len(prompts))
            options["past_key_values"] = states
        try:
            with torch.no_grad():
                output = self._model.generate(
                    input_ids=torch.tensor(ids, device=self.device),
                    attention_mask=torch.tensor(mask, device=self.device),
                    generation_config=GenerationConfig(
                        do_sample=False,
                        num_beams=1,
                        max_new_tokens=max_new_tokens,
                        eos_token_id=self._ends or None,
                        pad_token_id=self._pad,
                        use_cache=True,
                    ),
                    logits_processor=LogitsProcessorList([recorder]),
                    **options,
                )
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory with {len(prompts)} captions; lower the batch size") from error
        probabilities = torch.stack(recorder.steps, dim=1).exp().tolist()
        return [
            self._reply(row[width:], steps) for row, steps in zip(output.tolist(), probabilities, strict=True)
        ]

    def fingerprint(self) -> str:
        """Return a hash of dtype, tokenizer, and every weight's sum of bit patterns and some values."""
        digest = hashlib.sha256(f"{self._model.dtype}\0{self._tokenizer.chat_template}".encode())
        digest.update(repr(sorted(self._tokenizer.get_vocab().items())).encode())
        for name, weight in sorted(self._model.state_dict().items()):
            bits = weight.contiguous().flatten().view(_BITS[weight.element_size()])
            values = bits[:: max(len(bits) // _SAMPLE, 1)].tolist()
            total = int(bits.sum(dtype=torch.int64))  # of integers, so that it does not depend on the order
            digest.update(f"{name} {tuple(weight.shape)} {total} {values}".encode())
        return digest.hexdigest()

    def _reply(self, ids: list[int], steps: list[list[float]]) -> ModelReply:
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
        return ModelReply(texts[-1], tokens)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Recorder(LogitsProcessor):
    """Records log-probabilities per step: those of given tokens, and the largest one, the chosen token's."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        log_probabilities = scores.float().log_softmax(-1)
        largest = log_probabilities.amax(-1, keepdim=True)
        self.steps.append(torch.cat([log_probabilities[:, self._ids], largest], dim=1).cpu())
        return scores


def _load(model: str | Path, device: torch.device, dtype: str | torch.dtype | None) -> tuple[Any, Any]:
    path = Path(model)
    source, options = str(model), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{path}: no such GGUF file")
        import_extra("gguf", "gguf", "llm", str(path))
        source, options = str(path.parent), {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=_dtype(dtype, device), **options)
        return loaded.to(device).eval(), tokenizer
    except torch.OutOfMemoryError as error:
        raise UserError(f"{model}: the model does not fit in the memory of {device}") from error
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{model}: not a causal language model that transformers can load ({one_line(error)[:300]})"
        ) from error


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({one_line(error)[:200]}); try cpu") from error
    return device


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise UserError(f"expected a dtype such as bfloat16, got {dtype!r}")
    return value


def _visible(token: str) -> str:
    text = token.lstrip(_SPACES)
    return " " + text if text != token else text
