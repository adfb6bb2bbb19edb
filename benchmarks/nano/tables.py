"""Tables of a nano report, for model cards and the demo."""

from typing import Any


def tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of a report that have figures: title, header and rows."""
    means = report.get("tokenizer", {}).get("means", {})
    chosen = report.get("chosen ratios", {})
    samples = report.get("samples", {})
    guidance = samples.get("guidance", {})
    by_scale = guidance.get("recognised", {})
    acceptable = chosen.get("maximum acceptable ratio, all", {})
    found = [
        _table(
            "Reconstruction",
            ["held-out images", "ratio", "PSNR, dB", "ideal low-pass, dB", "ST-LPIPS"],
            [
                [
                    name,
                    ratio,
                    _interval(one["psnr"], 2),
                    _interval(one["low_pass"], 2),
                    _interval(one["st_lpips"], 3),
                ]
                for name, ratios in means.items()
                for ratio, one in ratios.items()
            ],
        ),
        _table(
            "At chosen ratios, within the tokens of a fixed 16x",
            ["held-out images", "PSNR, dB"],
            [[name, _interval(one, 2)] for name, one in chosen.get("psnr", {}).items()],
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
        _table(
            "Chosen ratios against the fixed 16x twin",
            ["held-out images", "figure", "CAT - fixed 16x", "apart from zero"],
            [
                [name, figure, _interval(one, 3), "yes" if one["apart_from_zero"] else "no"]
                for name, figures in report.get("twin", {}).get("difference", {}).items()
                for figure, one in figures.items()
            ],
        ),
        _table(
            "Recognised samples",
            ["samples", "prompt in the top 5", "top 1", "shuffled prompts", "mean tokens"],
            [_recognised(name, one) for name, one in samples.get("recognised", {}).items()],
        ),
        _table(
            f"Guidance scales: recognised samples of {guidance.get('prompts')} other captions",
            ["ratio", *next(iter(by_scale.values()), {})],
            [[ratio, *counts.values()] for ratio, counts in by_scale.items()],
        ),
    ]
    return [table for table in found if table["rows"]]


def to_markdown(table: dict[str, Any]) -> str:
    """Return a table in Markdown under its title."""
    rows = [table["header"], ["---"] * len(table["header"]), *table["rows"]]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([f"### {table['title']}", "", *lines, ""])


def _table(title: str, header: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    return {"title": title, "header": header, "rows": rows}


def _recognised(name: str, one: dict[str, Any]) -> list[Any]:
    found = f"{one['recognised']} of {one['prompts']}"
    return [name, found, one["top1"], f"{one['shuffled']:.1f}", f"{one['mean_tokens']:.1f}"]


def _interval(figure: dict[str, Any], digits: int) -> str:
    return f"{figure['mean']:.{digits}f} ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"
