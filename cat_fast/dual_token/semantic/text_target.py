"""Text encoders whose states the reverse Q-Former predicts: the frozen condition of a diffusion model.

Two kinds: that of a Stable Diffusion folder, which pads every text to 77 states, and that of this package's
pipelines, which has as many states as the text has tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel

from cat_fast.errors import UserError, first_line
from cat_fast.generator.text_cache import TextCache
from cat_fast.generator.text_encoder import TextEncoder, no_progress_bars
from cat_fast.weights.fingerprint import fingerprint
from cat_fast.weights.shipped import shipped_folder

_CACHE_BYTES = 512 << 20


class TextTarget(Protocol):
    """A frozen text encoder."""

    @property
    def width(self) -> int:
        """Features of a state."""
        ...

    @property
    def num_states(self) -> int:
        """Maximum number of states of a text."""
        ...

    @property
    def variable_length(self) -> bool:
        """False if every text has `num_states` states."""
        ...

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the states (n, T) of each text; a text without characters has at least one state."""
        ...

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify the weights."""
        ...


class PipelineText:
    """`TextEncoder` of this package's pipelines.

    Args:
        encoder: the encoder.
        num_states: longer texts are truncated.
    """

    variable_length = True

    def __init__(self, encoder: TextEncoder, num_states: int) -> None:
        self.encoder = encoder
        self.num_states = min(num_states, encoder.max_tokens)
        encoder.max_tokens = self.num_states
        self._cache = TextCache(encoder, _CACHE_BYTES)

    @property
    def width(self) -> int:
        return self.encoder.dim

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        if empty := [i for i, text in enumerate(texts) if not text.strip()]:
            raise UserError(f"text {empty[0]}: expected a caption, got an empty text")
        return [part.tokens for part in self._cache(texts).split()]

    def fingerprint(self) -> str:
        return self.encoder.fingerprint()


class StableDiffusionText:
    """CLIP's text model of a Stable Diffusion folder, with texts padded to the model's length."""

    variable_length = False

    def __init__(self, folder: Path) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
            with no_progress_bars():
                model: Any = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: its text encoder cannot be loaded ({first_line(error)})") from error
        self.model = model.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_states(self) -> int:
        return self.model.config.max_position_embeddings

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> list[Tensor]:
        batch = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.num_states,
            return_tensors="pt",
        )
        # As in diffusers' StableDiffusionPipeline: without an attention mask, which is causal in any case.
        return list(self.model(batch["input_ids"].to(self.model.device)).last_hidden_state)

    def fingerprint(self) -> str:
        return fingerprint({"class": "CLIPTextModel"}, self.model.state_dict())


def open_text_target(name: str, num_states: int) -> TextTarget:
    """Return the text encoder of a diffusion model.

    Args:
        name: a pipeline of this package (a folder, or `nano`), a Stable Diffusion folder, or the name of a
            text encoder alone.
        num_states: maximum number of states, for encoders without a fixed one.

    Raises:
        UserError: it is missing, or its class is not supported.
    """
    folder = shipped_folder(name) or Path(name)
    index = folder / "model_index.json"
    if not index.is_file():
        return PipelineText(TextEncoder(name, download=False), num_states)
    try:
        found = json.loads(index.read_text(encoding="utf-8")).get("text_encoder")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{index}: not the index of a pipeline ({first_line(error)})") from error
    kind = found[1] if isinstance(found, list) and len(found) == 2 else None
    if kind == "CLIPTextModel":
        return StableDiffusionText(folder)
    if kind == "TextEncoder":
        return PipelineText(TextEncoder.from_pretrained(folder / "text_encoder"), num_states)
    raise UserError(
        f"{name}: expected a pipeline with a CLIPTextModel or a TextEncoder, got {kind or 'none'}"
    )
