"""Memory and time of CAT against fixed 8x, 16x and 32x: encoding, decoding, training and generating.

Memory is counted. Times on GPUs are bounds and predictions from data sheets, not measurements. Measured
figures are those of the newest results of the autoencoder and of training steps, and name their machine.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.bounds.data_sheets import Assumptions, DataSheet, read_sheets
from benchmarks.bounds.steps import (
    BF16,
    dit_step,
    predicted_seconds,
    transformer,
    transformer_calls,
    vae_step,
)
from benchmarks.efficiency import costs
from benchmarks.efficiency.row import Results, figure
from benchmarks.shared.committed import machine_slug
from benchmarks.shared.mixes import IMAGENET, MAX_TOKENS, TOKENS
from cat_fast.training.checkpoints.engine_state import parameter_count

GPUS = ("A100", "H100")
TOKENIZER_IMAGES = 8
"""Images of a rank's step of the tokenizer."""
GENERATING = "generating, 250 steps with guidance"
TRAINING_TOKENIZER, TRAINING_TRANSFORMER = "training the tokenizer", "training the transformer"
MEASURED_STEPS = {
    TRAINING_TOKENIZER: ("train.tokenizer", "CAT's tokenizer"),
    TRAINING_TRANSFORMER: ("train.transformer", "DiT-S/2"),
    GENERATING: ("generate", "DiT-S/2"),
}
"""Cases of `benchmarks.training_steps`, and the model that they measure."""
STATES = "weights, gradients, AdamW, EMA, MiB"
Figures = Iterator[tuple[str, float]]


def comparison(results: Results) -> dict[str, Any]:
    """Return memory and time per image by use and figure, of fixed ratios and CAT."""
    sheets, assumed = read_sheets()
    chosen = {name: sheets[name] for name in GPUS}
    found: dict[str, dict[str, dict[int, float]]] = {}
    for ratio in costs.RATIOS:
        coded = costs.coding(costs.tokenizer_config(ratio), ratio)
        uses = {
            **{use: _coding(counts, chosen, assumed) for use, counts in coded.items()},
            TRAINING_TOKENIZER: _tokenizer_training(ratio, chosen, assumed),
            TRAINING_TRANSFORMER: _transformer_training(ratio, chosen, assumed),
            GENERATING: _generating(ratio, chosen, assumed),
        }
        for use, figures in uses.items():
            for name, value in figures:
                found.setdefault(use, {}).setdefault(name, {})[ratio] = value
    rows = {use: _with_mix(figures) for use, figures in found.items()}
    nested = costs.tokenizer_parameters("cat_c16")
    for use in ("encode", "decode"):
        rows[use]["weight MiB"]["CAT"] = 4 * nested / 2**20
    parameters = vae_step("nested", "cat_c16", 16, TOKENIZER_IMAGES, 1).parameters
    rows[TRAINING_TOKENIZER][STATES]["CAT"] = costs.training_states(**parameters) / 2**20
    rows[GENERATING]["weight MiB"]["CAT"] = _generating_weights(nested) / 2**20
    for use, by_figure in (*_measured_coding(results), *_measured_steps(results)):
        rows[use] |= by_figure
    return rows


def _coding(counts: Mapping[str, Any], sheets: Mapping[str, DataSheet], assumed: Assumptions) -> Figures:
    yield "GFLOPs", counts["flops"] / 1e9
    yield "activation MiB", counts["peak_bytes"] / 2**20
    yield "weight MiB", counts["weight_bytes"] / 2**20
    for name, sheet in sheets.items():
        yield f"{name} bound, ms", 1e3 * costs.bound_seconds(counts["calls"], sheet)
        yield f"{name} predicted, ms", 1e3 * predicted_seconds(counts["calls"], sheet, assumed)


def _tokenizer_training(ratio: int, sheets: Mapping[str, DataSheet], assumed: Assumptions) -> Figures:
    config = costs.tokenizer_config(ratio)
    step = vae_step(config, config, ratio, TOKENIZER_IMAGES, 64)
    yield "GFLOPs", step.flops / step.images / 1e9
    yield STATES, costs.training_states(**step.parameters) / 2**20
    two, three = (costs.training_memory(config, ratio, images) for images in (2, 3))
    yield "activation MiB", (three - two) / 2**20
    yield from _step_times(step, sheets, assumed)


