"""The papers' efficiency claims, counted exactly, next to figures measured here.

    python -m benchmarks.claims --json FILE [--quick] [--results DIR]

Each row has the published figure, ours counted from architecture and mixes (independent of the machine), a
figure measured here where a result has one, and the reason of a difference. Measured figures come from the
newest results in DIR; those that it lacks, or has from --quick or a wrong case, come from the committed ones.
Each names its file. The reviewers' table compares
memory and time of CAT with fixed 8x, 16x and 32x for encoding, training and generating: counted memory,
bounds and predictions for GPUs from data sheets, and measured figures where results have them. `--quick`
leaves out that table and the rows of scoring, which take a minute.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import packing
from benchmarks.bounds.data_sheets import read_sheets
from benchmarks.bounds.steps import vae_step
from benchmarks.efficiency import costs, scoring
from benchmarks.efficiency.comparison import TOKENIZER_IMAGES, coding_case, comparison
from benchmarks.efficiency.rates import average_rate, mean_tokens, parse_mix, rate_range
from benchmarks.efficiency.row import Measured, Results, Row, counted_cell, figure, measured_cell
from benchmarks.shared.committed import machine_slug
from benchmarks.shared.compact_json import write_compact
from benchmarks.shared.configs import generator_run
from benchmarks.shared.harness import rounded
from benchmarks.shared.image_flops import PUBLISHED, count_preset
from benchmarks.shared.mixes import IMAGENET, SHARES, TOKENS
from cat_fast import console
from cat_fast.data.files import require_writable
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command
from cat_fast.training.metrics.flops import DiTFlops

ROOT = Path(__file__).parents[1]


def token_rows() -> list[Row]:
    """Return mean tokens, and the average rates of every row of the paper's table of scorers."""
    tokens = [
        Row(
            claim="mean tokens in training, ImageNet-512",
            unit="tokens per image",
            published=197.44,
            counted=mean_tokens(SHARES["197"]),
            explanation="No mix is published; 4/49/47 is the nearest one in percent.",
        ),
        Row(
            claim="mean tokens in generation, ImageNet-512",
            unit="tokens per image",
            published=216,
            counted=mean_tokens(IMAGENET),
            explanation="The shares are printed in whole percent.",
        ),
        *(
            Row(
                claim=f"fewer tokens than 8x, latents of {side} x {side} on average",
                unit="ratio",
                published=published,
                counted=(64 / side) ** 2,
            )
            for side, published in ((31, 4.26), (29, 4.87))
        ),
        Row(
            claim="tokens on natural images against fixed 16x (16 % in another version)",
            unit="%",
            published=-18,
            counted=100 * (mean_tokens(IMAGENET) / 256 - 1),
            explanation="29.32² latent positions against 32² are 16 % fewer; 18 % is LLaVA's mix 2/65/33, "
            f"{100 * (1 - mean_tokens(SHARES['208']) / 256):.1f} %.",
        ),
    ]
    return tokens + rate_rows()


def rate_rows() -> list[Row]:
    """Return the average rate of each scorer and data set."""
    published = json.loads((ROOT / "cat_fast/evaluation/published/tables.json").read_text(encoding="utf-8"))[
        "tables"
    ]["scorers"]
    rows = []
    for entry in published["rows"]:
        mixes, rates = entry["values"][::2], entry["values"][1::2]
        names = [column.split(" ")[0] for column in published["columns"][::2]]
        for name, mix, rate in zip(names, mixes, rates, strict=True):
            shares = parse_mix(mix)
            low, high = rate_range(shares)
            rows.append(
                Row(
                    claim=f"average rate, {name}, {entry['name']}, {mix}",
                    unit="x",
                    published=rate,
                    counted=average_rate(shares),
                    explanation=""
                    if abs(rate - average_rate(shares)) < 0.01
                    else f"Mixes that round to {mix} have {low:.2f} to {high:.2f}.",
                )
            )
    return rows


def flop_rows(counts: Mapping[str, Any], results: Results) -> list[Row]:
    """Return the claims on the transformer's cost.

    Args:
        counts: result of `count_preset` for cat_xl.
        results: with measured training steps and generation.
    """
    why = {name: str(one["why"]) for name, one in PUBLISHED.items()}
    return [
        Row(
            claim="images per second in training against fixed 16x, at 197.44 tokens",
            unit="ratio",
            published=1.23,
            counted=counts["197"]["images_at_equal_flops"],
            measured=packed_step("197", results),
            explanation=why["throughput_of_training"],
        ),
        Row(
            claim="images per second in generation against fixed 16x, at 216 tokens",
            unit="ratio",
            published=1.185,
            counted=counts["216"]["images_at_equal_flops"],
            measured=generation(results),
            explanation=why["images_per_second_at_inference"]
            + " The FLOPs of a training step have the same ratio.",
        ),
        *(
            Row(
                claim=f"FLOPs of generation against fixed 16x, {mean_tokens(SHARES[name]):.0f} tokens",
                unit="ratio",
                published=0.82,
                counted=counts[name]["total"],
                explanation=why["flops_relative_to_fixed16"],
            )
            for name in ("208", "216")
        ),
        Row(
            claim="forward pass of the transformer, one image at 16x",
            unit="TFLOPs",
            published=22.0,
            counted=costs.forward_flops(256) / 1e12,
            explanation=why["forward_tflops_of_an_image_at_16x"],
        ),
    ]


