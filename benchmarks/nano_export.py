"""Export trained nano models into the package, in half precision and with model cards.

    python -m benchmarks.nano_export --tokenizer RUN --corpus DIR [--generator RUN --latents DIR]
        [--name NAME] [--report FILE]
    python -m benchmarks.nano_export --further RUN … [--average N] [--name NAME]

RUN is the folder of a complete run. With --generator, the model is a pipeline. --report is the report.json of
`make nano-report`, whose figures the cards then contain: export, measure, export again. --further replaces
the tokenizer of a shipped model after runs with `train_only`, in their order, by the average of the last N.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
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
from cat_fast.tokenizer import NestedAutoencoderKL
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
    run = parser.add_mutually_exclusive_group(required=True)
    run.add_argument("--tokenizer", type=Path, help="run of the tokenizer")
    run.add_argument(
        "--further", type=Path, nargs="+", help="runs that trained half of the shipped tokenizer, in order"
    )
    parser.add_argument("--average", type=int, default=1, help="number of the last runs to average")
    parser.add_argument("--corpus", type=Path, help="folder of `cat-fast data corpus`")
    parser.add_argument("--generator", type=Path, help="run of the text generator")
    parser.add_argument("--latents", type=Path, help="data.latents of the generator's run")
    parser.add_argument("--name", choices=NAMES, default=NAMES[0])
    parser.add_argument("--report", type=Path, help="report.json of make nano-report")
    given = parser.parse_args()
    if given.tokenizer and not given.corpus:
        parser.error("--tokenizer needs --corpus")
    try:
        if given.further:
            replace_tokenizer(SHIPPED / given.name / TOKENIZER, given.further, given.average)
        else:
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


def replace_tokenizer(folder: Path, runs: Sequence[Path], averaged: int) -> None:
    """Replace a shipped tokenizer by one whose latents fit it, and add its trainings to the card.

    Args:
        runs: in order, each from the weights of the one before it.
        averaged: number of the last runs whose weights are averaged.

    Raises:
        UserError: there are fewer runs, the latents of one do not fit, or it did not train one half.
    """
    if not 1 <= averaged <= len(runs):
        raise UserError(f"--average {averaged}: expected 1 to {len(runs)}, the number of runs")
    before, found, figures = (folder / CARD).read_text(encoding="utf-8").partition("## Figures\n")
    if not found:
        raise UserError(f"{folder / CARD}: no section Figures")
    models = [load_tokenizer(one, "cpu") for one in (folder, *(run / "model" for run in runs))]
    lines: list[str] = []
    for run, start, trained in zip(runs, models, models[1:], strict=False):
        if trained.latents_fingerprint() != models[0].latents_fingerprint():
            raise UserError(f"{run}: its latents do not fit {folder}; train with train_only")
        changed = _changed(start, trained)
        if len(changed) != 1:
            raise UserError(f"{run}: expected encoder or decoder to differ from its start, got {changed}")
        lines += [f"## Further training, of the {changed[0]} only", "", *_training(run), ""]
    if averaged > 1:
        lines += [f"The exported weights are the mean of those of the last {averaged} trainings.", ""]
    with torch.no_grad():
        states = [model.state_dict() for model in models[-averaged:]]
        mean = {name: sum(state[name] for state in states) / averaged for name in states[0]}
    tokenizer = models[-1]
    tokenizer.load_state_dict(mean)
    tokenizer.half().save_pretrained(folder)
    (folder / CARD).write_text(before + "\n".join([*lines, ""]) + found + figures, encoding="utf-8")


def _changed(before: NestedAutoencoderKL, after: NestedAutoencoderKL) -> list[str]:
    """Return the halves whose weights differ."""
    old, new = before.state_dict(), after.state_dict()
    names = {name.split(".")[0] for name, value in old.items() if not torch.equal(value.float(), new[name])}
    halves = {"encoder": {"encoder", "quant_conv"}, "decoder": {"decoder", "post_quant_conv"}}
    return [half for half, parts in halves.items() if names & parts]


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
        *_training(run),
    ]
    lines += ["", figures_section(figures)]
    lines += [
        "## Limits",
        "",
        "Sizes and training are hundreds of times below published ones. The tokenizer blurs fine detail at",
        "16x and 32x. The generator draws emoji at 128 px, mostly those of its training set.",
    ]
    return "\n".join(lines) + "\n"


def _training(run: Path) -> list[str]:
    """Return the lines of a card about a run: amounts, initial weights and curve."""
    records = read_metrics(run)
    total = summarize(records)
    lines = [
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
    return lines


if __name__ == "__main__":
    sys.exit(main())
