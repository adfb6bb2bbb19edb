"""FLOPs of a diffusion transformer, counted by torch on the meta device; a multiply-accumulate is two."""

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.generator.dit import DiT
from cat_fast.generator.packed_text import PackedText
from cat_fast.packing import PackedSequence

META = torch.device("meta")
LINEAR_OPERATORS = (torch.ops.aten.mm, torch.ops.aten.addmm)
"""Operators that linear layers dispatch to; attention uses others."""


class SequenceFlops:
    """FLOPs of one sequence and its text, by formula from counts of up to three sequences.

    A count takes seconds for a large model. For n tokens with m text tokens, linear layers are affine in n
    and m, and attention is a n² + b n m + c n.
    """

    def __init__(self, model: DiT, *, training: bool) -> None:
        """`model` is on the meta device; `training` adds the backward pass."""
        self._model = model
        self._training = training

    def of(self, length: int, text_length: int = 0) -> int:
        """Return the FLOPs of a sequence of `length` tokens with a text of `text_length` tokens."""
        return sum(self.parts(length, text_length).values())

    def parts(self, length: int, text_length: int = 0) -> dict[str, int]:
        """Return the FLOPs of one sequence as `linear` and `attention`, which is quadratic in the tokens."""
        rates = self._rates
        return {
            "linear": rates.constant + rates.token * length + rates.text_token * text_length,
            "attention": (rates.pair * length + rates.text_pair * text_length + rates.lone) * length,
        }

    @cached_property
    def _rates(self) -> "_Rates":
        n, m = _COUNTED_TOKENS, _COUNTED_TEXT if self._model.config.text_dim is not None else 0
        first, longer = self._count(n, m), self._count(2 * n, m)
        token = (longer["linear"] - first["linear"]) // n
        pair = (longer["attention"] - 2 * first["attention"]) // (2 * n * n)
        text_token = text_pair = 0
        if m:
            wordy = self._count(n, 2 * m)
            text_token = (wordy["linear"] - first["linear"]) // m
            text_pair = (wordy["attention"] - first["attention"]) // (n * m)
        return _Rates(
            constant=first["linear"] - token * n - text_token * m,
            token=token,
            text_token=text_token,
            pair=pair,
            text_pair=text_pair,
            lone=first["attention"] // n - pair * n - text_pair * m,
        )

    def _count(self, length: int, text_length: int) -> dict[str, int]:
        with torch.set_grad_enabled(self._training), FlopCounterMode(display=False) as counter:
            prediction = predict_on_meta(self._model, length, text_length)
            if self._training:
                prediction.sum().backward()
        return split_flops(counter)


_COUNTED_TOKENS, _COUNTED_TEXT = 32, 16
"""Tokens and text tokens of the shortest sequence that is counted."""


@dataclass(frozen=True)
class _Rates:
    """FLOPs per sequence, token, text token, pair of tokens, and pair of a token and a text token.

    `lone` are those of a token's attention without tokens to attend to: it also attends to learned states.
    """

    constant: int
    token: int
    text_token: int
    pair: int
    text_pair: int
    lone: int


_COUNTERS: "WeakKeyDictionary[DiT, SequenceFlops]" = WeakKeyDictionary()


def forward_flops(model: DiT) -> SequenceFlops:
    """Return the FLOPs of a model's forward pass; a model is counted once."""
    if model not in _COUNTERS:
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        with META:
            _COUNTERS[model] = SequenceFlops(DiT(**config).eval(), training=False)
    return _COUNTERS[model]


def split_flops(counter: FlopCounterMode) -> dict[str, int]:
    """Return a counter's total for a diffusion transformer, split into `linear` and `attention`."""
    by_operator = counter.get_flop_counts()["Global"]
    linear = sum(by_operator[operator] for operator in LINEAR_OPERATORS if operator in by_operator)
    return {"linear": linear, "attention": counter.get_total_flops() - linear}


def predict_on_meta(model: DiT, length: int, text_length: int = 0) -> torch.Tensor:
    """Run a meta-device model on one sequence and its text; return the prediction, (length, C)."""
    config = model.config
    packed = PackedSequence(
        tokens=torch.empty(length, config.patch_size**2 * config.in_channels, device=META),
        cu_seqlens=torch.empty(2, dtype=torch.int32, device=META),
        grid=torch.empty(1, 2, dtype=torch.int32, device=META),
        ratio=torch.empty(1, dtype=torch.int32, device=META),
        max_seqlen=length,
    )
    text = None
    if config.text_dim is not None:
        tokens = torch.empty(text_length, config.text_dim, device=META)
        text = PackedText(tokens=tokens, cu_seqlens=packed.cu_seqlens, max_seqlen=text_length)
    one = torch.empty(1, dtype=torch.int64, device=META)
    return model(packed, one, one, text, return_dict=False)[0]