def packed_step(mix: str, results: Results) -> Measured:
    """Return the measured images per second of packed training against fixed 16x, with the batch it is of."""
    key, model = f"{mix}.ratio_vs_fixed16", packing.MODEL
    composition = f"cases/{mix}/details/images"
    name, content = results.read("packing", key, composition)
    images = figure(content, composition, name)
    lengths = [TOKENS[int(ratio[:-1])] for ratio, count in images.items() for _ in range(count)]
    flops = DiTFlops(dict(model))
    return Measured(
        value=figure(content, key, name),
        file=name,
        key=key,
        of=f"training step of a transformer {model['hidden_size']} wide and {model['depth']} deep, "
        f"{sum(lengths) / len(lengths):.2f} tokens per image",
        expected=flops.of([256]) / (flops.of(lengths) / len(lengths)),
    )


def generation(results: Results) -> Measured:
    """Return the measured images per second of generating CAT's mix against fixed 16x, decoding included.

    Where no result has both, it is the training step of the same mix.
    """
    steps = "compared/denoising_steps"
    rates, flops = (
        [f"cases/generate.{case}/{name}" for case in ("mix", "fixed_16x")]
        for name in ("rates/images", "flops_per_image")
    )
    try:
        name, content = results.read("training_steps", "about", steps, *rates, *flops)
    except UserError:
        return packed_step("216", results)
    mix, fixed = (figure(content, key, name) for key in rates)
    mix_flops, fixed_flops = (figure(content, key, name) for key in flops)
    return Measured(
        value=mix / fixed,
        file=name,
        key=rates[0],
        of=f"DiT-S/2 with CAT's decoder, {figure(content, steps, name)} steps with guidance, on "
        f"{machine_slug(content['about'])}",
        expected=fixed_flops / mix_flops,
    )


def count_transformer() -> dict[str, Any]:
    """Count the FLOPs of cat_xl per image, by mix of ratios."""
    arguments = {"in_channels": 16, **generator_run("cat_xl").model}
    arguments.pop("ratios", None)
    return count_preset(arguments)


def tokenizer_rows(results: Results) -> list[Row]:
    """Return sizes and costs of the tokenizers."""
    rows = [
        Row(
            claim=f"parameters, {label}",
            unit="M",
            published=published,
            counted=costs.tokenizer_parameters(config) / 1e6,
            explanation=_size_difference(published, costs.tokenizer_parameters(config) / 1e6),
        )
        for label, config, published in (
            ("fixed 8x", "fixed_8x_c16", 147), ("fixed 16x", "fixed_16x_c16", 169),
            ("fixed 32x", "fixed_32x_c16", 187), ("CAT, c = 4", "cat_c4", 187.45),
            ("CAT, c = 8", "cat_c8", 187.5), ("CAT, c = 16", "cat_c16", 187.61),
        )
    ]  # fmt: skip
    cat = costs.mean_over({f: costs.multiply_accumulates("cat_c16", f) for f in costs.RATIOS}, IMAGENET)
    fixed = {f: costs.multiply_accumulates(f"fixed_{f}x_c16", f) for f in (16, 32)}
    unit = "GMACs, published as FLOPs"
    seconds = coding_seconds(results)
    mixed = replace(
        seconds[16],
        value=costs.mean_over({ratio: one.value for ratio, one in seconds.items()}, IMAGENET),
        key="heads512.*x.*.fp32",
    )
    return [
        *rows,
        Row(
            claim="encoding and decoding, CAT on ImageNet", unit=unit, published=602, counted=cat / 1e9,
            measured=mixed,
            explanation="Multiply-accumulates; the size of the channel matching is not published.",
        ),
        Row(
            claim="encoding and decoding, fixed 16x", unit=unit, published=640, counted=fixed[16] / 1e9,
            measured=seconds[16],
            explanation="Multiply-accumulates; the published model has 15.6 M parameters more.",
        ),
        Row(
            claim="encoding and decoding, fixed 32x", unit=unit, published=822, counted=fixed[32] / 1e9,
            measured=seconds[32],
            explanation="Does not follow from the architecture: a 32x encoder does the work of a 16x one, "
            "and its mid block has a quarter of the positions.",
        ),
    ]  # fmt: skip


