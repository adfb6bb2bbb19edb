"""`CATPipeline`: labels or descriptions in, images out, each with the number of tokens its complexity
earns.

    pipeline = CATPipeline.from_pretrained("runs/demo/pipeline")
    output = pipeline(["sky", "text"], steps=50, seed=7)
    output.images[0].save("sky.png")

A call is `plan` (which images), `batches` (which of them share a forward pass), `draw` for each batch.
Whoever draws many images does these steps for himself, and can stop between two batches: the same batch is
drawn to the same bits again, while among other neighbours an image is the same up to rounding.
"""

import difflib
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL import Image

from cat_fast.complexity import (
    Description,
    RatioThresholds,
    default_scorer,
    ratios_within_budget,
    tokens_per_image,
)
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.data.images.io import tensor_to_image
from cat_fast.data.latents.moments import per_channel
from cat_fast.errors import UserError
from cat_fast.generator import DiT, SampleRequest, sample
from cat_fast.generator.diffusion import Schedule, load_schedule
from cat_fast.generator.sampling import Sampler
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.models.load import load_model, load_tokenizer
from cat_fast.packing import TokenBudgetPacker
from cat_fast.tokenizer import NestedAutoencoderKL

MAX_TOKENS = 16_384
_DECODE_BATCH = 8

SETTINGS = "pipeline.json"
TOKENIZER, GENERATOR, SCHEDULER = "tokenizer", "generator", "scheduler"

Prompt = str | int | Description
"""A label, its index, or a description: a string that is no label is one."""


@dataclass(frozen=True, kw_only=True)
class CATOutput:
    """The images of one call, in the order of its prompts."""

    images: list[Image.Image]
    ratios: list[int]
    """Compression ratio of each image."""
    tokens: list[int]
    """Tokens of each image."""


