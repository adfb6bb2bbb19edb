"""Plots of the study as PNG."""

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from cat_fast.complexity import JPEG_THRESHOLDS
from cat_fast.evaluation.complexity_study.study import JPEG, Sample

_COLOURS = ("#c2410c", "#0369a1", "#4d7c0f", "#7c3aed", "#db2777")
_BARS = "#0369a1"


def draw_plots(results: dict[str, Any], sample: Sample) -> dict[str, bytes]:
    """Return the plots by name."""
    sizes = next(metric.values for metric in sample.metrics if metric.name == JPEG)
    return {
        "best_ratio": _best_ratio(results),
        "correlation": _correlation(results),
        "jpeg_histogram": _jpeg_histogram(sizes),
    }


def _best_ratio(results: dict[str, Any]) -> bytes:
    """Share of images per maximum acceptable ratio over the tolerance (Figure 2, left)."""
    figure, axis = plt.subplots(figsize=(7.6, 3.4))  # as wide as the labels of eight tolerances
    shares = results["best_ratio"]
    taus = [*shares]
    bottom = np.zeros(len(taus))
    for ratio, colour in zip(results["ratios"], _COLOURS, strict=False):
        heights = np.array([shares[tau][str(ratio)] for tau in taus])
        axis.bar(taus, heights, bottom=bottom, color=colour, label=f"{ratio}x")
        bottom += heights
    axis.set_xlabel("tolerance τ of the MSE, pixels in [0, 1]")
    axis.set_ylabel("share of images")
    axis.legend(frameon=False, title="best ratio", loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure, axis)


def _correlation(results: dict[str, Any]) -> bytes:
    """Pearson correlation of each metric with the best ratio (Figure 2, right)."""
    metrics = results["metrics"]
    names = sorted(metrics, key=lambda name: metrics[name]["pearson"]["value"])
    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.36 * len(names)))
    for row, name in enumerate(names):
        for key, shift, colour in (("pearson", 0.17, _COLOURS[1]), ("spearman", -0.17, _COLOURS[0])):
            found = metrics[name][key]
            axis.barh(
                row + shift, found["value"], height=0.3, color=colour, label=key.title() if not row else None
            )
            axis.plot([found["low"], found["high"]], [row + shift] * 2, color="black", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_xlabel(f"correlation with the best ratio at τ = {results['tau']:g}, 95 % intervals")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles, labels, frameon=False, loc="lower right")
    return _png(figure, axis)


def _jpeg_histogram(sizes: np.ndarray) -> bytes:
    """JPEG sizes with the published thresholds (Figure 6)."""
    figure, axis = plt.subplots(figsize=(5.6, 3.2))
    axis.hist(sizes / 1000, bins=40, color=_BARS)
    for threshold, label in ((JPEG_THRESHOLDS.a, "32x below"), (JPEG_THRESHOLDS.b, "8x above")):
        axis.axvline(threshold / 1000, color=_COLOURS[0], linestyle="--", linewidth=1)
        axis.text(threshold / 1000, axis.get_ylim()[1], f" {label}", color=_COLOURS[0], va="top", fontsize=8)
    axis.set_xlabel("JPEG size at 512 px, thousands of bytes")
    axis.set_ylabel("images")
    return _png(figure, axis)


def _png(figure: plt.Figure, axis: plt.Axes) -> bytes:
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
