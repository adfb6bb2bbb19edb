"""`TextEncoder`: a frozen language model of transformers that turns descriptions into `PackedText`."""

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

from cat_fast.errors import UserError
from cat_fast.generator.packed_text import PackedText


class TextEncoder:
    """Texts -> the last hidden states of their tokens, without padding, without gradients.

    Encoders such as T5 and BERT and the text half of CLIP; of models with a decoder, only the encoder runs.

    Args:
        name_or_folder: a model on the Hugging Face hub, or a folder with one and its tokenizer.
        max_tokens: longer texts are cut off, here or where the model's own limit is lower.

    Raises:
        UserError: there is no such model, or one without a tokenizer.
    """

    def __init__(self, name_or_folder: str | os.PathLike[str], *, max_tokens: int = 128) -> None:
        name = os.fspath(name_or_folder)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self.model: Any = _load(name).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise UserError(f"text encoder {name!r}: {str(error).strip().splitlines()[0]}") from error
        self.max_tokens = min(max_tokens, self.tokenizer.model_max_length)

    @property
    def dim(self) -> int:
        """Width of its tokens: the generator's `text_dim`."""
        return self.model.config.hidden_size

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the model; texts are encoded there and in that dtype."""
        self.model.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> PackedText:
        """One text for each, on the model's device; the empty text has no tokens and is the null text.

        Raises:
            UserError: no texts.
        """
        if not texts:
            raise UserError("no texts to encode: expected at least one, which may be empty")
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        real = batch["attention_mask"].bool()
        ids, mask = (batch[key].to(self.model.device) for key in ("input_ids", "attention_mask"))
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = real & torch.tensor([bool(text.strip()) for text in texts])[:, None]
        lengths = kept.sum(1)
        return PackedText(
            tokens=states[kept.to(states.device)],
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(
                states.device
            ),
            max_seqlen=int(lengths.max()),
        )


def _load(name: str) -> Any:
    if AutoConfig.from_pretrained(name).model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        return AutoModelForTextEncoding.from_pretrained(name)
    model: Any = AutoModel.from_pretrained(name)
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return getattr(model, "text_model", model)  # CLIP and its like