class CATPipeline:
    """Label or description -> ratio -> tokens -> image.

    Args:
        tokenizer: decodes the latents.
        generator: draws them; must be trained on latents of this tokenizer.
        scheduler: the noise schedule of its training.
        labels: names of the generator's classes, in order.
        thresholds: from complexity score to ratio, for ``ratio="auto"``.
        resolution: side of the images in pixels, unless a call says otherwise.
        descriptions: what "auto" scores in place of "this is an image of LABEL", one for each label: the
            place to say that a class shows text or faces. A generator with text is told their captions.
        text_encoder: name or folder of the encoder that a generator with text was trained with.
        text_encoder_fingerprint: of its weights, for a generator that does not tell.

    Raises:
        UserError: parts that do not belong together.
    """

    def __init__(
        self,
        tokenizer: NestedAutoencoderKL,
        generator: DiT,
        scheduler: Schedule,
        labels: Sequence[str],
        thresholds: RatioThresholds,
        *,
        resolution: int,
        descriptions: Sequence[Description] | None = None,
        text_encoder: str | None = None,
        text_encoder_fingerprint: str | None = None,
    ) -> None:
        _require_fitting(tokenizer, generator, labels, descriptions)
        self.tokenizer = tokenizer.eval()
        self.generator = generator.eval()
        self.scheduler = scheduler
        self.labels = list(labels)
        self.thresholds = thresholds
        self.resolution = resolution
        self.descriptions = list(descriptions or map(Description.from_label, labels))
        self.text_encoder = _load_text_encoder(text_encoder, generator, text_encoder_fingerprint)
        self._number_of = {label: number for number, label in enumerate(self.labels)}

    def to(self, device: torch.device | str) -> Self:
        """Move all models."""
        self.tokenizer.to(device)  # type: ignore[arg-type]
        self.generator.to(device)  # type: ignore[arg-type]
        if self.text_encoder is not None:
            self.text_encoder.to(device)
        return self

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        ratio: Literal["auto"] | int = "auto",
        mean_tokens: float | None = None,
        steps: int = 250,
        guidance: float = 1.5,
        seed: int = 0,
        size: int | None = None,
        scheduler: Sampler = "ddpm",
        max_tokens: int = MAX_TOKENS,
        on_step: Callable[[int, int], None] | None = None,
    ) -> CATOutput:
        """Draw one image for each prompt; the defaults are the paper's sampling.

        Args:
            prompts: labels, indices of classes, or, for a generator with text, descriptions.
            ratio: one for all, or "auto": from each prompt's complexity.
            mean_tokens: in place of `ratio`: what an image of this call may cost in the mean.
            steps: of the sampler.
            guidance: classifier-free guidance scale; 1 is none.
            seed: image i is drawn from seed + i, whatever else is drawn beside it.
            size: side of the images in pixels.
            scheduler: "ddpm", or "ddim" or "dpm++", which need far fewer steps; of a flow "euler".
            max_tokens: most tokens in one forward pass, unconditional twins included.
            on_step: called after every step with the number of steps done and of steps in all.

        Raises:
            UserError: an unknown label, ratio, scheduler or size, or a budget that pays no image.
        """
        requests = self.plan(prompts, ratio=ratio, mean_tokens=mean_tokens, seed=seed, size=size)
        batches = self.batches(requests, guidance=guidance, max_tokens=max_tokens)
        images: dict[int, Image.Image] = {}
        done = 0

        def count_step() -> None:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step(done, steps * len(batches))

        for batch in batches:
            drawn = self.draw(
                [requests[i] for i in batch],
                steps=steps,
                guidance=guidance,
                scheduler=scheduler,
                on_step=count_step,
            )
            images |= zip(batch, drawn, strict=True)
        return CATOutput(
            images=[images[i] for i in range(len(requests))],
            ratios=[request.ratio for request in requests],
            tokens=[request.num_tokens for request in requests],
        )

    def plan(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        ratio: Literal["auto"] | int = "auto",
        mean_tokens: float | None = None,
        seed: int = 0,
        size: int | None = None,
    ) -> list[SampleRequest]:
        """The images of a call, one for each prompt; arguments and errors are those of `__call__`."""
        given = [prompts] if isinstance(prompts, str | int | Description) else prompts
        meant = [self._meaning(prompt) for prompt in given]
        if not meant:
            raise UserError("no label to draw: expected at least one")
        size = self.resolution if size is None else size
        ratios = self._ratios([description for _, description in meant], ratio, mean_tokens, size)
        return [
            self._request(label, description, f, seed + i, size)
            for i, ((label, description), f) in enumerate(zip(meant, ratios, strict=True))
        ]

    def batches(
        self, requests: Sequence[SampleRequest], *, guidance: float = 1.5, max_tokens: int = MAX_TOKENS
    ) -> list[list[int]]:
        """Which requests, by their place, share a forward pass: a function of the arguments alone.

        Raises:
            UserError: one of them alone is more than `max_tokens`.
        """
        twins = 1 if guidance == 1 else 2
        _require_room(requests, twins, max_tokens)
        packer = TokenBudgetPacker[int](max_tokens)
        # equal lengths side by side attend in one call
        by_length = sorted(range(len(requests)), key=lambda i: requests[i].num_tokens)
        return list(packer.pack((i, twins * requests[i].num_tokens) for i in by_length))

    @torch.no_grad()
    def draw(
        self,
        requests: Sequence[SampleRequest],
        *,
        steps: int = 250,
        guidance: float = 1.5,
        scheduler: Sampler = "ddpm",
        on_step: Callable[[], None] | None = None,
    ) -> list[Image.Image]:
        """The images of one batch; arguments are those of `__call__`, errors those of `sample`."""
        text = None if self.text_encoder is None else self.text_encoder([r.text for r in requests])
        latents = sample(
            self.generator,
            requests,
            self.scheduler,
            sampler=scheduler,
            steps=steps,
            guidance=guidance,
            text=None if text is None else text.to(self.generator.device, self.generator.dtype),
            on_step=on_step,
        )
        return self._decode(latents, [request.ratio for request in requests])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole pipeline: tokenizer/, generator/, scheduler/ and, last, pipeline.json.

        Of a text encoder the name and fingerprint are written, not the model: it is as it was published.

        Raises:
            UserError: nothing can be written there.
        """
        folder = Path(folder)
        require_writable(folder / SETTINGS)
        # without it a half-written folder is not taken for a pipeline
        (folder / SETTINGS).unlink(missing_ok=True)
        self.tokenizer.save_pretrained(folder / TOKENIZER)
        self.generator.save_pretrained(folder / GENERATOR)
        self.scheduler.save_pretrained(folder / SCHEDULER)
        encoder = self.text_encoder
        settings = {
            "labels": self.labels,
            "descriptions": [asdict(description) for description in self.descriptions],
            "thresholds": [self.thresholds.a, self.thresholds.b],
            "resolution": self.resolution,
            "text_encoder": None if encoder is None else encoder.name,
            "text_encoder_fingerprint": None if encoder is None else encoder.fingerprint(),
        }
        with atomic_write(folder / SETTINGS) as part:
            part.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            UserError: the folder is no whole pipeline, or its text encoder is another one now.
        """
        return cls(**_load_arguments(Path(folder)))

    def _meaning(self, prompt: Prompt) -> tuple[int, Description]:
        """Class and description; the null class for what is none."""
        if isinstance(prompt, int):
            if not 0 <= prompt < len(self.labels):
                raise UserError(f"class {prompt}: expected 0 .. {len(self.labels) - 1}")
            return prompt, self.descriptions[prompt]
        if isinstance(prompt, str) and prompt in self._number_of:
            return self._meaning(self._number_of[prompt])
        description = Description(prompt) if isinstance(prompt, str) else prompt
        said = description.caption
        if self.text_encoder is not None:
            return self.generator.config.num_classes, description
        if said in self._number_of:
            return self._number_of[said], description
        near = difflib.get_close_matches(said, self.labels, n=3, cutoff=0.3) or self.labels[:3]
        raise UserError(
            f"label {said!r} is none of the {len(self.labels)} classes; near it are {near} (this generator "
            "was trained without text, so it draws its classes and no other descriptions)"
        )

    def _ratios(
        self,
        descriptions: list[Description],
        ratio: Literal["auto"] | int,
        mean_tokens: float | None,
        size: int,
    ) -> list[int]:
        served = self.generator.config.ratios
        if ratio != "auto":
            if ratio not in served:
                raise UserError(f"ratio {ratio!r}: expected 'auto' or one of {', '.join(map(str, served))}")
            if mean_tokens is not None:
                raise UserError(f"ratio {ratio} and mean_tokens {mean_tokens:g}: one of them is enough")
            return [ratio] * len(descriptions)
        different = list(dict.fromkeys(descriptions))  # of many images of few classes
        scores = dict(zip(different, default_scorer().score_many(different), strict=True))
        own = [self._nearest(self.thresholds.ratio(scores[description])) for description in descriptions]
        if mean_tokens is None:
            return own
        expected = dict(zip(different, default_scorer().expected_many(different).tolist(), strict=True))
        return ratios_within_budget(
            [expected[description] for description in descriptions],
            mean_tokens,
            resolution=size,
            patch_size=self.generator.config.patch_size,
            ratios=served,
            preferred=own,
        )

    def _nearest(self, ratio: int) -> int:
        """The ratio itself, or of a generator that lacks it the one nearest to it."""
        return min(sorted(self.generator.config.ratios), key=lambda served: abs(math.log2(served / ratio)))

    def _request(
        self, label: int, description: Description, ratio: int, seed: int, size: int
    ) -> SampleRequest:
        patch = self.generator.config.patch_size
        tokens_per_image(ratio, size, patch)  # refuses a size that does not divide
        side = size // (ratio * patch)
        text = "" if self.text_encoder is None else description.caption
        return SampleRequest(label=label, ratio=ratio, grid=(side, side), seed=seed, text=text)

    def _decode(self, latents: list[torch.Tensor], ratios: list[int]) -> list[Image.Image]:
        """Images of latents in the generator's scale, each decoded at its ratio."""
        config = self.generator.config
        groups: dict[int, list[int]] = defaultdict(list)
        for i, ratio in enumerate(ratios):
            groups[ratio].append(i)
        images: dict[int, Image.Image] = {}
        for ratio, members in groups.items():
            for chunk in (members[j : j + _DECODE_BATCH] for j in range(0, len(members), _DECODE_BATCH)):
                z = torch.stack([latents[i] for i in chunk])
                z = z / per_channel(config.scaling_factor).to(z) + per_channel(config.shift_factor).to(z)
                decoded = self.tokenizer.decode(z.to(self.tokenizer.dtype), ratio).sample
                images |= zip(chunk, map(tensor_to_image, decoded), strict=True)
        return [images[i] for i in range(len(latents))]


