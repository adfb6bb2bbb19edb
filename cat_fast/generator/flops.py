"""FLOPs of a diffusion transformer, counted by torch on the meta device; a multiply-accumulate is two."""

from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.generator.dit import DiT
from cat_fast.generator.packed_text import PackedText
from cat_fast.packing import PackedSequence

META = torch.device("meta")
LINEAR_OPERATORS = (torch.ops.aten.mm, torch.ops.aten.addmm)
"""Operators that linear layers dispatch to; attention uses others."""


class ForwardFlops:
    """FLOPs of a forward pass over one sequence and its text."""

    def __init__(self, model: DiT) -> None:
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        with META:
            self._model = DiT(**config).eval()
        self._count = cache(self._counted)

    def of(self, length: int, text_length: int = 0) -> int:
        """Return the FLOPs of a sequence of `length` tokens with a text of `text_length` tokens."""
        alone = self._count(length, 0)
        if text_length == 0:
            return alone
        return alone + text_length * (self._count(length, 1) - alone)  # every text token costs the same

    def _counted(self, length: int, text_length: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            predict_on_meta(self._model, length, text_length)
        return counter.get_total_flops()


_COUNTERS: "WeakKeyDictionary[DiT, ForwardFlops]" = WeakKeyDictionary()


def forward_flops(model: DiT) -> ForwardFlops:
    """Return the counter of a model; a model has one, which keeps its counts."""
    if model not in _COUNTERS:
        _COUNTERS[model] = ForwardFlops(model)
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
