"""Comparisons of the nano models on held-out images and fixed prompts.

    python -m benchmarks.nano_report --corpus corpus --out runs/nano_report

Writes report.json and samples.png. Each part is computed once: a part that report.json holds is kept unless
its models have changed, so an interrupted run resumes. A part whose model is missing is one line.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.nano.acceptable import correlations
from benchmarks.nano.chosen import chosen_ratios, describe_budget, expected_scores
from benchmarks.nano.emoji_classifier import CLASSES, Trained, train_classifier
from benchmarks.nano.intervals import mean_with_interval, paired_difference
from benchmarks.nano.reconstructions import Reconstructed, readable_pages, reconstruct_all, summarize
from benchmarks.nano.samples import (
    ENDING,
    Prompts,
    choose_classes,
    choose_guidance,
    draw,
    find_nearest,
    load_renderings,
    recognised,
    sample_sheet,
)
from benchmarks.shared import machine
from cat_fast.console import err
from cat_fast.data.files import write_json
from cat_fast.data.images.index import ImageRecord, read_index
from cat_fast.errors import UserError
from cat_fast.evaluation.tokenizers.text import require_tesseract
from cat_fast.inference import CATPipeline
from cat_fast.tokenizer import NestedAutoencoderKL

SETS = {"photographs": 256, "emoji": 128, "pages": 256}
"""Held-out sets and the side of their images in pixels."""
PAGES = 50
CUT = {
    "DiT-CAT against DiT-fixed-16x, proxy-FID-vgg16": "the generator twin was cut",
    "text-scored against JPEG-scored CAT": "the JPEG-adaptive twin was cut",
    "thresholds (2, 8) against (4, 7)": "the run was cut",
    "c = 4, 8, 16": "the runs with c = 4 and c = 8 were cut",
    "fixed 8x and 32x": "the runs were cut",
    "class-conditional samples": "the run was cut",
    "prompts outside the emoji": "the generator was trained on emoji only",
}
"""Figures that need a model that was not trained."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Comparisons of the nano models.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder that `cat-fast data corpus` wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/nano_report"), help="folder to write to")
    parser.add_argument("--model", default="nano", help="pipeline: nano, or a folder")
    parser.add_argument("--twin", default="nano-fixed-16x", help="fixed 16x tokenizer: a name, or a folder")
    given = parser.parse_args(arguments)
    try:
        report = Report(given.out / "report.json")
        report.compute(given.corpus, given.model, given.twin)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    print(f"written to {given.out}")
    return 0


