"""Rate, distortion and cost of all rules at once, from one evaluation of reconstructions.

An evaluation at the fixed ratios of a tokenizer holds every reconstruction that thresholds or a token budget
could choose, so a sweep over rules selects rows and runs no model.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from cat_fast.complexity import RATIOS, RatioThresholds, ratios_within_budget
from cat_fast.errors import UserError
from cat_fast.evaluation.tokenizers.columns import KnownScore

PATCH = 2
TOKENS = "tokens per image"
BUDGETS = 12
"""Number of token budgets between the highest and the lowest ratio."""
_MARKERS = {"fixed": "s", "thresholds": "o", "budget": "^"}
_LOWER_IS_BETTER = {"PSNR": False, "SSIM": False}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One rule of one tokenizer."""

    tokenizer: str
    kind: str
    """fixed, thresholds or budget."""
    rule: str
    tokens: float
    """Mean per image, at patch size 2."""
    flops: float | None
    """Mean per image, of encoder and decoder."""
    metrics: Mapping[str, float]
    dominated: Mapping[str, bool]
    """By metric: another point is at least as good in tokens, FLOPs and the metric, and better in one."""

    def to_json(self) -> dict[str, Any]:
        return {
            name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()
        }


def sweep(result: Mapping[str, Any], images: Path) -> list[Point]:
    """Return the points of an evaluation: every column of one rate, and sweeps where all ratios are there.

    Args:
        result: content of reconstruction.json.
        images: images.parquet next to it.

    Raises:
        UserError: the file is missing, or there are no columns of a fixed rate.
    """
    fixed = _fixed_columns(result)
    if not fixed:
        raise UserError(
            "pareto: the evaluation has no columns of a fixed ratio; run cat-fast eval reconstruction with"
            " --ratios 8,16,32"
        )
    try:
        rows = pyarrow.parquet.read_table(images).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{images}: cannot be read ({error}); run cat-fast eval reconstruction again"
        ) from error
    perceptual = next(name for name in rows[0] if name.endswith("lpips_vgg") or name == "st_lpips_alex")
    names = {"PSNR": "psnr", "SSIM": "ssim", perceptual: perceptual}
    by_column: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_column[row["column"]][row["key"]] = row
    points: list[Point] = []
    for tokenizer, columns in fixed.items():
        source = _Source(
            tokenizer=tokenizer,
            rows={choice: by_column[name] for choice, name in columns.items()},
            tokens={choice: result["columns"][name]["tokens"] for choice, name in columns.items()},
            flops={choice: result["columns"][name]["flops"] for choice, name in columns.items()},
            metrics=names,
        )
        for choice, name in columns.items():
            rule = name.removeprefix(f"{tokenizer} ")
            points.append(source.point("fixed", rule, [choice] * len(source.keys)))
        if set(RATIOS) <= columns.keys() and all(known.score for known in source.scores):
            points += _sweep_rules(source, result["data"]["size"])
    return mark_dominated(points)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """All reconstructions of one tokenizer, by rate and key."""

    tokenizer: str
    rows: Mapping[int, Mapping[str, Mapping[str, Any]]]
    tokens: Mapping[int, float]
    flops: Mapping[int, float | None]
    metrics: Mapping[str, str]
    """Column of each metric."""

    @property
    def keys(self) -> list[str]:
        return sorted(next(iter(self.rows.values())))

    @property
    def scores(self) -> list[KnownScore]:
        first = next(iter(self.rows.values()))
        return [KnownScore(first[key]["score"], first[key]["expected"]) for key in self.keys]

    def point(self, kind: str, rule: str, choices: Sequence[int]) -> Point:
        """Return the means over images, one choice per key."""
        chosen = [self.rows[choice][key] for choice, key in zip(choices, self.keys, strict=True)]
        costs = [cost for choice in choices if (cost := self.flops[choice]) is not None]
        return Point(
            tokenizer=self.tokenizer,
            kind=kind,
            rule=rule,
            tokens=float(np.mean([self.tokens[choice] for choice in choices])),
            flops=float(np.mean(costs)) if len(costs) == len(choices) else None,
            metrics={
                name: float(np.mean([row[column] for row in chosen])) for name, column in self.metrics.items()
            },
            dominated={},
        )


