"""Causal language model of transformers: loading, a cached common prefix, and greedy replies in batches."""

import copy
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
    LogitsProcessorList,
)
from transformers.cache_utils import DynamicLayer

from cat_fast.complexity.extras import import_extra
from cat_fast.complexity.scorers.language_model.generated_tokens import ReplyReader
from cat_fast.complexity.scorers.language_model.loading import choose_device, choose_dtype, fingerprint
from cat_fast.complexity.scorers.language_model.replies import ModelReply
from cat_fast.errors import UserError, one_line


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
        self.device = choose_device(device)
        self._model, self._tokenizer = _load(model, self.device, dtype)
        end = self._model.generation_config.eos_token_id
        ends = {*(end if isinstance(end, list) else [end]), self._tokenizer.eos_token_id} - {None}
        self._ends = sorted(ends)
        pad = self._tokenizer.pad_token_id
        self._pad = pad if pad is not None else self._ends[0] if self._ends else 0
        # Penalties and sampling of the published configuration would change the scores.
        self._model.generation_config = GenerationConfig()
        self._reader = ReplyReader(self._tokenizer, self._ends, self.device)
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
        recorder = self._reader.recorder()
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
        return self._reader.read([row[width:] for row in output.tolist()], recorder)

    def fingerprint(self) -> str:
        """Return a hash of dtype, tokenizer, and every weight's sum of bit patterns and some values."""
        return fingerprint(self._model, self._tokenizer, self._tokenizer.chat_template)


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
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=choose_dtype(dtype, device), **options
        )
        return loaded.to(device).eval(), tokenizer
    except torch.OutOfMemoryError as error:
        raise UserError(f"{model}: the model does not fit in the memory of {device}") from error
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{model}: not a causal language model that transformers can load ({one_line(error)[:300]})"
        ) from error
