"""Figures of the nano dual-token tokenizer on held-out images.

    python -m benchmarks.dual_token --corpus corpus --runs runs --json FILE [--only PART]

--runs holds the output folders of configs/dual_token/nano_*.yaml, the tokenizer of `cat-fast dual combine` in
dual_tokenizer/, the results of `cat-fast dual eval` in dual_eval/, and the indexes of emoji that the semantic
branch is trained and evaluated on.

training     steps, time and last evaluation of each stage
guide        PSNR per guide size and use of the codebook, on two crops per held-out image of all sources
retrieval    image to text among 100 pairs of emoji, on average over draws of these pairs
codes        similarity of decoded embeddings and of text states, and use of the codebook, on held-out emoji
rerendering  the results of `cat-fast dual eval`
round_trip   errors of inversion and denoising: unit-variance data, a small UNet and the nano pipeline
language     bits per id on held-out emoji, and sampled sequences that decode
bounds       seconds to encode and to decode an image

Parts of FILE that are not computed are kept.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shared.harness import rounded
from benchmarks.shared.inversion_round_trip import (
    STEPS,
    exact_error,
    example_guides,
    model_error,
    save_tiny_stable_diffusion,
    stable_diffusions_schedule,
)
from benchmarks.shared.simple_program import about
from cat_fast import console
from cat_fast.data.files import require_writable, write_json
from cat_fast.data.images.index import read_index
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop
from cat_fast.data.images.random_crop import random_crop
from cat_fast.dual_token.codebook import usage
from cat_fast.dual_token.guide.model import GuideModel
from cat_fast.dual_token.language.model import DualLanguageModel
from cat_fast.dual_token.language.sampling import sample
from cat_fast.dual_token.rerender.open import open_backend
from cat_fast.dual_token.rerender.rerender import RerenderSettings
from cat_fast.dual_token.semantic.model import SemanticModel
from cat_fast.dual_token.semantic.reverse_qformer import state_loss
from cat_fast.dual_token.semantic.text_target import TextTarget, open_text_target
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.evaluation.intervals import mean_interval
from cat_fast.evaluation.metrics import mean_colour_psnr, psnr
from cat_fast.models.load import load_model
from cat_fast.processes.signals import run_command
from cat_fast.training.config.dual_token import PairDataConfig
from cat_fast.training.dual_token.encoded_pairs import read_encoded
from cat_fast.training.dual_token.language_evaluation import LanguageEvaluation
from cat_fast.training.dual_token.language_task import HELD_OUT, TRAIN
from cat_fast.training.dual_token.pairs import held_out_pairs
from cat_fast.training.dual_token.semantic_evaluation import CANDIDATES, SemanticEvaluation

STAGES = ("guide", "contrastive", "codes", "language")
GRIDS = (2, 4, 8, 16)
IMAGE_SIZE, VIEW_SIZE, MIN_CROP = 128, 64, 0.5
DRAWS, SAMPLES, TIMED_IMAGES = 50, 64, 2
NUM_STATES = 24
BOUNDS = {"encode_seconds": 1.0, "decode_seconds": 20.0}
"""Bounds of the nano tokenizer: seconds per image of 128 px, at 50 + 50 steps, on two cores."""
_BATCH = 16


class Folders:
    """Where the corpus, its emoji by split, and the trained parts are.

    Args:
        cpu_minutes: of the stages, as `time` reported them.
    """

    def __init__(self, corpus: Path, runs: Path, cpu_minutes: Mapping[str, float]) -> None:
        self.corpus, self.runs, self.cpu_minutes = corpus, runs, cpu_minutes
        self.training, self.held_out = runs / "dual_emoji.jsonl", runs / "dual_held_out_emoji.jsonl"

    def stage(self, name: str) -> Path:
        """Return the output folder of a stage.

        Raises:
            UserError: it has no trained model.
        """
        folder = self.runs / f"nano_dual_{name}"
        if not (folder / "model").is_dir():
            raise UserError(f"{folder}: no trained model; run `cat-fast dual train nano_{name}`")
        return folder

    def tokenizer(self) -> DualTokenizer:
        return DualTokenizer.from_pretrained(self.runs / "dual_tokenizer", "cpu")


def training(folders: Folders) -> dict[str, Any]:
    """Return steps, seconds in steps and the last evaluation of each stage that has been trained."""
    found = {}
    for name in STAGES:
        folder = folders.runs / f"nano_dual_{name}"
        if not (folder / "model").is_dir():
            continue
        rows = _json_lines(folder / "metrics.jsonl")
        evaluations = _json_lines(folder / "evaluation.jsonl")
        found[name] = {
            "steps": rows[-1]["step"] + 1,
            "cpu_minutes": folders.cpu_minutes.get(name),
            "seconds": sum(row["seconds"] for row in rows),
            "evaluation": evaluations[-1],
        }
    return found


@torch.no_grad()
def guide(folders: Folders) -> dict[str, Any]:
    """Measure guides of the centre square and of a random crop of every held-out image."""
    model = load_model(GuideModel, "guide", folders.stage("guide") / "model", "cpu").eval()
    crops = torch.stack(list(_crops(folders.corpus / "held_out.jsonl")))
    sizes: dict[str, Any] = {}
    total = torch.zeros(model.codebook_size, dtype=torch.int64)
    for side in GRIDS:
        grid, values, gains, limits = (side, side), [], [], []
        counts = torch.zeros_like(total)
        for x in crops.split(_BATCH):
            codes, target = model.encode(model.resize_input(x, grid)), model.resize_target(x, grid)
            values.append(psnr(model.decode(codes).float(), target))
            limits.append(mean_colour_psnr(target))
            gains.append(values[-1] - limits[-1])
            counts += torch.bincount(codes.flatten(), minlength=len(counts))
        total += counts
        sizes[f"{model.guide_size(grid)[0]}"] = {
            "tokens": side * side,
            "psnr": _mean(values),
            "mean_colour_psnr": _mean(limits),
            "gain": _mean(gains),
            **_usage(counts),
        }
    return {"crops": len(crops), "sizes": sizes, "codebook": {"size": len(total), **_usage(total)}}


@torch.no_grad()
def retrieval(folders: Folders) -> dict[str, Any]:
    """Measure retrieval of an image's text among those of 100 pairs, chance 1 %."""
    model, target = _semantic(folders, "contrastive")
    found = {}
    for name, index in (("held_out", folders.held_out), ("training", folders.training)):
        images, captions = _pairs(index, limit=600)
        views = torch.cat([model.embed_images(part) for part in images.split(_BATCH)])
        similarity = (views @ model.embed_texts(target.states(captions)).T).numpy()
        found[name] = {"pairs": len(captions), **retrieved(similarity, CANDIDATES, DRAWS)}
    return {"candidates": CANDIDATES, "draws": DRAWS, "sets": found}


