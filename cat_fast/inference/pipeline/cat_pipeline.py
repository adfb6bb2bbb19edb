"""`CATPipeline`: a diffusers pipeline from labels or descriptions to images at a ratio chosen per image.

    pipeline = CATPipeline.from_pretrained("runs/demo/pipeline").to("cuda")
    output = pipeline(["sky", "text"], num_inference_steps=50)
    output.images[0].save("sky.png")

A call runs `plan` (prompts to requests), `batches` (requests that share a forward pass) and `draw` per batch.
For large runs, call these steps directly. A `PackedEngine` draws the images, so their bits do not depend on
the others of a batch.
"""

import difflib
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import diffusers
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput

from cat_fast.complexity import (
    Description,
    RatioThresholds,
    Score,
    default_scorer,
    default_thresholds,
    describe_labels,
    ratios_within_budget,
    require_scores,
)
from cat_fast.data.files import require_writable
from cat_fast.data.images.io import tensor_to_image
from cat_fast.errors import UserError, one_line
from cat_fast.generator import DiT, SampleRequest
from cat_fast.generator.diffusion import Schedule, check_betas
from cat_fast.generator.noise import CounterNoise
from cat_fast.generator.sampling import Guidance, SamplingState, guidance_scales, passes_of
from cat_fast.generator.solvers import Sampler
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.inference.engine.admission import check_room
from cat_fast.inference.engine.engine import PackedEngine
from cat_fast.inference.engine.order import FifoPacked
from cat_fast.inference.engine.report import StepReport
from cat_fast.inference.engine.request import EngineRequest
from cat_fast.inference.pipeline.components import OPTIONAL, check_classes, check_fit
from cat_fast.inference.pipeline.folder import INDEX, check_folder, find_damage, find_folder
from cat_fast.integers import to_integer
from cat_fast.kernels.pack.op import pack
from cat_fast.models.decode_tier import decode_tier, use_decode_tier
from cat_fast.packing import TokenBudgetPacker
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.weights.checked_model import LOADING_OPTIONS, check_options

MAX_TOKENS = 16_384
MAX_SEED = 2**64 - 1
"""Largest seed of a `torch.Generator`."""
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PIPELINE_OPTIONS = (
    *sorted({*LOADING_OPTIONS} - {"flashpack_kwargs", "output_loading_info", "parallel_config", "subfolder"}),
    "custom_pipeline",
    "custom_revision",
    "load_connected_pipeline",
    "provider",
    "provider_options",
    "sess_options",
    "trust_remote_code",
    "use_onnx",
)
"""Options of diffusers' `DiffusionPipeline.from_pretrained`."""