def mark_dominated(points: Sequence[Point]) -> list[Point]:
    """Return the points with `dominated` set for each of their metrics."""
    metrics = list(points[0].metrics)
    return [
        Point(
            **{
                **vars(point),
                "dominated": {
                    metric: any(_dominates(other, point, metric) for other in points) for metric in metrics
                },
            }
        )
        for point in points
    ]


def merge_equal(points: Sequence[Point], metric: str) -> list[tuple[Point, int]]:
    """Return the first of all points with equal tokens, FLOPs and metric, by tokens, and their number."""
    equal: dict[tuple[str, float, float | None, float], list[Point]] = defaultdict(list)
    for point in points:
        equal[point.tokenizer, point.tokens, point.flops, point.metrics[metric]].append(point)
    return sorted(((group[0], len(group)) for group in equal.values()), key=lambda pair: pair[0].tokens)


def lower_is_better(metric: str) -> bool:
    return _LOWER_IS_BETTER.get(metric, True)


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw each metric against tokens and FLOPs; dominated points are hollow, the others are connected."""
    from matplotlib.figure import Figure

    metrics = list(points[0].metrics)
    figure = Figure(figsize=(11, 3.6 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), 2, squeeze=False)
    for row, metric in enumerate(metrics):
        _draw(axes[row][0], points, metric, TOKENS, [point.tokens for point in points])
        costs = [None if point.flops is None else point.flops / 1e9 for point in points]
        _draw(axes[row][1], points, metric, "GFLOP per image", costs)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{title}; hollow points are dominated")
    figure.savefig(path, dpi=110, format="png")


def _draw(ax: Any, points: Sequence[Point], metric: str, label: str, costs: Sequence[float | None]) -> None:
    tokenizers = list(dict.fromkeys(point.tokenizer for point in points))
    groups: dict[tuple[str, str, bool], list[tuple[float, float]]] = defaultdict(list)
    for point, cost in zip(points, costs, strict=True):
        if cost is not None:
            group = point.tokenizer, point.kind, point.dominated[metric]
            groups[group].append((cost, point.metrics[metric]))
    for (tokenizer, kind, dominated), places in groups.items():
        colour = f"C{tokenizers.index(tokenizer)}"
        ax.scatter(
            *zip(*places, strict=True),
            marker=_MARKERS[kind],
            s=40 if kind == "fixed" else 18,
            facecolors="none" if dominated else colour,
            edgecolors=colour,
            alpha=0.4 if dominated else 1,
            label=None if dominated else f"{tokenizer}, {kind}",
        )
    best = sorted(place for (_, _, dominated), places in groups.items() if not dominated for place in places)
    ax.plot([x for x, _ in best], [y for _, y in best], "k-", linewidth=0.6, alpha=0.5)
    if label == TOKENS:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel(label)
    ax.set_ylabel(f"{metric} ({'lower' if lower_is_better(metric) else 'higher'} is better)")
    ax.grid(alpha=0.3)


def _fixed_columns(result: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Return the names of columns of one rate, by tokenizer and rate."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for name, column in result["columns"].items():
        if column["rule"].isdecimal():
            found[column["tokenizer"]][int(column["rule"])] = name
    return found


def _sweep_rules(source: _Source, size: int) -> list[Point]:
    points = []
    for a, b in combinations(range(1, 10), 2):
        thresholds = RatioThresholds(a, b)
        choices = [thresholds.ratio_of(score) for score in source.scores]
        points.append(source.point("thresholds", f"({a}, {b})", choices))
    expected = [float(k.score) if k.expected is None else k.expected for k in source.scores]
    least, most = ((size / ratio / PATCH) ** 2 for ratio in (max(RATIOS), min(RATIOS)))
    for budget in np.geomspace(least, most, BUDGETS)[1:-1]:
        choices = ratios_within_budget(expected, float(budget), resolution=size)
        points.append(source.point("budget", f"{budget:.4g} tokens", choices))
    return points


def _dominates(first: Point, second: Point, metric: str) -> bool:
    """Return True if `first` is at least as good as `second` in everything and better in something."""
    sign = 1 if lower_is_better(metric) else -1
    pairs = [(first.tokens, second.tokens), (sign * first.metrics[metric], sign * second.metrics[metric])]
    if first.flops is not None and second.flops is not None:
        pairs.append((first.flops, second.flops))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
