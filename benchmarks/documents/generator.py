"""Tables of docs/generator.md: sizes, multiply-accumulates and speed of the DiT.

Sizes and work are counted on the meta device and listed with the published figures of
tests/generator/published.json; speed comes from the results of benchmarks/packing.py.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.documents import tables
from benchmarks.shared.configs import generator_run
from cat_fast.generator import DiT
from cat_fast.generator.flops import predict_on_meta, split_flops
from cat_fast.models.build import build_model
from cat_fast.training.metrics.flops import token_count

DOCUMENT = tables.ROOT / "docs/generator.md"
PUBLISHED = json.loads((tables.ROOT / "tests/generator/published.json").read_text(encoding="utf-8"))
ORIGINAL = PUBLISHED["original"]["rows"]
CONFIGURATIONS = ("cat_xl", *ORIGINAL)
RATIOS = (8, 16, 32)
SIDE = 512
RIVALS = ("padded", "dense_mask", "bucketed", "fixed16")
SIZES: Mapping[str, Mapping[str, Any]] = {
    "`cat_xl`": {},
    "with 28 blocks": {"depth": 28},
    "with 28 blocks, one modulation per block": {"depth": 28, "shared_adaln": False},
    "with `qk_norm`, `rope` and `swiglu`": {"qk_norm": True, "rope": True, "swiglu": True},
    "with text of width 768": {"text_dim": 768},
}


def filled(text: str) -> str:
    """Return the document with updated tables."""
    return tables.fill(text, {"presets": presets(), "sizes": sizes(), "mixes": mixes(), "speed": speed()})


def presets() -> str:
    """Return one row per configuration: parameters, multiply-accumulates per ratio (linear + attention)."""
    forward = (*(f"{r}x" for r in RATIOS), "16x, total", "published for 256 tokens")
    header = ("configuration", "blocks × width", "parameters, M", "published", *forward)
    rows = []
    for name in CONFIGURATIONS:
        model = built(name)
        published = ORIGINAL[name]["parameters"] if name in ORIGINAL else PUBLISHED["parameters"]
        shape = f"{model.config.depth} × {model.config.hidden_size}"
        gmac = ["{:.2f} + {:.2f} GMAC".format(*work(model, ratio)) for ratio in RATIOS]
        gmac.append(f"{2 * sum(work(model, 16)):.2f} GFLOP")
        gmac.append(
            f"{ORIGINAL[name]['gmac']:g} GMAC" if name in ORIGINAL else f"{PUBLISHED['tflops']:.1f} TFLOPs"
        )
        rows.append((f"`{name}`", shape, f"{parameters(model):.2f}", f"{published / 1e6:g}", *gmac))
    return tables.markdown(header, rows)


def sizes() -> str:
    """Return the effect of depth and options on the size of cat_xl."""
    rows = []
    for label, changes in SIZES.items():
        count = parameters(built("cat_xl", **changes))
        rows.append((label, f"{count:.2f}", f"{count * 1e6 / PUBLISHED['parameters'] - 1:+.1%}"))
    return tables.markdown(("model", "parameters, M", "against 431 M"), rows)


def mixes() -> str:
    """Return the mean work per image relative to one at 16x, per configuration and mix of ratios."""
    relative = PUBLISHED["flops_relative_to_fixed_16x"]
    rows = []
    for label, shares in relative["mixes"].items():
        tokens = sum(share * token_count(ratio, SIDE) for share, ratio in zip(shares, RATIOS, strict=True))
        mix = " / ".join(f"{share:.0%}" for share in shares)
        published = f"{relative[label]:g}" if label in relative else ""
        ratios = [f"{relative_work(built(name), shares):.3f} of FLOPs" for name in CONFIGURATIONS]
        rows.append((f"{label}, {mix}", f"{tokens:.1f}", f"{tokens / 256:.3f}", *ratios, published))
    names = [f"`{name}`" for name in CONFIGURATIONS]
    header = ("mix at 8x / 16x / 32x", "tokens", "of 256", *names, "published, of FLOPs")
    return tables.markdown(header, rows)


def speed() -> str:
    """Return the speed-up of training on packed images in images per second, by mix and baseline."""
    measured = tables.results("packing")
    rows = []
    for mix, case in measured["cases"].items():
        ratios = {rival: f"{spread['median']:.2f}" for rival, spread in case["ratios"].items()}
        ratios["fixed16"] += f" ({case['of_expected']['fixed16']:.0%})"
        mean = f"{mix} tokens: {' / '.join(str(n) for n in case['details']['images'].values())}"
        shown = (ratios.get(rival, "") for rival in RIVALS)
        rows.append((mean, f"{case['rates']['images']:.1f}", *shown))
    rivals = ("padded with a mask", "dense block mask", "bucketed by ratio", "16x (of the expected)")
    return tables.markdown(("mix, images per batch at 8x / 16x / 32x", "images/s", *rivals), rows)


def relative_work(model: DiT, shares: list[float]) -> float:
    total = {ratio: sum(work(model, ratio)) for ratio in RATIOS}
    return sum(share * total[ratio] for share, ratio in zip(shares, RATIOS, strict=True)) / total[16]


def built(name: str, **changes: Any) -> DiT:
    config = generator_run(name)
    with torch.device("meta"):
        return build_model(DiT, config.model | changes)


def parameters(model: DiT) -> float:
    """Return the number of parameters in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def work(model: DiT, ratio: int) -> tuple[float, float]:
    """Return 10^9 multiply-accumulates of one image's forward pass: linear layers, attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict_on_meta(model, int(token_count(ratio, SIDE)))
    flops = split_flops(counter)
    return flops["linear"] / 2e9, flops["attention"] / 2e9
