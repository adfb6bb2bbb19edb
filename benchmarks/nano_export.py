"""Export trained nano models into the package, in half precision and with model cards.

    python -m benchmarks.nano_export --tokenizer RUN --corpus DIR [--generator RUN --latents DIR]
        [--name NAME] [--report FILE]

RUN is the folder of a complete run. With --generator, the model is a pipeline. --report is the report.json of
`make nano-report`, whose figures the cards then contain: export, measure, export again.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.nano.cards import CARD, figures_section, write_tables
from benchmarks.nano.tables import tables, twin_tables
from cat_fast.complexity import RatioThresholds
from cat_fast.complexity.sentence_package import HUB_NAME
from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.errors import UserError
from cat_fast.inference.pipeline.assembly import assemble, read_latent_facts
from cat_fast.models.load import load_tokenizer
from cat_fast.processor import processor_name
from cat_fast.training.checkpoints.initial_weights import RECORD
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.metrics.throughput import summarize
from cat_fast.weights.shipped import NAMES, SHIPPED, TOKENIZER, TRANSFORMER

CURVE = 10
"""Number of points of a training curve in a card."""
LABEL = "emoji"
THRESHOLDS = RatioThresholds(2, 8)
"""Pair that costs at most a fixed 16x on the training captions; see docs/nano.md."""


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Export nano models into the package.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="run of the tokenizer")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of `cat-fast data corpus`")
    parser.add_argument("--generator", type=Path, help="run of the text generator")
    parser.add_argument("--latents", type=Path, help="data.latents of the generator's run")
    parser.add_argument("--name", choices=NAMES, default=NAMES[0])
    parser.add_argument("--report", type=Path, help="report.json of make nano-report")
    given = parser.parse_args()
    try:
        export(given)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


def export(given: argparse.Namespace) -> None:
    """Write the model, its cards and the tables of the demo."""
    folder = SHIPPED / given.name
    report = json.loads(given.report.read_text(encoding="utf-8")) if given.report else {}
    corpus = json.loads((given.corpus / "corpus.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(given.tokenizer / "model", "cpu")
    shutil.rmtree(folder, ignore_errors=True)
    if given.generator is None:
        tokenizer.half().save_pretrained(folder / TOKENIZER)
    else:
        facts = read_latent_facts(given.latents)
        pipeline = assemble(
            tokenizer,
            given.generator / "model",
            [LABEL],
            resolution=facts.resolution,
            thresholds=THRESHOLDS,
            text_encoder=HUB_NAME,
            **_sampling(report),
        )
        pipeline.to(torch.float16)
        pipeline.save_pretrained(folder)
        latents = len(LatentDataset(given.latents).entries)
        card = _card(
            "Text-conditional diffusion transformer",
            given.generator,
            corpus,
            ["emoji"],
            tables(report),
            latents,
        )
        (folder / TRANSFORMER / CARD).write_text(card, encoding="utf-8")
        write_tables(folder, report)
    nested = len(tokenizer.ratios) > 1
    title = "Nested tokenizer" if nested else "Fixed 16x tokenizer"
    figures = tables(report) if nested else twin_tables(report)
    card = _card(title, given.tokenizer, corpus, list(corpus["images"]), figures)
    (folder / TOKENIZER / CARD).write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.2f} MiB")


def _sampling(report: dict[str, Any]) -> dict[str, Any]:
    """Return the number of steps and the guidance scale that a report chose; none without a report."""
    if "sampling" not in report.get("samples", {}):
        return {}
    trial = report["samples"]["sampling"]
    guidance = {int(ratio): scale for ratio, scale in trial["guidance"].items()}
    return {"num_inference_steps": trial["steps"], "guidance_scale": guidance}


def _card(
    title: str,
    run: Path,
    corpus: dict[str, Any],
    sources: list[str],
    figures: list[dict[str, Any]],
    latents: int | None = None,
) -> str:
    """Return a model card: data and licences, training, curve, figures and limits.

    Args:
        figures: tables of the report; none before it.
        latents: number of latents that a generator was trained on, several per selected image.
    """
    records = read_metrics(run)
    total = summarize(records)
    lines = [f"# {title} of the nano models", ""]
    lines += [
        "## Data and licences",
        "",
        "| source | training images | held out | licence |",
        "|---|---|---|---|",
    ]
    for source in sources:
        counts = corpus["images"][source]
        row = [source, counts["train"], counts["held_out"], corpus["licences"][source]]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    if latents is not None:
        lines += [
            "",
            f"Trained on some of these (docs/nano.md): {latents} latents, several per image.",
        ]
    lines += [
        "",
        "Built by `cat-fast data corpus` from pinned Debian packages, split by source file. The weights are",
        "separate from the code; of GPL and CC-BY-SA sources no image is part of this repository.",
        "",
        "## Training",
        "",
        f"{total['steps']} steps, {total['images']} images, {total['hours']:.2f} hours on one core of",
        f"{processor_name()}, {total['flops'] / 1e12:.0f} TFLOP in fp32. The exported weights are the",
        "average (EMA), in fp16.",
    ]
    if (run / RECORD).is_file():
        started = json.loads((run / RECORD).read_text(encoding="utf-8"))
        lines += ["", f"The run started from the weights {started['weights']} of {started['folder']}."]
    lines += ["", "| step | loss, mean since the row above |", "|---|---|"]
    for i in range(CURVE):
        part = records[i * len(records) // CURVE : (i + 1) * len(records) // CURVE]
        lines.append(f"| {part[-1]['step'] + 1} | {sum(one['loss'] for one in part) / len(part):.4f} |")
    lines += ["", figures_section(figures)]
    lines += [
        "## Limits",
        "",
        "Sizes and training are hundreds of times below published ones. The tokenizer blurs fine detail at",
        "16x and 32x. The generator draws emoji at 128 px, mostly those of its training set.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