class Report:
    """The parts of the report, stored in a JSON file as they are computed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def part(self, name: str, models: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a part; compute and store it unless it is stored for these models."""
        found = self.parts.get(name)
        if found is None or found["models"] != models:
            started = time.perf_counter()
            err.print(f"{time.strftime('%H:%M:%S')} {name}")
            try:
                found = {"models": models, **compute()}
            except UserError as error:
                found = {"models": models, "missing": str(error)}
            found["seconds"] = round(time.perf_counter() - started, 1)
            self.parts |= {name: found, "machine": machine.describe()}
            write_json(self.path, self.parts)
        return found

    def compute(self, corpus: Path, model: str, twin: str) -> None:
        """Compute all parts."""
        held_out = {name: _of_source(corpus / "held_out.jsonl", name) for name in SETS}
        nested = NestedAutoencoderKL.from_pretrained(_tokenizer_of(model))
        texts = self.part("texts", "", lambda: {"texts": _texts(held_out["pages"])})
        if "texts" in texts:
            held_out["pages"] = [one for one in held_out["pages"] if one.key in texts["texts"]]
        scores = expected_scores(read_index(corpus / "held_out.jsonl"))
        ratios = chosen_ratios(scores)
        self.part("budget of all held-out images", "", lambda: describe_budget(ratios))
        fingerprint = nested.fingerprint()
        self.part("tokenizer", fingerprint, lambda: _reconstructions(nested, held_out, texts.get("texts")))
        self.part(
            "twin",
            f"{fingerprint} {twin}",
            lambda: self._against_twin(twin, held_out, ratios, texts.get("texts")),
        )
        self.part("chosen ratios", fingerprint, lambda: self._chosen(held_out, scores, ratios))
        self.part("cut", "", lambda: {"lines": CUT})
        self.part("samples", model, lambda: self._samples(corpus, model))

    def _chosen(
        self, held_out: dict[str, list[ImageRecord]], scores: dict[str, float], ratios: dict[str, int]
    ) -> dict[str, Any]:
        """Return the PSNR at chosen ratios, and what predicts the maximum acceptable ratio."""
        images = self.parts["tokenizer"]["images"]
        every = [(name, i) for name in images for i in range(len(images[name]))]
        return {
            "psnr": {
                name: mean_with_interval([one["psnr"][str(ratios[one["key"]])] for one in images[name]])
                for name in images
            },
            "maximum acceptable ratio": {
                name: correlations(held_out[name], images[name], scores, ratios, SETS[name])
                for name in images
            },
            "maximum acceptable ratio, all": correlations(
                [held_out[name][i] for name, i in every],
                [images[name][i] for name, i in every],
                scores,
                ratios,
                SETS["emoji"],
            ),
        }

    def _against_twin(
        self,
        twin: str,
        held_out: dict[str, list[ImageRecord]],
        ratios: dict[str, int],
        texts: dict[str, str] | None,
    ) -> dict[str, Any]:
        """Compare the nested tokenizer at chosen ratios with its twin of one ratio, image by image."""
        fixed = _reconstructions(NestedAutoencoderKL.from_pretrained(_tokenizer_of(twin)), held_out, texts)
        ours = self.parts["tokenizer"]["images"]
        found: dict[str, Any] = {}
        faces = {one.key for one in held_out["photographs"] if one.has_faces}
        for name, images in fixed["images"].items():
            pairs = list(zip(ours[name], images, strict=True))
            found[name] = _differences(pairs, ratios)
            if with_faces := [pair for pair in pairs if pair[0]["key"] in faces]:
                found[f"{name} with faces"] = _differences(with_faces, ratios)
        return {"difference": found, "means": fixed["means"]}

    def _samples(self, corpus: Path, model: str) -> dict[str, Any]:
        pipeline = CATPipeline.from_pretrained(model)
        prompts = Prompts.load()
        training = [one for one in _of_source(corpus / "train.jsonl", "emoji") if not _has_skin_tone(one.key)]
        renderings = load_renderings(training)
        captions = [one.caption.removesuffix(ENDING) for one in training]
        classifier = _classifier(renderings, captions, prompts)
        count, side = len(prompts.trained), pipeline.resolution
        budget = (side // (16 * pipeline.transformer.config.patch_size)) ** 2
        trial = choose_guidance(pipeline, classifier, prompts)
        guidance = trial["chosen"]
        drawn = draw(pipeline, prompts.all, mean_tokens=budget, guidance=guidance)
        nearest = find_nearest(
            drawn.images, renderings, lambda images: pipeline.vae(images, ratio=16).sample.clamp(-1, 1)
        )
        sample_sheet(drawn, nearest, training).save(self.path.parent / "samples.png")
        found = {"within the budget of a fixed 16x": recognised(drawn, classifier, count)}
        for ratio in sorted(pipeline.transformer.config.ratios):
            again = draw(pipeline, prompts.all, ratio=ratio, guidance=guidance)
            found[f"{ratio}x"] = recognised(again, classifier, count)
        return {
            "recognised": found,
            "guidance": trial,
            "classifier": {"classes": CLASSES, "top1 on held-out augmentations": classifier.top1},
            "copies": sum(one.is_copy for one in nearest),
            "top 5 of the recombined prompts": dict(
                zip(prompts.recombined, classifier.top(drawn.images[count:]), strict=True)
            ),
        }


def _reconstructions(
    tokenizer: NestedAutoencoderKL, held_out: dict[str, list[ImageRecord]], texts: dict[str, str] | None
) -> dict[str, Any]:
    """Return means per set and ratio, and the figures of each image."""
    results: dict[str, list[Reconstructed]] = {
        name: reconstruct_all(tokenizer, held_out[name], side, texts=texts if name == "pages" else None)
        for name, side in SETS.items()
        if name != "pages" or texts
    }
    return {
        "means": {name: summarize(found) for name, found in results.items()},
        "images": {
            name: [
                {"key": one.key}
                | {
                    figure: {str(ratio): value for ratio, value in getattr(one, figure).items()}
                    for figure in ("psnr", "low_pass", "st_lpips", "error_rate")
                }
                for one in found
            ]
            for name, found in results.items()
        },
    }


def _texts(pages: Sequence[ImageRecord]) -> dict[str, str]:
    require_tesseract()
    return readable_pages(pages, SETS["pages"], PAGES)


def _differences(
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], ratios: dict[str, int]
) -> dict[str, Any]:
    """Return the paired difference of each figure: ours at chosen ratios minus the twin's at 16x."""
    return {
        figure: paired_difference(
            [ours[figure][str(ratios[ours["key"]])] for ours, _ in pairs],
            [theirs[figure]["16"] for _, theirs in pairs],
        )
        for figure in ("psnr", "st_lpips", "error_rate")
        if pairs[0][1][figure]
    }


def _classifier(renderings: torch.Tensor, captions: Sequence[str], prompts: Prompts) -> Trained:
    chosen = choose_classes(captions, prompts.trained)
    return train_classifier(renderings[chosen], [captions[i] for i in chosen])


def _of_source(index: Path, source: str) -> list[ImageRecord]:
    found = [one for one in read_index(index) if one.key.startswith(f"{source}/")]
    if not found:
        raise UserError(f"{index} has no images of {source}; build them with cat-fast data corpus")
    return found


def _has_skin_tone(key: str) -> bool:
    return any(f"1f3f{digit}" in key for digit in "bcdef")


def _tokenizer_of(model: str) -> str:
    """Return the folder or name of the tokenizer of a pipeline."""
    return str(Path(model) / "vae") if (Path(model) / "vae").is_dir() else model


if __name__ == "__main__":
    sys.exit(main())
