"""Sampling of sequences among the ids that the grammar allows, so that every sequence decodes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cat_fast.dual_token.language.model import DualLanguageModel
from cat_fast.dual_token.sequence import Grammar, Vocabulary
from cat_fast.errors import UserError


@torch.no_grad()
def sample(
    model: DualLanguageModel,
    vocabulary: Vocabulary,
    text: Tensor,
    seed: int,
    *,
    grids: Sequence[tuple[int, int]] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    on_token: Callable[[], Any] = lambda: None,
) -> list[int]:
    """Return one valid sequence with all parts that the vocabulary has.

    Args:
        vocabulary: of the tokenizer, without offset.
        text: states (L, text_width) of the caption.
        seed: of the random numbers; the sequence is a function of it, the model and the text.
        grids: guide sizes to choose from; None for all that the vocabulary has.
        temperature: of the distribution; 0 takes the most probable id.
        top_k: number of most probable ids to sample from; 0 takes all.
        on_token: called after each id.

    Raises:
        UserError: another vocabulary, or a value out of its range.
    """
    if vocabulary.offset or len(vocabulary) != model.config["vocab_size"]:
        raise UserError(
            f"language model: expected a vocabulary of {model.config['vocab_size']} ids from 0, got"
            f" {len(vocabulary)} from {vocabulary.offset}; use the tokenizer it was trained with"
        )
    require_sampling(temperature, top_k)
    generator = torch.Generator().manual_seed(seed)
    grammar, ids = Grammar(vocabulary, grids, complete=True), [vocabulary.begin]
    grammar.advance(vocabulary.begin)
    embedded = model._embed(ids, text)[None]
    cache: Any = None
    limit = model.config["max_length"] - len(text)
    while not grammar.finished:
        if len(ids) >= limit:
            raise UserError(f"language model: sequences are limited to {limit} ids; choose smaller grids")
        output = model.llama(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = model.head(output.last_hidden_state[0, -1]).float().cpu()
        token = _draw(logits, grammar.allowed(), temperature, top_k, generator)
        grammar.advance(token)
        ids.append(token)
        on_token()
        embedded = model.llama.embed_tokens(torch.tensor([[token]], device=model.device))
    return ids


def require_sampling(temperature: float, top_k: int) -> None:
    """Check the options of `sample`.

    Raises:
        UserError: a value out of its range.
    """
    if not 0 <= temperature < math.inf:  # also for NaN
        raise UserError(f"temperature: expected a number of at least 0, got {temperature}")
    if top_k < 0:
        raise UserError(f"top_k: expected 0 or more, got {top_k}")


def _draw(
    logits: Tensor, allowed: Sequence[range], temperature: float, top_k: int, generator: torch.Generator
) -> int:
    masked = torch.full_like(logits, float("-inf"))
    for ids in allowed:
        masked[ids.start : ids.stop] = logits[ids.start : ids.stop]
    if temperature == 0:
        return int(masked.argmax())
    if top_k:
        smallest = masked.topk(min(top_k, len(masked))).values[-1]
        masked = masked.masked_fill(masked < smallest, float("-inf"))
    return int(torch.multinomial(torch.softmax(masked / temperature, 0), 1, generator=generator))
