"""Speed of the nested VAE at the paper's size, against the same network in diffusers' blocks.

    python benchmarks/autoencoder.py --json FILE [--quick] [--only TEXT]

Keys are <reading>.<ratio>x.<encode|decode>.ratio_vs_<stock>: `heads512` is the paper's literal reading of its
attention, 512 heads of one dimension, `heads1` one head of 512. Stock models have our weights, and their
outputs are compared with ours before anything is timed; the truth is the stock model in float64.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import harness
from benchmarks.stock_autoencoder import StockAutoencoder
from cat_fast import NestedAutoencoderKL
from cat_fast.config import read_yaml

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = Path(__file__).parents[1] / "configs/tokenizer/cat_c16.yaml"
READINGS = {"heads512": 1, "heads1": 512}
"""Head dimension of the mid blocks' attention."""
RATIOS = (8, 16, 32)
SIDE = 512
ORDERS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def build(head_dim: int, ratio: int) -> NestedAutoencoderKL:
    """Our model of one ratio, with random weights."""
    torch.manual_seed(0)
    arguments = read_yaml(CONFIG)["model"] | {"ratios": [ratio], "mid_block_attention_head_dim": head_dim}
    return NestedAutoencoderKL(**arguments).to(DEVICE).eval()


def cases(
    side: int = SIDE, make: Callable[[int, int], NestedAutoencoderKL] = build
) -> Mapping[str, Callable]:
    """What the harness measures."""
    return {
        f"{reading}.{ratio}x.{which}": partial(case, make, head_dim, ratio, which, reading, side)
        for reading, head_dim in READINGS.items()
        for ratio in RATIOS
        for which in ("encode", "decode")
    }


def case(
    make: Callable[[int, int], NestedAutoencoderKL],
    head_dim: int,
    ratio: int,
    which: str,
    reading: str,
    side: int,
) -> harness.Case:
    """One direction at one ratio. The literal reading is slow in stock blocks: one layout, eager only."""
    model = make(head_dim, ratio)
    small = side // ratio
    shape = (1, 3, side, side) if which == "encode" else (1, model.config["latent_channels"], small, small)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def ours(x: torch.Tensor) -> torch.Tensor:
        if which == "encode":
            return model.encode(x, ratio).latent_dist.parameters
        return model.decode(x, ratio).sample

    baselines: dict[str, harness.Contestant] = {}
    for order in ORDERS if reading == "heads1" else ("nchw",):
        theirs = getattr(stock(model).to(memory_format=ORDERS[order]), which)
        baselines[f"{order}_eager"] = contestant(theirs, x, order)
        if reading == "heads1":
            baselines[f"{order}_compile"] = contestant(torch.compile(theirs, dynamic=False), x, order)

    def truth() -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return (getattr(stock(model).double(), which)(x.double()),)

    torch.nn.Module.to(model, memory_format=torch.channels_last)
    return harness.Case(
        ours=contestant(ours, x, "channels_last"),
        baselines=baselines,
        truth=truth,
        tolerance=1e-4,
        details={"dtype": "float32", "device": DEVICE, "side": side},
    )


def stock(model: NestedAutoencoderKL) -> StockAutoencoder:
    """The same network in diffusers' blocks."""
    return StockAutoencoder(model).to(DEVICE).eval()


def contestant(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, order: str
) -> harness.Contestant:
    """A forward pass, without gradients, of a model that is laid out in `order`."""
    x = x.to(memory_format=ORDERS[order])

    def run() -> torch.Tensor:
        with torch.no_grad():
            return function(x)

    return harness.Contestant(run=run, outputs=lambda y: (y,))


if __name__ == "__main__":
    sys.exit(harness.main("autoencoder", cases()))
