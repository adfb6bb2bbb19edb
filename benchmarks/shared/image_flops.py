"""FLOPs per image of a DiT, split into linear layers and attention, and the published figures.

A multiply-accumulate is two FLOPs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.shared.configs import CONFIGS
from benchmarks.shared.mixes import SHARES, TOKENS
from cat_fast.config import read_yaml
from cat_fast.training.metrics.flops import DiTFlops

FIXED = TOKENS[16]
"""Tokens per image of 512 px at 16x."""
UNIT = "FLOPs of the forward and backward pass, 2 per multiply-accumulate"
PUBLISHED = {
    "flops_relative_to_fixed16": {
        "published": 0.82,
        "mix": "208",
        "why": "The mix of LLaVA's scores on ImageNet, 2 / 65 / 33 % at 8x / 16x / 32x, costs 0.819 of the "
        "FLOPs of a fixed 16x. The 216 tokens published next to it are those of 6 / 49 / 45 %, which costs "
        "0.865.",
    },
    "forward_tflops_of_an_image_at_16x": {
        "published": 22.0,
        "mix": "fixed16",
        "why": "A forward pass of cat_xl on an image at 16x is 0.21995 TFLOPs (219.95 GFLOPs, 109.97 GMACs): "
        "the published figure has a slipped unit.",
    },
    "images_per_second_at_inference": {
        "published": 1.185,
        "mix": "216",
        "why": "It is 256 / 216, the ratio of tokens; by FLOPs it is images_at_equal_flops.",
    },
    "throughput_of_training": {
        "published": 1.23,
        "mix": "197",
        "why": "It is 1 + (1 - 197.44 / 256): 23 % fewer tokens read as 23 % more images. As many tokens "
        "hold 256 / 197.44 = 1.297 times as many images; by FLOPs it is images_at_equal_flops.",
    },
}
TEXT_DIM = 384
"""Width of the states of all-MiniLM-L6-v2, the text encoder of the presets with text."""


def count_presets() -> dict[str, dict[str, Any]]:
    """Return `count_preset` of every file in configs/generator; ratios do not matter, texts are empty."""
    found: dict[str, dict[str, Any]] = {}
    counted: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for path in sorted((CONFIGS / "generator").glob("*.yaml")):
        values = read_yaml(path)
        arguments = values["model"]
        arguments.pop("ratios", None)
        if values.get("text_encoder"):
            arguments["text_dim"] = TEXT_DIM
        known = [result for others, result in counted if others == arguments]
        found[path.stem] = known[0] if known else count_preset(arguments)
        counted.append((arguments, found[path.stem]))
    return found


def count_preset(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Count FLOPs of training on an image at 16x, and the mean per image of each mix relative to it.

    Includes forward and backward; a forward pass is a third of both parts.
    """
    flops = DiTFlops(dict(arguments))
    fixed = flops.sequence_flops(FIXED)
    total = sum(fixed.values())
    found: dict[str, Any] = {"unit": UNIT, "fixed16": fixed}
    for name, shares in SHARES.items():
        mean = {
            part: sum(share * flops.sequence_flops(TOKENS[ratio])[part] for ratio, share in shares.items())
            for part in fixed
        }
        found[name] = {
            **{part: mean[part] / fixed[part] for part in fixed},
            "total": sum(mean.values()) / total,
            "images_at_equal_flops": total / sum(mean.values()),
        }
    return found


def lines(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield lines of text; presets with equal costs share their lines."""
    alike: dict[str, list[str]] = {}
    for preset, by_mix in found.items():
        alike.setdefault(repr(by_mix), []).append(preset)
    for presets in alike.values():
        for mix in SHARES:
            one = found[presets[0]][mix]
            yield (
                f"{', '.join(presets)}; mix {mix}: {one['total']:.3f} of the FLOPs of an image at fixed 16x "
                f"(linear {one['linear']:.3f}, attention {one['attention']:.3f})"
            )
    for name, one in PUBLISHED.items():
        yield f"published {name}: {one['published']}. {one['why']}"