def retrieved(similarity: np.ndarray, candidates: int, draws: int) -> dict[str, Any]:
    """Return the share of images whose own text is the most similar, and among the five most similar.

    Texts as similar as the own one are ahead of it. Both shares are means over draws of the candidates, with
    the middle 95 % of the draws.

    Args:
        similarity: (N, N), rows of images and columns of their texts.
    """
    random = np.random.default_rng(0)
    shares: dict[str, list[float]] = {"at_1": [], "at_5": []}
    for _ in range(draws):
        rows = random.permutation(len(similarity))[:candidates]
        own = similarity[np.ix_(rows, rows)]
        rank = (own >= own.diagonal()[:, None]).sum(1) - 1
        shares["at_1"].append(float((rank < 1).mean()))
        shares["at_5"].append(float((rank < 5).mean()))
    return {
        name: {
            "value": float(np.mean(values)),
            "interval": [float(bound) for bound in np.quantile(values, [0.025, 0.975])],
        }
        for name, values in shares.items()
    }


@torch.no_grad()
def codes(folders: Folders) -> dict[str, Any]:
    """Measure the codes of all held-out pairs; their text states also against mean training states."""
    model, target = _semantic(folders, "codes")
    config = _pair_config(folders.held_out)
    evaluation = SemanticEvaluation(config, len(read_index(config.held_out)), target, torch.device("cpu"))
    found = evaluation.evaluate(model, "codes")
    _, captions = _pairs(folders.training, limit=600)
    means = mean_states(target.states(captions), evaluation.sizes.tolist(), target.num_states)
    error, _, cosine = state_loss(means, None, evaluation.texts)
    return {
        "pairs": len(evaluation.texts),
        **{name.removeprefix("held_out/"): value for name, value in found.items() if "/seconds" not in name},
        "codebook_size": model.codebook_size,
        "mean_state": {"state_mse": error.item(), "state_cosine": cosine.item()},
    }


