"""Means and paired differences of an evaluation of the dual-token tokenizer, with 95 % intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cat_fast.dual_token.codebook import usage
from cat_fast.evaluation.dual_token.methods import MEAN_COLOUR, SEMANTIC, format_name
from cat_fast.evaluation.dual_token.run import METRICS, DualRun
from cat_fast.evaluation.intervals import mean_interval


def summarize(run: DualRun, data: str, seed: int = 0) -> dict[str, Any]:
    """Return the figures of a complete run, as JSON.

    Args:
        data: the images, as they were given.
        seed: of the bootstrap.
    """
    rows = [run.rows[image.key] for image in run.images]
    used = [row for row in rows if "error" not in row]
    tokenizer = run.tokenizer
    names = {"perceptual": run.perceptual_name}
    return {
        "evaluation": "dual",
        "data": {"path": data},
        "images": len(used),
        "left_out": {row["key"]: row["error"] for row in rows if "error" in row},
        "size": run.size,
        "tokenizer": tokenizer.fingerprint(),
        "methods": {
            method.name: {
                "tokens": method.tokens,
                "bits": method.bits,
                **_means(used, method.name, names, seed),
            }
            for method in run.methods
        },
        "differences": _differences(run, used, names, seed),
        "codebooks": _codebooks(run, used),
    }


def _means(
    rows: Sequence[Mapping[str, Any]], name: str, names: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """Return the mean of each metric over the images that the method has a reconstruction of."""
    found = [row["methods"][name] for row in rows if row["methods"][name] is not None]
    means: dict[str, Any] = {"images": len(found)}
    for metric in (*METRICS, "seconds"):
        means[names.get(metric, metric)] = _interval([values[metric] for values in found], seed)
    return means


def _differences(
    run: DualRun, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """Return mean differences between pairs of methods on the same images, first minus second."""
    pairs: list[tuple[str, str]] = []
    known = {method.name for method in run.methods}
    for grid in run.grids:
        size = format_name(grid)
        pairs += [(f"guide {size}", MEAN_COLOUR), (f"guide {size}", f"movq {size}")]
        pairs += [
            (f"re-rendered {size}", other)
            for other in (SEMANTIC, f"unconditioned {size}", f"guide {size}", f"super-resolution {size}")
        ]
        pairs += [(f"true text {size}", other) for other in (SEMANTIC, f"unconditioned {size}")]
    pairs += [
        (f"guide {format_name(large)}", f"guide {format_name(small)}")
        for small, large in zip(run.grids, run.grids[1:], strict=False)
    ]
    found = {}
    for first, second in pairs:
        if not {first, second} <= known:
            continue
        both = [
            (row["methods"][first], row["methods"][second])
            for row in rows
            if row["methods"][first] is not None and row["methods"][second] is not None
        ]
        found[f"{first} - {second}"] = {
            names.get(metric, metric): _interval([a[metric] - b[metric] for a, b in both], seed)
            for metric in METRICS
        }
    return found


def _codebooks(run: DualRun, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the use of both codebooks over all images, and of the guide's per grid."""
    vocabulary = run.tokenizer.vocabulary
    found: dict[str, Any] = {}
    per_grid = {
        format_name(grid): [code for row in rows for code in row["guide_codes"][format_name(grid)]]
        for grid in run.grids
    }
    every = [code for codes in per_grid.values() for code in codes]
    for name, codes in {"guide": every, **{f"guide {size}": own for size, own in per_grid.items()}}.items():
        found[name] = _usage(codes, vocabulary.guide_size)
    if vocabulary.semantic_length:
        codes = [code for row in rows for code in row["semantic_codes"]]
        found["semantic"] = _usage(codes, vocabulary.semantic_size)
    return found


def _usage(codes: Sequence[int], size: int) -> dict[str, float]:
    used = usage(torch.bincount(torch.tensor(codes, dtype=torch.int64), minlength=size))
    return {"size": size, "used": used.share, "perplexity": used.perplexity}


def _interval(values: Sequence[float], seed: int) -> dict[str, Any] | None:
    estimate = mean_interval(values, seed) if values else None
    return (
        None
        if estimate is None
        else {
            "value": estimate.value,
            "interval": [estimate.low, estimate.high],
        }
    )