def pipeline_digest(folder: Path) -> str:
    """16 hex digits that change with any file of a pipeline, and with nothing else in its folder."""
    parts = [path for part in (TOKENIZER, GENERATOR, SCHEDULER) for path in (folder / part).iterdir()]
    digest = hashlib.sha256()
    for path in sorted([folder / SETTINGS, *parts]):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _load_arguments(folder: Path) -> dict[str, Any]:
    """Return the arguments of the `CATPipeline` that was saved.

    Raises:
        UserError: the folder is no whole pipeline.
    """
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"{folder} is no pipeline: {SETTINGS} is missing; give a folder that a run has finished"
        )
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return {
            "tokenizer": load_tokenizer(folder / TOKENIZER, "cpu"),
            "generator": load_model(DiT, "generator", folder / GENERATOR, "cpu"),
            "scheduler": load_schedule(folder / SCHEDULER),
            "labels": list(settings["labels"]),
            "thresholds": RatioThresholds(*settings["thresholds"]),
            "resolution": int(settings["resolution"]),
            "descriptions": [Description(**description) for description in settings["descriptions"]],
            "text_encoder": settings.get("text_encoder"),
            "text_encoder_fingerprint": settings.get("text_encoder_fingerprint"),
        }
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no whole pipeline: {error}") from error


