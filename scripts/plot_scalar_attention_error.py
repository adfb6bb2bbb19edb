"""Draw kernels/scalar_attention/error.png: the accuracy of the compiled operator.

    python scripts/plot_scalar_attention_error.py

Left: the error of interpolating e^(t s) within a block, and its bound. Right: the operator's error against
float64 over the range of the data, and the error of torch's attention in fp32.
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image

from cat_fast.kernels.scalar_attention.op import scalar_attention
from cat_fast.kernels.scalar_attention.reference import scalar_attention_reference

OUT = Path(__file__).parents[1] / "kernels/scalar_attention/error.png"
NODES, REACH = 8, 0.8  # kNodes and kReach of csrc/scalar_attention
POSITIONS, HEADS = 1024, 8
COLOURS = {"y": "C0", "dq": "C1", "dk": "C2", "dv": "C3"}


def main() -> None:
    """Measure, draw, save."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_interpolation(left)
    draw_operator(right)
    figure.savefig(OUT, dpi=80)
    with Image.open(OUT) as plot:
        few_colours = plot.convert("RGB").quantize(64)
    few_colours.save(OUT, optimize=True)


def draw_interpolation(axes: Axes) -> None:
    """Plot the largest relative error of the polynomial for e^(t s), |s| <= 1 and |t| <= reach."""
    reaches = np.geomspace(0.1, 3, 40)
    for colour, nodes in enumerate((4, 6, 8, 10)):
        bound = [
            reach**nodes * math.exp(2 * reach) / (2 ** (nodes - 1) * math.factorial(nodes))
            for reach in reaches
        ]
        measured = [interpolation_error(nodes, reach) for reach in reaches]
        axes.loglog(reaches, bound, "--", color=f"C{colour}", linewidth=1)
        axes.loglog(reaches, measured, color=f"C{colour}", label=f"{nodes} nodes")
    axes.axvline(REACH, color="grey", linewidth=1)
    axes.axhline(2**-24, color="grey", linestyle=":", label="half a unit of fp32")
    axes.set(
        xlabel="reach of a block", ylabel="relative error of a weight", ylim=(1e-14, 1), title="Interpolation"
    )
    axes.legend(title=f"dashed: bound; used: {NODES} nodes, reach {REACH}", fontsize=8, title_fontsize=8)


def interpolation_error(nodes: int, reach: float) -> float:
    at = reach * np.cos(np.pi * (np.arange(nodes) + 0.5) / nodes)
    t = np.linspace(-reach, reach, 501)
    lagrange = np.ones((nodes, t.size))
    for i in range(nodes):
        for j in range(nodes):
            if i != j:
                lagrange[i] *= (t - at[j]) / (at[i] - at[j])
    return float(np.abs(np.exp(at) @ lagrange / np.exp(t) - 1).max())


def draw_operator(axes: Axes) -> None:
    """Plot max|error| / max|truth| of y and the gradients for normal data of growing deviation."""
    deviations = np.geomspace(0.1, 6, 16)
    ranges, ours, torchs = [], [], []
    for deviation in deviations:
        generator = torch.Generator().manual_seed(0)
        q, k, v, grad = torch.randn(4, 1, POSITIONS, HEADS, generator=generator)
        q, k = q * float(deviation), k * float(deviation)
        truth = value_and_gradients(scalar_attention_reference, *(t.double() for t in (q, k, v, grad)))
        ranges.append(float(((q.amax(1) - q.amin(1)) * (k.amax(1) - k.amin(1))).mean()))
        ours.append(errors(value_and_gradients(scalar_attention, q, k, v, grad), truth))
        torchs.append(errors(value_and_gradients(scalar_attention_reference, q, k, v, grad), truth))
    for i, (name, colour) in enumerate(COLOURS.items()):
        axes.loglog(ranges, [e[i] for e in ours], color=colour, label=name)
        axes.loglog(ranges, [e[i] for e in torchs], ":", color=colour)
    axes.axvline(4 * REACH * POSITIONS / 2, color="grey", linewidth=1)
    axes.axhline(1e-5, color="grey", linestyle="--", linewidth=1)
    axes.set(
        xlabel="(q_max - q_min) (k_max - k_min)",
        ylabel="max |error| / max |truth|",
        title=f"Operator, N = {POSITIONS}",
    )
    axes.legend(title="dotted: torch's SDPA in fp32", fontsize=8, title_fontsize=8)


def value_and_gradients(function, q, k, v, grad) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def errors(got: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...]) -> list[float]:
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, truth, strict=True)]


if __name__ == "__main__":
    main()
