"""Comparisons of the nano models on held-out images and fixed prompts.

    python -m benchmarks.nano_report --corpus corpus --out runs/nano_report

Writes report.json and samples.png. Each part is computed once: a part that report.json holds is kept unless
its models have changed, so an interrupted run resumes. A part whose model is missing is one line, and is
computed by the same command once the model exists.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.nano.acceptable import correlations
from benchmarks.nano.chosen import chosen_ratios, describe_budget, expected_scores
from benchmarks.nano.emoji_classifier import CLASSES
from benchmarks.nano.emoji_data import EmojiData, of_source, training_emoji
from benchmarks.nano.generators import IMAGES, compare, features_of, judge, weights_digest
from benchmarks.nano.intervals import mean_with_interval, paired_difference
from benchmarks.nano.reconstructions import Reconstructed, readable_pages, reconstruct_all, summarize
from benchmarks.nano.samples import Sampling, choose_sampling, draw, find_nearest, recognised, sample_sheet
from benchmarks.shared import machine
from cat_fast.complexity import tokens_per_image
from cat_fast.console import err
from cat_fast.data.files import write_json
from cat_fast.data.images.index import ImageRecord, read_index
from cat_fast.errors import UserError
from cat_fast.evaluation.tokenizers.text import require_tesseract
from cat_fast.inference import CATPipeline
from cat_fast.inference.pipeline.folder import pipeline_digest
from cat_fast.tokenizer import NestedAutoencoderKL

SETS = {"photographs": 256, "landscapes": 256, "emoji": 128, "pages": 256}
"""Held-out sets and the side of their images in pixels."""
PAGES = 50
CUT = {
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
    parser.add_argument(
        "--twin-pipeline",
        type=Path,
        default=Path("runs/nano_corpus_fixed_16x_pipeline"),
        help="folder of the fixed 16x pipeline",
    )
    given = parser.parse_args(arguments)
    try:
        report = Report(given.out / "report.json")
        report.compute(given.corpus, given.model, given.twin, given.twin_pipeline)
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
        if found is None or found["models"] != models or "missing" in found:
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

    def compute(self, corpus: Path, model: str, twin: str, twin_pipeline: Path) -> None:
        """Compute all parts."""
        held_out = {name: of_source(corpus / "held_out.jsonl", name) for name in SETS}
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
        pipeline = CATPipeline.from_pretrained(model)
        weights, emoji = weights_digest(pipeline.transformer), EmojiData(training_emoji(corpus))
        self.part("samples", weights, lambda: self._samples(pipeline, emoji))
        self.part("generator", weights, lambda: self._generator(pipeline, emoji))
        theirs = pipeline_digest(twin_pipeline) if twin_pipeline.is_dir() else "missing"
        self.part("generator twin", f"{weights} {theirs}", lambda: self._generator_twin(twin_pipeline, emoji))

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

    def _samples(self, pipeline: CATPipeline, emoji: EmojiData) -> dict[str, Any]:
        """Draw the fixed prompts within the budget of a fixed 16x, and at each ratio; write the sheet."""
        prompts, classifier = emoji.prompts, emoji.classifier
        count = len(prompts.trained)
        sampling, trial = choose_sampling(pipeline, classifier, prompts)
        options: dict[str, Any] = {"steps": sampling.steps, "guidance": sampling.guidance}
        drawn = draw(pipeline, prompts.all, mean_tokens=_budget(pipeline), **options)
        nearest = find_nearest(
            drawn.images, emoji.renderings, lambda images: pipeline.vae(images, ratio=16).sample.clamp(-1, 1)
        )
        found = {"within the budget of a fixed 16x": recognised(drawn, classifier, count)}
        hits = found["within the budget of a fixed 16x"]["found"]
        sample_sheet(drawn, nearest, emoji.records, hits).save(self.path.parent / "samples.png")
        for ratio in sorted(pipeline.transformer.config.ratios):
            again = draw(pipeline, prompts.all, ratio=ratio, **options)
            found[f"{ratio}x"] = recognised(again, classifier, count)
        return {
            "recognised": found,
            "sampling": trial,
            "classifier": {"classes": CLASSES, "top1 on held-out augmentations": classifier.top1},
            "copies": sum(one.is_copy for one in nearest),
            "distance to the nearest training image": mean_with_interval([one.distance for one in nearest]),
            "top 5 of the recombined prompts": dict(
                zip(prompts.recombined, classifier.top(drawn.images[count:]), strict=True)
            ),
        }

    def _generator(self, pipeline: CATPipeline, emoji: EmojiData) -> dict[str, Any]:
        """Draw training captions within the budget of a fixed 16x; return recognised samples, FID and KID."""
        trial = self.parts["samples"]["sampling"]
        sampling = Sampling({int(ratio): scale for ratio, scale in trial["guidance"].items()}, trial["steps"])
        return self._judge(pipeline, emoji, sampling)

    def _generator_twin(self, folder: Path, emoji: EmojiData) -> dict[str, Any]:
        """Do the same with the fixed 16x pipeline, at its own best guidance and as many steps."""
        pipeline = CATPipeline.from_pretrained(folder)
        sampling, trial = choose_sampling(pipeline, emoji.classifier, emoji.prompts)
        steps = self.parts["samples"]["sampling"]["steps"]
        found = self._judge(pipeline, emoji, Sampling(sampling.guidance, steps))
        difference = compare(self.parts["generator"], found)
        return found | {"sampling": trial, "recognised, CAT - fixed 16x": difference}

    def _judge(self, pipeline: CATPipeline, emoji: EmojiData, sampling: Sampling) -> dict[str, Any]:
        chosen = emoji.evenly_spaced(IMAGES)
        captions = [emoji.captions[i] for i in chosen]
        reference = features_of(emoji.renderings[chosen])
        return judge(pipeline, emoji.classifier, captions, sampling, _budget(pipeline), reference)


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


def _budget(pipeline: CATPipeline) -> int:
    """Return the number of tokens of an image at 16x."""
    return tokens_per_image(16, pipeline.resolution, pipeline.transformer.config.patch_size)


def _tokenizer_of(model: str) -> str:
    """Return the folder or name of the tokenizer of a pipeline."""
    return str(Path(model) / "vae") if (Path(model) / "vae").is_dir() else model


if __name__ == "__main__":
    sys.exit(main())