def _transformer_training(ratio: int, sheets: Mapping[str, DataSheet], assumed: Assumptions) -> Figures:
    tokens = TOKENS[ratio]
    step = dit_step("cat_xl", "cat_xl", [tokens] * (MAX_TOKENS // tokens), 16)
    yield "GFLOPs", step.flops / step.images / 1e9
    yield STATES, costs.training_states(autoencoder=step.parameters["transformer"]) / 2**20
    kept = costs.transformer_activation_bytes(transformer("cat_xl"), tokens)
    yield "activation MiB", kept / 2**20
    yield from _step_times(step, sheets, assumed)


def _generating(ratio: int, sheets: Mapping[str, DataSheet], assumed: Assumptions) -> Figures:
    """Yield figures of a batch that fills MAX_TOKENS, with both passes of an image in one pack."""
    tokens, config = TOKENS[ratio], costs.tokenizer_config(ratio)
    model = transformer("cat_xl")
    calls = transformer_calls(model, [tokens] * (MAX_TOKENS // tokens), backward=False)
    decoding = costs.coding(config, ratio, half=True)["decode"]
    repeats = costs.STEPS * costs.PASSES * tokens / MAX_TOKENS
    yield "GFLOPs", (repeats * sum(call.required for call in calls) + decoding["flops"]) / 1e9
    yield "activation MiB, denoising", costs.PASSES * costs.denoising_bytes(model, tokens) / 2**20
    yield "activation MiB, decoding", decoding["peak_bytes"] / 2**20
    yield "weight MiB", _generating_weights(costs.tokenizer_parameters(config)) / 2**20
    for name, sheet in sheets.items():
        bound = repeats * costs.bound_seconds(calls, sheet) + costs.bound_seconds(decoding["calls"], sheet)
        yield f"{name} bound, ms", 1e3 * bound
        steps = repeats * predicted_seconds(calls, sheet, assumed)
        decoded = predicted_seconds(decoding["calls"], sheet, assumed)
        yield f"{name} predicted, ms", 1e3 * (steps + decoded)
        yield f"{name} predicted, of which decoding, ms", 1e3 * decoded


def _step_times(step: Any, sheets: Mapping[str, DataSheet], assumed: Assumptions) -> Figures:
    for name, sheet in sheets.items():
        yield f"{name} bound, ms", 1e3 * max(step.bound_seconds(sheet)) / step.images
        yield f"{name} predicted, ms", 1e3 * step.predicted_seconds(sheet, assumed) / step.images


def _generating_weights(tokenizer_parameters: int) -> int:
    return BF16 * (parameter_count(transformer("cat_xl")) + tokenizer_parameters)


def _with_mix(figures: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    """Return figures by column: those of the ratios, and CAT's."""
    return {
        name: {**{f"{ratio}x": value for ratio, value in values.items()}, "CAT": _of_mix(name, values)}
        for name, values in figures.items()
    }


def _of_mix(name: str, values: Mapping[int, float]) -> float:
    """Return the mean over the mix on ImageNet; memory is that of the largest image."""
    return max(values.values()) if "MiB" in name else costs.mean_over(values, IMAGENET)


def coding_case(ratio: int, use: str) -> str:
    """Return the key of encoding or decoding an image in fp32, in results of the autoencoder."""
    return f"cases/heads512.{ratio}x.{use}.fp32"


def _measured_coding(results: Results) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Yield measured times and memory of encoding and decoding an image in fp32."""
    for use in ("encode", "decode"):
        times = {ratio: f"{coding_case(ratio, use)}/seconds/ours/median" for ratio in costs.RATIOS}
        peaks = {ratio: f"{coding_case(ratio, use)}/peak_bytes/ours" for ratio in costs.RATIOS}
        name, content = results.read("autoencoder", "about", *times.values(), *peaks.values())
        where = f"measured on {machine_slug(content['about'])}"
        figures = {
            f"{where}, ms": {ratio: 1e3 * figure(content, key, name) for ratio, key in times.items()},
            f"{where}, MiB": {ratio: figure(content, key, name) / 2**20 for ratio, key in peaks.items()},
        }
        yield use, _with_mix(figures)


def _measured_steps(results: Results) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Yield measured times and memory of training and generating, of the cases that a result has."""
    columns = {**{f"fixed_{ratio}x": f"{ratio}x" for ratio in costs.RATIOS}, "mix": "CAT"}
    for use, (prefix, model) in MEASURED_STEPS.items():
        for _, content in results.files("training_steps"):
            measured = content.get("cases", {})
            cases = {
                column: case
                for name, column in columns.items()
                if "images" in (case := measured.get(f"{prefix}.{name}", {})).get("rates", {})
                and case.get("right", True)
            }
            if cases:
                where = f"measured on {machine_slug(content['about'])} with {model}"
                times = {column: 1e3 / case["rates"]["images"] for column, case in cases.items()}
                peaks = {column: case.get("peak_bytes", {}).get("ours") for column, case in cases.items()}
                known = {column: peak / 2**20 for column, peak in peaks.items() if peak is not None}
                yield (
                    use,
                    {f"{where}, ms": times} | ({f"{where}, MiB of the step": known} if known else {}),
                )
                break
