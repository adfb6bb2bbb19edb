"""Tables of a nano report, for model cards and the demo."""

import math
from typing import Any

_FIGURES = {
    "twin": "chosen ratios against the fixed 16x tokenizer",
    "generator twin": "DiT-CAT against DiT-fixed-16x",
}
"""Names of parts that compare models."""
_COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "white", "brown")
_COMMON = {*_COLOURS, "with", "over", "at", "and", "on", "face"}
"""Words of prompts that are not parts of an image."""


def tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of a report that have figures: title, header and rows."""
    means = report.get("tokenizer", {}).get("means", {})
    chosen = report.get("chosen ratios", {})
    samples = report.get("samples", {})
    sampling = samples.get("sampling", {})
    by_scale = sampling.get("recognised by guidance scale", {})
    by_steps = sampling.get("recognised by steps", {})
    acceptable = chosen.get("maximum acceptable ratio, all", {})
    found = [
        _reconstruction(means),
        _table(
            "At chosen ratios, within the tokens of a fixed 16x",
            ["held-out images", "number", "PSNR, dB"],
            [[name, one["images"], _interval(one, 2)] for name, one in chosen.get("psnr", {}).items()],
        ),
        _table(
            "Correlation with the maximum acceptable ratio, all held-out images",
            ["metric", "Pearson r"],
            [
                [name, "constant" if value is None else f"{value:.2f}"]
                for name, value in acceptable.get("correlation", {}).items()
            ],
        ),
        _table(
            "Pages read by tesseract",
            ["ratio", "median character error rate", "mean"],
            [
                [ratio, f"{100 * one['error_rate']['median']:.0f} %", _interval(one["error_rate"], 3)]
                for ratio, one in means.get("pages", {}).items()
                if "error_rate" in one
            ],
        ),
        _against_twin(report),
        _table(
            "Recognised samples",
            ["samples", "prompt in the top 5", "95 % interval", "top 1", "shuffled prompts", "mean tokens"],
            [_recognised(name, one) for name, one in samples.get("recognised", {}).items()],
        ),
        _table("Samples within the budget of a fixed 16x", ["figure", "value"], _sample_figures(samples)),
        _table(
            "Generators at the tokens of a fixed 16x, samples of training captions",
            [
                "generator",
                "recognised",
                "share, CAT - this",
                "proxy-FID-vgg16",
                "proxy-KID-vgg16",
                "mean tokens",
            ],
            [
                _generator(name, report[part])
                for name, part in (("CAT", "generator"), ("fixed 16x twin", "generator twin"))
                if "recognised" in report.get(part, {})
            ],
        ),
        _table(
            f"Guidance scales: recognised samples of {sampling.get('prompts')} other captions",
            ["ratio", *next(iter(by_scale.values()), {})],
            [[ratio, *counts.values()] for ratio, counts in by_scale.items()],
        ),
        _table(
            f"Numbers of steps: recognised samples of {sampling.get('prompts')} other captions",
            ["ratio", *next(iter(by_steps.values()), {})],
            [[ratio, *counts.values()] for ratio, counts in by_steps.items()],
        ),
        _table(
            "Not measured",
            ["figure", "reason"],
            [
                *(
                    [_FIGURES.get(name, name), _reason(part)]
                    for name, part in report.items()
                    if "missing" in part
                ),
                *map(list, report.get("cut", {}).get("lines", {}).items()),
            ],
        ),
    ]
    return [table for table in found if table["rows"]]


def twin_tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of the fixed 16x tokenizer."""
    found = [_reconstruction(report.get("twin", {}).get("means", {})), _against_twin(report)]
    return [table for table in found if table["rows"]]


def to_markdown(table: dict[str, Any]) -> str:
    """Return a table in Markdown under its title."""
    rows = [table["header"], ["---"] * len(table["header"]), *table["rows"]]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([f"### {table['title']}", "", *lines, ""])


def _reconstruction(means: dict[str, Any]) -> dict[str, Any]:
    return _table(
        "Reconstruction",
        ["held-out images", "number", "ratio", "PSNR, dB", "ideal low-pass, dB", "ST-LPIPS"],
        [
            [
                name,
                one["psnr"]["images"],
                ratio,
                _interval(one["psnr"], 2),
                _interval(one["low_pass"], 2),
                _interval(one["st_lpips"], 3),
            ]
            for name, ratios in means.items()
            for ratio, one in ratios.items()
        ],
    )


def _against_twin(report: dict[str, Any]) -> dict[str, Any]:
    return _table(
        "Chosen ratios against the fixed 16x twin",
        ["held-out images", "number", "figure", "CAT - fixed 16x", "apart from zero"],
        [
            [name, one["images"], figure, *_difference(one)]
            for name, figures in report.get("twin", {}).get("difference", {}).items()
            for figure, one in figures.items()
        ],
    )


def _difference(one: dict[str, Any]) -> tuple[str, str]:
    if one["images"] == 1:
        return f"{one['mean']:.3f}", "one image"
    return _interval(one, 3), "yes" if one["apart_from_zero"] else "no"


def _table(title: str, header: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    return {"title": title, "header": header, "rows": rows}


def _recognised(name: str, one: dict[str, Any]) -> list[Any]:
    low, high = _wilson(one["recognised"], one["prompts"])
    return [
        name,
        f"{one['recognised']} of {one['prompts']}",
        f"{100 * low:.0f} to {100 * high:.0f} %",
        one["top1"],
        f"{one['shuffled']:.1f}",
        f"{one['mean_tokens']:.1f}",
    ]


def _wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    share, spread = hits / count, z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return centre - half, centre + half


def _sample_figures(samples: dict[str, Any]) -> list[list[Any]]:
    if "classifier" not in samples:
        return []
    judge, tops = samples["classifier"], samples["top 5 of the recombined prompts"]
    with_part = sum(any(_share_a_part(prompt, one) for one in top) for prompt, top in tops.items())
    return [
        ["classes of the classifier", judge["classes"]],
        ["its top 1 on held-out augmentations", f"{100 * judge['top1 on held-out augmentations']:.1f} %"],
        ["recombined prompts with one of their parts in the top 5", f"{with_part} of {len(tops)}"],
        ["samples that are copies of a training image", samples["copies"]],
        [
            "distance to the nearest training image",
            _interval(samples["distance to the nearest training image"], 3),
        ],
    ]


def _share_a_part(prompt: str, caption: str) -> bool:
    return bool({*prompt.split()} & {*caption.split()} - _COMMON)


def _reason(part: dict[str, Any]) -> str:
    missing = "lacks the shipped models" in part["missing"] or "no such folder" in part["missing"]
    return "the twin is not trained yet" if missing else part["missing"]


def _generator(name: str, one: dict[str, Any]) -> list[Any]:
    found, difference = one["recognised"], one.get("recognised, CAT - fixed 16x")
    return [
        name,
        f"{found['recognised']} of {found['prompts']}",
        _interval(difference, 3) if difference else "",
        f"{one['proxy-FID-vgg16']:.1f}",
        _interval(one["proxy-KID-vgg16"], 0),
        f"{one['mean_tokens']:.1f}",
    ]


def _interval(figure: dict[str, Any], digits: int) -> str:
    return f"{figure['mean']:.{digits}f} ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"