Prompt = str | int | Description
"""A label, its index, or a description; a string that is not a label is a description."""
OutputType = Literal["pil", "np", "pt", "latent"]
Callback = Callable[["CATPipeline", int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]
"""Called as ``callback(pipeline, step, timestep, callback_kwargs)``, as in diffusers."""


@dataclass
class CATOutput(BaseOutput):
    """Images of one call, in the order of its prompts."""

    images: Any
    """List of PIL images or (c, h, w) latents, or (N, H, W, 3) array or (N, 3, H, W) tensor in [0, 1]."""
    ratios: list[int]
    """Compression ratio of each image."""
    tokens: list[int]
    """Number of tokens of each image."""


class CATPipeline(DiffusionPipeline):
    """Pipeline for class- and text-conditional generation at a compression ratio chosen per image.

    Args:
        vae: decodes the latents.
        transformer: DiT trained on latents of this `vae`.
        scheduler: noise schedule of its training, or another scheduler made from its configuration.
        text_encoder: encoder that the transformer was trained with, if it was trained with text.
        labels: class names of the transformer, in order; the class numbers if None.
        thresholds: map complexity scores to ratios for ``ratio="auto"``; `default_thresholds()` if None.
        resolution: default side of the images in pixels; if None, the one at which the grid of the lowest
            ratio fills the transformer's `position_frame`.
        descriptions: description of each label, scored for ``ratio="auto"`` and encoded by `text_encoder`;
            "this is an image of LABEL" if None, with the packaged flags if all labels are classes of
            ImageNet. Set `has_text` and `has_faces` of other classes here.
        num_inference_steps, guidance_scale: defaults of a call; see `__call__`. Those here are the paper's.

    Raises:
        UserError: components of another class, or that were not trained together.
    """

    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"
    _optional_components = list(OPTIONAL)  # noqa: RUF012 # diffusers' own attribute
    _callback_tensor_inputs = ("latents",)

    vae: NestedAutoencoderKL
    transformer: DiT
    scheduler: Schedule
    text_encoder: TextEncoder | None

    def __init__(
        self,
        vae: NestedAutoencoderKL,
        transformer: DiT,
        scheduler: Schedule,
        text_encoder: TextEncoder | None = None,
        *,
        labels: Sequence[str] | None = None,
        thresholds: RatioThresholds | Sequence[int] | None = None,
        resolution: int | None = None,
        descriptions: Sequence[Description] | Sequence[Mapping[str, Any]] | None = None,
        num_inference_steps: int = 250,
        guidance_scale: Guidance | Mapping[str, float] = 1.5,
    ) -> None:
        super().__init__()
        parts = {
            "vae": vae,
            "transformer": transformer,
            "scheduler": scheduler,
            "text_encoder": text_encoder,
        }
        check_classes(parts)
        config = transformer.config
        if labels is None:
            labels = [str(number) for number in range(config.num_classes)]
        if resolution is None:
            resolution = config.position_frame * min(config.ratios) * config.patch_size
        check_fit(vae, transformer, text_encoder)
        check_betas(transformer, scheduler)
        _check_settings(labels, resolution, descriptions, config.num_classes)
        self.register_modules(**parts)
        vae.eval()
        transformer.eval()
        self._labels = list(labels)
        self._thresholds = _as_thresholds(thresholds)
        self._descriptions = list(map(_as_description, descriptions or describe_labels(labels)))
        self._guidance = _as_guidance(guidance_scale, config.ratios)
        steps = to_integer("num_inference_steps", num_inference_steps)
        if steps < 1:
            raise UserError(f"num_inference_steps: expected at least 1, got {steps}")
        self._class_of = {label: number for number, label in enumerate(self._labels)}
        self.register_to_config(
            labels=self._labels,
            thresholds=list(self._thresholds.pair),
            resolution=resolution,
            descriptions=[asdict(description) for description in self._descriptions],
            num_inference_steps=steps,
            guidance_scale=self._guidance,
        )

    @property
    def labels(self) -> list[str]:
        """Class names, in order."""
        return self._labels

    @property
    def descriptions(self) -> list[Description]:
        """Description of each label."""
        return self._descriptions

    @property
    def thresholds(self) -> RatioThresholds:
        """Complexity scores at which the ratio changes."""
        return self._thresholds

    @property
    def resolution(self) -> int:
        """Default side of the images in pixels."""
        return self.config["resolution"]

    @property
    def default_steps(self) -> int:
        """Number of steps of a call that gives none."""
        return self.config["num_inference_steps"]

    @property
    def default_guidance(self) -> Guidance:
        """Guidance scale of a call that gives none."""
        return self._guidance

    @property
    def decode_tier(self) -> str:
        """Tier in which latents are decoded: "exact", or "fast" for a compiled decoder."""
        return decode_tier(self.vae)

    def use_decode_tier(self, tier: str) -> str:
        """Decode in a tier from now on, and return the tier in use.

        Args:
            tier: "exact" runs the decoder operator by operator; "fast" compiles it for images of about
                `resolution`, which takes from seconds to minutes. If that fails, or if its images agree with
                those of "exact" to less than 60 dB, a warning is logged and "exact" is used.

        Raises:
            UserError: the tier is unknown.
        """
        return use_decode_tier(self.vae, tier, self.resolution)

    def nearest_ratio(self, ratio: int) -> int:
        """Return `ratio`, or the nearest ratio that the transformer supports."""
        return min(sorted(self.transformer.config.ratios), key=lambda served: abs(math.log2(served / ratio)))

    @torch.no_grad()
    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        ratio: Literal["auto"] | int = "auto",
        mean_tokens: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: Guidance | None = None,
        guidance_channels: int | None = None,
        scheduler: Sampler | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        max_tokens: int = MAX_TOKENS,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> CATOutput:
        """Draw one image per prompt.

        Args:
            prompts: labels, class numbers or, for a transformer trained with text, descriptions.
            ratio: compression ratio of all images, or "auto" to choose it from each prompt's complexity.
            mean_tokens: budget of tokens per image for this call, used in place of `ratio`.
            height, width: size of the images in pixels; `resolution` if None. Both must be multiples of
                ratio * patch_size.
            num_inference_steps: number of steps of the scheduler; `default_steps` if None.
            guidance_scale: classifier-free guidance scale; 1 disables guidance. A mapping from ratios, such
                as {8: 2.0, 16: 3.0, 32: 4.0}, has one scale per ratio. `default_guidance` if None.
            guidance_channels: number of leading latent channels to guide; None for all, 3 for the original
                DiT's guidance.
            scheduler: "ddpm", "ddim", "dpm++" or, for a flow, "euler", used in place of the pipeline's
                scheduler. "ddim" and "dpm++" need 30 to 50 steps.
            generator: one generator per image, whose seed and state alone determine its noise; each use
                advances it. A single one seeds a generator per image if there are several; None takes the
                seeds from torch's default generator.
            max_tokens: maximum number of tokens per forward pass, with the unconditional half of guidance.
            output_type: "pil", "np" or "pt" for images, "latent" for latents in the transformer's scale.
            return_dict: return a `CATOutput`; otherwise a tuple (images, ratios, tokens).
            callback_on_step_end: called as ``callback(pipeline, step, timestep, callback_kwargs)`` after
                every step of every batch; may return a dictionary with other "latents".
            callback_on_step_end_tensor_inputs: keys of `callback_kwargs`. "latents" is the list of latents of
                the batch, (c, h, w) each.

        Raises:
            UserError: an unknown label, ratio, scheduler or output type, a size that does not divide into
                patches, a wrong number of generators, or a token budget too small for one image.
        """
        _check_choice("output_type", output_type, OUTPUT_TYPES)
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        requests = self.plan(prompts, ratio=ratio, mean_tokens=mean_tokens, height=height, width=width)
        generators = _one_per_image(generator, len(requests))
        batches = self.batches(requests, guidance_scale=guidance_scale, max_tokens=max_tokens)
        images: dict[int, Any] = {}
        with self.progress_bar(total=steps * len(batches)) as bar:

            def on_step_end(
                pipeline: CATPipeline, step: int, timestep: torch.Tensor, values: dict[str, Any]
            ) -> dict[str, Any] | None:
                bar.update()
                return callback_on_step_end and callback_on_step_end(pipeline, step, timestep, values)

            for batch in batches:
                drawn = self.draw(
                    [requests[i] for i in batch],
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    guidance_channels=guidance_channels,
                    scheduler=scheduler,
                    generators=[generators[i] for i in batch],
                    output_type=output_type,
                    callback_on_step_end=on_step_end,
                    callback_on_step_end_tensor_inputs=(
                        callback_on_step_end_tensor_inputs if callback_on_step_end else ()
                    ),
                )
                images |= zip(batch, drawn, strict=True)
        self.maybe_free_model_hooks()
        output = CATOutput(
            images=_stack([images[i] for i in range(len(requests))], output_type),
            ratios=[request.ratio for request in requests],
            tokens=[request.num_tokens for request in requests],
        )
        return output if return_dict else output.to_tuple()  # type: ignore[return-value] # as documented

    def plan(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        ratio: Literal["auto"] | int = "auto",
        mean_tokens: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        scores: Mapping[Description, Score] | None = None,
    ) -> list[SampleRequest]:
        """Return the request of each image, to be drawn from seed + its index; see `__call__`.

        Args:
            scores: known scores of descriptions; the others are computed if the ratio depends on them.
        """
        given = [prompts] if isinstance(prompts, str | int | Description) else prompts
        if mean_tokens is not None and not math.isfinite(mean_tokens):
            raise UserError(f"mean_tokens {mean_tokens}: expected a finite number of tokens per image")
        if not 0 <= seed <= MAX_SEED - len(given) + 1:
            raise UserError(
                f"seed {seed}: expected 0 to {MAX_SEED - len(given) + 1}, as image i uses seed + i"
            )
        resolved = [self._resolve(prompt) for prompt in given]
        if not resolved:
            raise UserError("no prompts: expected at least one label or description")
        size = (
            self.resolution if height is None else height,
            self.resolution if width is None else width,
        )
        descriptions = [description for _, description in resolved]
        ratios = self._ratios(descriptions, ratio, mean_tokens, size, scores or {})
        return [
            self._request(label, description, f, seed + i, size)
            for i, ((label, description), f) in enumerate(zip(resolved, ratios, strict=True))
        ]

    def batches(
        self,
        requests: Sequence[SampleRequest],
        *,
        guidance_scale: Guidance | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> list[list[int]]:
        """Return the indices of requests that share a forward pass; depends on the arguments only.

        Raises:
            UserError: a request exceeds `max_tokens` by itself, or guidance is not finite or lacks a ratio.
        """
        scales = self._scales(guidance_scale, requests)
        passes = [passes_of(scale) for scale in scales]
        check_room(requests, passes, max_tokens)
        packer = TokenBudgetPacker[int](max_tokens)
        # requests of equal length next to each other share one attention call
        by_length = sorted(range(len(requests)), key=lambda i: requests[i].num_tokens)
        return list(packer.pack((i, passes[i] * requests[i].num_tokens) for i in by_length))

    @torch.no_grad()
    def draw(
        self,
        requests: Sequence[SampleRequest],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: Guidance | None = None,
        guidance_channels: int | None = None,
        scheduler: Sampler | None = None,
        generators: Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> list[Any]:
        """Draw one batch of requests.

        Args:
            requests: share each forward pass.
            generators: one per request; by default each is seeded with the request's `seed`.

        The other arguments, and the errors, are those of `__call__`. No progress bar is shown.

        Returns:
            One image per request: PIL image, (H, W, 3) array, (3, H, W) tensor or (c, h, w) latent.
        """
        _check_choice("output_type", output_type, OUTPUT_TYPES)
        check_classes({"scheduler": self.scheduler})
        for name in callback_on_step_end_tensor_inputs:
            _check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        patch = self.transformer.config.patch_size

        def on_step(report: StepReport) -> None:
            if callback_on_step_end is None or not report.states:  # every request of the step failed
                return
            states, latents = report.states, "latents" in callback_on_step_end_tensor_inputs
            values = {"latents": [state.latent(patch) for state in states]} if latents else {}
            solver = states[0].solver
            timestep = solver.timesteps[solver.step - 1]
            changed = callback_on_step_end(self, solver.step - 1, timestep, values) or {}
            if "latents" in changed:
                _replace_latents(states, changed["latents"], patch)

        scales = self._scales(guidance_scale, requests)
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        noises: Sequence[CounterNoise | None] = [None] * len(requests)
        if generators is not None:
            noises = [CounterNoise.from_generator(generator) for generator in generators]
        drawn = [
            EngineRequest(
                sample=request,
                num_inference_steps=steps,
                guidance_scale=scale,
                guidance_channels=guidance_channels,
                scheduler=scheduler,
                noise=noise,
                decode=output_type != "latent",
            )
            for request, scale, noise in zip(requests, scales, noises, strict=True)
        ]
        rows = sum(request.passes * request.sample.num_tokens for request in drawn)
        engine = PackedEngine(self, max(rows, 1), order=FifoPacked(), on_step=on_step)
        handles = [engine.submit(request) for request in drawn]
        engine.run()
        outputs = [handle.result() for handle in handles]
        if output_type == "latent":
            return [output.latent for output in outputs]
        return [_convert(output.image, output_type) for output in outputs if output.image is not None]

    def save_pretrained(  # type: ignore[override] # diffusers' options are passed on
        self, save_directory: str | os.PathLike[str], **options: Any
    ) -> None:
        """Write every component to a sub-folder and, last, model_index.json with the settings.

        text_encoder/ holds a name and a fingerprint, not the published weights.

        Args:
            save_directory: created if missing.
            options: those of diffusers' `save_pretrained`, such as `variant` and `max_shard_size`.

        Raises:
            UserError: the folder cannot be written.
        """
        index = Path(save_directory) / INDEX
        require_writable(index)
        index.unlink(missing_ok=True)  # without it, an interrupted save does not look like a pipeline
        super().save_pretrained(str(save_directory), **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Load a pipeline that `save_pretrained` wrote, from a folder or from the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: the folder; "nano", the pipeline that ships with the package,
                unless there is a local folder of this name; or the name of a repository, "owner/name".
            options: those of diffusers' `from_pretrained`, such as `torch_dtype` and `variant`; components by
                name, used in place of those in the folder; and the settings of `CATPipeline`.

        Raises:
            UserError: an unknown option; the folder is not a complete pipeline, has the layout of an earlier
                version, or holds a component of another class.
        """
        known = {*inspect.signature(cls.__init__).parameters, *PIPELINE_OPTIONS} - {"self"}
        check_options("CATPipeline.from_pretrained", dict.fromkeys(options), known)
        folder = find_folder(pretrained_model_name_or_path, options)
        check_folder(folder, given=options)
        try:
            pipeline = super().from_pretrained(str(folder), **options)
        except Exception as error:  # a missing, truncated or mismatched file each raises something else
            if "variant" not in options and (damage := find_damage(folder, given=options)):
                raise UserError(f"{folder} is not a complete pipeline: {damage}") from error
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder} cannot be loaded: {one_line(error)}") from error
        return pipeline

    def _resolve(self, prompt: Prompt) -> tuple[int, Description]:
        """Return class and description of a prompt; the null class for a free description."""
        if isinstance(prompt, int):
            if not 0 <= prompt < len(self.labels):
                raise UserError(f"class {prompt}: expected 0 .. {len(self.labels) - 1}")
            return prompt, self.descriptions[prompt]
        if isinstance(prompt, str) and prompt in self._class_of:
            return self._resolve(self._class_of[prompt])
        description = Description(prompt) if isinstance(prompt, str) else prompt
        caption = description.caption
        if self.text_encoder is not None:
            return self.transformer.config.num_classes, description
        if caption in self._class_of:
            return self._class_of[caption], description
        close = difflib.get_close_matches(caption, self.labels, n=3, cutoff=0.3) or self.labels[:3]
        raise UserError(
            f"label {caption!r} is none of the {len(self.labels)} classes; the closest are {close} (this"
            " transformer was trained without text and draws its classes only)"
        )

    def _ratios(
        self,
        descriptions: list[Description],
        ratio: Literal["auto"] | int,
        mean_tokens: float | None,
        size: tuple[int, int],
        known: Mapping[Description, Score],
    ) -> list[int]:
        served, patch = self.transformer.config.ratios, self.transformer.config.patch_size
        if not isinstance(ratio, str):
            ratio = to_integer("ratio", ratio)
        if ratio != "auto":
            if ratio not in served:
                raise UserError(f"ratio {ratio!r}: expected 'auto' or one of {', '.join(map(str, served))}")
            if mean_tokens is not None:
                raise UserError(
                    f"expected ratio or mean_tokens, got ratio {ratio} and mean_tokens {mean_tokens:g}"
                )
            return [ratio] * len(descriptions)
        # Large runs draw many images of few classes.
        unknown = [description for description in dict.fromkeys(descriptions) if description not in known]
        computed = require_scores(default_scorer(), unknown) if unknown else []
        scores = {**known, **dict(zip(unknown, computed, strict=True))}
        preferred = [
            self.nearest_ratio(self.thresholds.ratio_of(scores[description])) for description in descriptions
        ]
        if mean_tokens is None:
            return preferred
        for f in served:
            _check_size(size, f, patch)
        return ratios_within_budget(
            [scores[description].expected for description in descriptions],
            mean_tokens,
            resolution=size[0] if size[0] == size[1] else size,
            patch_size=patch,
            ratios=served,
            preferred=preferred,
        )

    def _scales(self, given: Guidance | None, requests: Sequence[SampleRequest]) -> list[float]:
        """Return the guidance scale of each request."""
        guidance = self.default_guidance if given is None else given
        return guidance_scales(guidance, [request.ratio for request in requests])

    def _request(
        self, label: int, description: Description, ratio: int, seed: int, size: tuple[int, int]
    ) -> SampleRequest:
        patch = self.transformer.config.patch_size
        _check_size(size, ratio, patch)
        height, width = (side // (ratio * patch) for side in size)
        text = "" if self.text_encoder is None else description.caption
        return SampleRequest(label=label, ratio=ratio, grid=(height, width), seed=seed, text=text)


# `DiffusionPipeline.from_pretrained` looks up the class of model_index.json here.
diffusers.CATPipeline = CATPipeline  # type: ignore[attr-defined]


def _check_settings(
    labels: Sequence[str], resolution: int, descriptions: Sequence[Any] | None, num_classes: int
) -> None:
    if not all(isinstance(label, str) for label in labels):
        raise UserError("labels: expected a sequence of strings")
    if len(labels) != num_classes or len(set(labels)) != len(labels):
        raise UserError(
            f"the transformer has {num_classes} classes: expected as many different labels, got"
            f" {len(set(labels))}"
        )
    if not isinstance(resolution, int) or resolution < 1:
        raise UserError(f"resolution {resolution!r}: expected a number of pixels")
    if descriptions is not None and len(descriptions) != len(labels):
        raise UserError(f"expected one description per label, {len(labels)} in all, got {len(descriptions)}")


def _as_thresholds(given: RatioThresholds | Sequence[int] | None) -> RatioThresholds:
    if given is None or isinstance(given, RatioThresholds):
        return given or default_thresholds()
    if len(given) != 2:
        raise UserError(f"thresholds: expected two scores, got {list(given)}")
    return RatioThresholds(*given)


def _as_guidance(given: Guidance | Mapping[str, float], ratios: Sequence[int]) -> Guidance:
    """Return guidance with numbers as the keys, which JSON stores as strings.

    Raises:
        UserError: it is not finite, or lacks a ratio.
    """
    try:
        guidance: Guidance = (
            {int(ratio): float(scale) for ratio, scale in given.items()}
            if isinstance(given, Mapping)
            else float(given)
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"guidance_scale {given!r}: expected a number, or one per ratio") from error
    guidance_scales(guidance, ratios)
    return guidance


def _as_description(given: Description | Mapping[str, Any]) -> Description:
    if isinstance(given, Description):
        return given
    try:
        return Description(**given)
    except TypeError as error:
        raise UserError(f"descriptions: expected caption, has_text and has_faces, got {given!r}") from error


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} {value!r}: expected {' or '.join(map(repr, choices))}")


def _check_size(size: tuple[int, int], ratio: int, patch_size: int) -> None:
    """Raise UserError, naming valid sizes, if a side does not divide into patches at `ratio`."""
    unit = ratio * patch_size
    for name, side in zip(("height", "width"), size, strict=True):
        if side < unit or side % unit:
            below = max(side // unit, 1) * unit
            raise UserError(
                f"{name} of {side} px: expected a multiple of {unit} px at {ratio}x (ratio {ratio} x patch"
                f" size {patch_size}), such as {below} or {below + unit}"
            )


def _replace_latents(
    states: Sequence[SamplingState], latents: Sequence[torch.Tensor], patch_size: int
) -> None:
    """Set the tokens of states from latents (c, h, w) that a callback returned."""
    shapes = [state.latent(patch_size).shape for state in states]
    if [latent.shape for latent in latents] != shapes:
        raise UserError(
            f"callback_on_step_end: expected latents of shapes {[tuple(shape) for shape in shapes]}, got"
            f" {[tuple(latent.shape) for latent in latents]}"
        )
    for state, latent in zip(states, latents, strict=True):
        state.tokens = pack([latent], patch_size).to(state.tokens)


def _one_per_image(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[torch.Generator]:
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise UserError(f"generator: expected one per image, {count} in all, got {len(generator)}")
        return list(generator)
    if generator is not None and count == 1:
        return [generator]
    device = "cpu" if generator is None else generator.device
    seeds = [torch.randint(2**63 - 1, (), generator=generator, device=device) for _ in range(count)]
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _convert(image: torch.Tensor, output_type: OutputType) -> Any:
    if output_type == "pil":
        return tensor_to_image(image)
    image = (image.float() / 2 + 0.5).clamp(0, 1)
    return image if output_type == "pt" else image.permute(1, 2, 0).cpu().numpy()


def _stack(images: list[Any], output_type: OutputType) -> Any:
    """Return the images of a call, which have one size, as one array or tensor where that is the type."""
    if output_type == "np":
        return np.stack(images)
    return torch.stack(images) if output_type == "pt" else images