def _require_fitting(
    tokenizer: NestedAutoencoderKL,
    generator: DiT,
    labels: Sequence[str],
    descriptions: Sequence[Description] | None,
) -> None:
    """Raises UserError where parts were not made for each other."""
    trained_on = generator.config.tokenizer_fingerprint
    if trained_on is not None and trained_on != tokenizer.fingerprint():
        raise UserError(
            f"the generator was trained on latents of tokenizer {trained_on}, this one is "
            f"{tokenizer.fingerprint()}; use the tokenizer it was trained with"
        )
    if len(labels) != generator.config.num_classes or len(set(labels)) != len(labels):
        raise UserError(
            f"the generator has {generator.config.num_classes} classes: expected as many different "
            f"labels, got {len(set(labels))}"
        )
    if descriptions is not None and len(descriptions) != len(labels):
        raise UserError(f"expected one description a label, {len(labels)} in all, got {len(descriptions)}")


def _load_text_encoder(
    name: str | None, generator: DiT, fingerprint: str | None = None
) -> TextEncoder | None:
    """The encoder of a generator with text.

    Args:
        fingerprint: of the encoder that it was trained with, where the generator itself does not know it.

    Raises:
        UserError: `name` cannot be its encoder, or is known to be another one.
    """
    width = generator.config.text_dim
    if name is None and width is None:
        return None
    if name is None:
        raise UserError(
            "the generator was trained with text: text_encoder must name its text encoder (--text-encoder)"
        )
    if width is None:
        raise UserError(
            f"the generator was trained without text, and text encoder {name!r} is of no use to it"
        )
    encoder = TextEncoder(name)
    if encoder.dim != width:
        raise UserError(
            f"text encoder {name!r} gives tokens of width {encoder.dim}, the generator was trained on {width}"
        )
    trained_with = generator.config.text_encoder_fingerprint or fingerprint
    if trained_with is not None and trained_with != encoder.fingerprint():
        raise UserError(
            f"the generator was trained with text encoder {trained_with}, {name!r} is "
            f"{encoder.fingerprint()}; use the text encoder it was trained with"
        )
    return encoder


def _require_room(requests: Sequence[SampleRequest], twins: int, max_tokens: int) -> None:
    """Raises UserError where an image, with its unconditional twin if `twins` is 2, is over `max_tokens`."""
    longest = max(range(len(requests)), key=lambda i: requests[i].num_tokens, default=None)
    if longest is None:
        return
    request = requests[longest]
    needed = twins * request.num_tokens
    if needed > max_tokens:
        guided = f", {needed} with the unconditional twin that guidance takes," if twins == 2 else ""
        raise UserError(
            f"max_tokens {max_tokens}: image {longest} at {request.ratio}x has {request.num_tokens} tokens"
            f"{guided} and has to fit one forward pass; raise --max-tokens to {needed} at least"
        )