def _size_difference(published: float, counted: float) -> str:
    if counted > published:
        return "Channel matching is our reading."
    return (
        f"The published size includes {published - counted:.0f} M parameters that the text does not explain."
    )


def coding_seconds(results: Results) -> dict[int, Measured]:
    """Return the measured seconds of encoding and decoding an image in fp32, by ratio, from one file."""
    keys = {
        ratio: [coding_case(ratio, use) + "/seconds/ours/median" for use in ("encode", "decode")]
        for ratio in costs.RATIOS
    }
    name, content = results.read("autoencoder", "about", *chain.from_iterable(keys.values()))
    return {
        ratio: Measured(
            value=sum(figure(content, key, name) for key in pair),
            file=name,
            key=f"heads512.{ratio}x.*.fp32",
            unit="s per image",
            of=f"on {machine_slug(content['about'])}",
        )
        for ratio, pair in keys.items()
    }


def scoring_rows(results: Results) -> list[Row]:
    """Return seconds of scoring, and estimates of its share in scoring and training."""
    a100 = read_sheets()[0]["A100"]
    step_seconds = {}
    for ratio in costs.RATIOS:
        config = costs.tokenizer_config(ratio)
        step = vae_step(config, config, ratio, TOKENIZER_IMAGES, 64)
        step_seconds[ratio], _ = step.bound_seconds(a100)
    return [*scoring.second_rows(results), *scoring.share_rows(step_seconds, TOKENIZER_IMAGES, results)]


def build(quick: bool, results: Results) -> dict[str, Any]:
    """Return all rows, and unless `quick` the comparison with fixed ratios."""
    groups: dict[str, Callable[[], Sequence[Row]]] = {
        "tokens": token_rows,
        "transformer": lambda: flop_rows(count_transformer(), results),
        "tokenizer": lambda: tokenizer_rows(results),
    }
    if not quick:
        groups["scoring"] = lambda: scoring_rows(results)
    report: dict[str, Any] = {
        "about": {
            "benchmark": "claims",
            "mix of CAT": {f"{f}x": share for f, share in IMAGENET.items()},
            **({"quick": True} if quick else {}),
        },
        "claims": {name: [asdict(row) for row in rows()] for name, rows in groups.items()},
    }
    if not quick:
        report["comparison"] = comparison(results)
    return report


def _rounded(report: Mapping[str, Any]) -> dict[str, Any]:
    """Round figures of rows to six digits and compared ones to four; published ones stay as they are."""
    groups = {name: [_rounded_row(row) for row in rows] for name, rows in report["claims"].items()}
    return {**report, "claims": groups, "comparison": rounded(report.get("comparison", {}))}


def _rounded_row(row: Mapping[str, Any]) -> dict[str, Any]:
    def digits(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: digits(one) for key, one in value.items()}
        if isinstance(value, tuple):
            return [digits(one) for one in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return {**digits(row), "published": row["published"]}


def lines(report: Mapping[str, Any]) -> list[str]:
    """Format the report as text."""
    text = []
    for name, rows in report["claims"].items():
        text.append(name)
        for row in rows:
            cells = {
                "published": f"{row['published']}",
                "counted": counted_cell(row),
                "measured": measured_cell(row["measured"]),
            }
            given = ", ".join(f"{kind} {cell}" for kind, cell in cells.items() if cell)
            source = f" [{row['measured']['file']}]" if row["measured"] else ""
            text.append(f"  {row['claim']}, {row['unit']}: {given}{source}")
            if row["explanation"]:
                text.append(f"    {row['explanation']}")
    for use, figures in report.get("comparison", {}).items():
        text.append(use)
        for name, values in figures.items():
            columns = ", ".join(f"{column} {value:,.4g}" for column, value in values.items())
            text.append(f"  {name}: {columns}")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print and write the report. Return 2 for invalid usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE")
    parser.add_argument("--quick", action="store_true", help="without the comparison of memory and time")
    parser.add_argument("--results", type=Path, metavar="DIR", help="results whose figures come first")
    given = parser.parse_args(arguments)
    try:
        if given.results is not None and not given.results.is_dir():
            raise UserError(f"--results {given.results}: expected a folder of results")
        if given.json:
            require_writable(given.json)
        report = build(given.quick, Results(given.results))
    except UserError as error:
        console.print_error(error)
        return 2
    print("\n".join(lines(report)))
    if given.json:
        write_compact(given.json, _rounded(report))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