def mean_states(texts: Sequence[Tensor], sizes: Sequence[int], count: int) -> Tensor:
    """Return the best constant guess (N, count, T) of texts with a given number of states.

    That is the mean, at each place, over the texts of as many states, or over all states if there are none.

    Args:
        texts: states (n, T) of each text.
        sizes: numbers of states to guess for.
    """
    by_size: dict[int, list[Tensor]] = {}
    for states in texts:
        by_size.setdefault(len(states), []).append(states)
    everything = torch.cat(list(texts)).mean(0)
    guesses = everything.expand(len(sizes), count, -1).clone()
    for i, size in enumerate(sizes):
        if size in by_size:
            guesses[i, :size] = torch.stack(by_size[size]).mean(0)
    return guesses


def rerendering(folders: Folders) -> dict[str, Any]:
    """Return the results of `cat-fast dual eval` and its options."""
    folder = folders.runs / "dual_eval"
    if not (folder / "dual.json").is_file():
        raise UserError(f"{folder}: dual.json is missing; run `cat-fast dual eval ... -o {folder}`")
    result = json.loads((folder / "dual.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    names = ("steps", "strength", "guidance", "fixed_point")
    options = {name: settings[name] for name in names if name in settings}
    kept = ("images", "size", "methods", "differences", "codebooks")
    return {**options, **{name: result[name] for name in kept}}


def round_trip(folders: Folders) -> dict[str, Any]:
    """Measure the relative error of a round trip per number of steps."""
    schedule = stable_diffusions_schedule()
    with tempfile.TemporaryDirectory() as folder:
        tiny = open_backend(str(save_tiny_stable_diffusion(Path(folder))), "cpu")
        backends = {"tiny Stable Diffusion": tiny, "nano pipeline": open_backend("nano", "cpu")}
        found = {
            name: [model_error(one, example_guides(), n) for n in STEPS] for name, one in backends.items()
        }
    exact = {
        "unit variance": [exact_error(schedule, "epsilon", n) for n in STEPS],
        "unit variance, source timestep": [
            exact_error(schedule, "epsilon", n, source_timestep=True) for n in STEPS
        ],
    }
    return {"steps": list(STEPS), "errors": {**exact, **found}}


def language(folders: Folders) -> dict[str, Any]:
    """Measure bits per id on all held-out pairs, and sample sequences for their captions."""
    folder, tokenizer = folders.stage("language"), folders.tokenizer()
    model = load_model(DualLanguageModel, "language model", folder / "model", "cpu").eval()
    target = open_text_target("nano", NUM_STATES)
    pairs = read_encoded(folder / HELD_OUT)
    order = np.random.default_rng(0).permutation(len(pairs))
    evaluation = LanguageEvaluation(
        read_encoded(folder / TRAIN), [pairs[i] for i in order], target, len(tokenizer.vocabulary)
    )
    found = evaluation.evaluate(model)
    decoded, lengths = 0, set()
    for seed in range(SAMPLES):
        (text,) = target.states([evaluation.pairs[seed % len(pairs)].caption])
        ids = sample(
            model, tokenizer.vocabulary, text, seed, grids=[tokenizer.vocabulary.parse(pairs[0].ids).grid]
        )
        decoded += bool(tokenizer.decode_guides([tokenizer.vocabulary.parse(ids)]))
        lengths.add(len(ids))
    return {
        "pairs": len(pairs),
        **{name.removeprefix("held_out/"): value for name, value in found.items() if "/seconds" not in name},
        "samples": SAMPLES,
        "samples_decoded": decoded,
        "ids_per_sample": sorted(lengths),
    }


def bounds(folders: Folders) -> dict[str, Any]:
    """Measure the slowest of a few images, on one thread, after one that is not counted.

    CPU seconds are given with the elapsed ones, which other work on the machine delays.
    """
    tokenizer, threads = folders.tokenizer(), torch.get_num_threads()
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    found: list[dict[str, float]] = []
    try:
        for record in read_index(folders.held_out)[: TIMED_IMAGES + 1]:
            image = resize_center_crop(load_image(record.path), IMAGE_SIZE)
            tokens, encode = _timed(partial(tokenizer.encode, image, 16))
            settings = RerenderSettings(steps=50)
            _, decode = _timed(partial(tokenizer.decode, tokens, (IMAGE_SIZE, IMAGE_SIZE), settings))
            row = {"encode_seconds": encode[0], "decode_seconds": decode[0]}
            found.append({**row, "encode_cpu_seconds": encode[1], "decode_cpu_seconds": decode[1]})
    finally:
        torch.set_num_threads(threads)
    slowest = {name: max(row[name] for row in found[1:]) for name in found[0]}
    return {**slowest, "images": TIMED_IMAGES, "bounds": BOUNDS, "load": load}


def _timed(run: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """Return a result, and the elapsed and the CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, (time.perf_counter() - start, time.process_time() - cpu)


PARTS: dict[str, Callable[[Folders], dict[str, Any]]] = {
    "training": training,
    "guide": guide,
    "retrieval": retrieval,
    "codes": codes,
    "rerendering": rerendering,
    "round_trip": round_trip,
    "language": language,
    "bounds": bounds,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the parts. Return 2 for invalid usage or a missing model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="of `cat-fast data corpus`")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the training runs")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="results")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="part; may be repeated")
    parser.add_argument(
        "--cpu-minutes", nargs="*", default=[], metavar="STAGE=MINUTES", help="of the stages, from `time`"
    )
    given = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    try:
        folders = Folders(given.corpus, given.runs, _minutes(given.cpu_minutes))
        require_writable(given.json)
        found: dict[str, Any] = {}
        if given.json.is_file():
            found = json.loads(given.json.read_text(encoding="utf-8"))
        for name in given.only or PARTS:
            found[name] = rounded(PARTS[name](folders))
            print(json.dumps({name: found[name]}, indent=1), flush=True)
            ordered = {key: found[key] for key in PARTS if key in found}
            write_json(given.json, {**ordered, "about": about("dual_token", load)})
    except UserError as error:
        console.print_error(error)
        return 2
    return 0


def _minutes(given: Sequence[str]) -> dict[str, float]:
    """Return the minutes per stage.

    Raises:
        UserError: a stage that is unknown, or no number.
    """
    found = {}
    for text in given:
        name, _, minutes = text.partition("=")
        try:
            found[name] = float(minutes)
        except ValueError:
            name = ""
        if name not in STAGES:
            raise UserError(
                f"--cpu-minutes {text}: expected STAGE=MINUTES with a stage of {', '.join(STAGES)}"
            )
    return found


def _semantic(folders: Folders, stage: str) -> tuple[SemanticModel, TextTarget]:
    model = load_model(SemanticModel, "semantic branch", folders.stage(stage) / "model", "cpu").eval()
    return model, open_text_target("nano", NUM_STATES)


def _pair_config(index: Path) -> PairDataConfig:
    return PairDataConfig(held_out=str(index), image_size=VIEW_SIZE)


def _pairs(index: Path, limit: int) -> tuple[Tensor, list[str]]:
    """Return images and captions of at most `limit` pairs, spread over an index, with different captions."""
    return held_out_pairs(_pair_config(index), limit)


def _crops(index: Path) -> Iterator[Tensor]:
    for number, record in enumerate(read_index(index)):
        image, random = load_image(record.path), np.random.default_rng([0, number])
        yield image_to_tensor(resize_center_crop(image, IMAGE_SIZE))
        yield image_to_tensor(random_crop(image, random, IMAGE_SIZE, MIN_CROP, False))


def _usage(counts: Tensor) -> dict[str, float]:
    used = usage(counts)
    return {"codes_used": used.share, "perplexity": used.perplexity}


def _mean(values: Sequence[Tensor]) -> dict[str, Any]:
    estimate = mean_interval(torch.cat(list(values)).tolist())
    assert estimate is not None
    return {"value": estimate.value, "interval": [estimate.low, estimate.high]}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(run_command(main))
