"""Write the table of docs/models.md: sizes and arithmetic of the paper's tokenizers, ours and as published.

    python scripts/model_tables.py

Everything is counted on tensors without memory; tests/tokenizer/published.json has the published figures.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_fast import NestedAutoencoderKL
from cat_fast.config import fill, read_yaml
from cat_fast.training.models import build_model
from cat_fast.training.settings import TokenizerRun

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/models.md"
PUBLISHED = json.loads((ROOT / "tests/tokenizer/published.json").read_text(encoding="utf-8"))
IMAGENET_MIX = {8: 0.06, 16: 0.49, 32: 0.45}
"""Shares of the ratios that the paper's thresholds give on ImageNet."""


def main() -> None:
    """Replace the table in place."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split("<!-- tokenizers -->\n")
    after = rest.split("<!-- end -->")[1]
    DOCUMENT.write_text(f"{before}<!-- tokenizers -->\n{table()}<!-- end -->{after}", encoding="utf-8")


def table() -> str:
    """A row a configuration."""
    header = ("configuration", "parameters, M", "published", "", "GMAC by ratio", "mean", "published", "")
    rows: list[Sequence[str]] = [header, ["---"] * len(header)]
    for name, row in PUBLISHED["rows"].items():
        if "parameters" in row:
            rows.append(describe(name, row["parameters"], PUBLISHED["gmac_imagenet"].get(name)))
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def describe(name: str, published_parameters: int, published_gmac: float | None) -> Sequence[str]:
    """Of one configuration: parameters, and multiply-accumulates of coding one picture of 512 px."""
    config = fill(TokenizerRun, read_yaml(ROOT / f"configs/tokenizer/{name}.yaml"), [])
    with torch.device("meta"):
        model = build_model(NestedAutoencoderKL, config.model)
    parameters = sum(p.numel() for p in model.parameters())
    gmac = {ratio: multiply_accumulates(model, ratio) / 1e9 for ratio in model.ratios}
    mean = gmac[model.ratios[0]] if len(gmac) == 1 else weighted(gmac, IMAGENET_MIX)
    return (
        f"`{name}`",
        f"{parameters / 1e6:.2f}",
        f"{published_parameters / 1e6:g}",
        f"{parameters / published_parameters - 1:+.1%}",
        ", ".join(f"{ratio}x {value:.0f}" for ratio, value in gmac.items()),
        f"{mean:.0f}",
        f"{published_gmac:g}" if published_gmac else "",
        f"{mean / published_gmac - 1:+.0%}" if published_gmac else "",
    )


def multiply_accumulates(model: Any, ratio: int, side: int = 512) -> float:
    """Of encoding and decoding one picture: half of what torch counts as FLOPs."""
    picture = torch.empty(1, 3, side, side, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(picture, ratio, sample_posterior=False)
    return counter.get_total_flops() / 2


def weighted(values: Mapping[int, float], shares: Mapping[int, float]) -> float:
    return sum(values[key] * share for key, share in shares.items())


if __name__ == "__main__":
    main()
