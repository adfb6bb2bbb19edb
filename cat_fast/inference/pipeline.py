"""`CATPipeline`: labels in, pictures out, each with the number of tokens its complexity earns.

pipeline = CATPipeline.from_pretrained("runs/demo/pipeline")
output = pipeline(["clear sky", "page of text"], steps=50, seed=7)
output.images[0].save("sky.png")
"""

import difflib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image

from cat_fast.complexity import Description, RatioThresholds, choose_ratios, tokens_per_image
from cat_fast.data.files import atomic_write
from cat_fast.data.images import tensor_to_image
from cat_fast.data.moments import per_channel
from cat_fast.errors import UserError
from cat_fast.generator import DiT, SampleRequest, sample
from cat_fast.generator.sampling import Sampler
from cat_fast.packing import TokenBudgetPacker
from cat_fast.tokenizer import NestedAutoencoderKL

SETTINGS = "pipeline.json"
_DECODE_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class CATOutput:
    """The pictures of one call, in the order of its labels."""

    images: list[Image.Image]
    ratios: list[int]
    """Compression ratio of each picture."""
    tokens: list[int]
    """Tokens of each picture."""


class CATPipeline:
    """Label -> ratio -> tokens -> picture.

    Args:
        tokenizer: decodes the latents.
        generator: draws them; must be trained on latents of this tokenizer.
        scheduler: the noise schedule of its training.
        labels: names of the generator's classes, in order.
        thresholds: from complexity score to ratio, for ``ratio="auto"``.
        resolution: side of the pictures in pixels, unless a call says otherwise.
        descriptions: what "auto" scores in place of "this is an image of LABEL", one for each label: the
            place to say that a class shows text or faces.

    Raises:
        UserError: parts that do not belong together.
    """

    def __init__(
        self,
        tokenizer: NestedAutoencoderKL,
        generator: DiT,
        scheduler: DDPMScheduler,
        labels: Sequence[str],
        thresholds: RatioThresholds,
        *,
        resolution: int,
        descriptions: Sequence[Description] | None = None,
    ) -> None:
        trained_on = generator.config.tokenizer_fingerprint
        if trained_on is not None and trained_on != tokenizer.fingerprint():
            raise UserError(
                f"the generator was trained on latents of tokenizer {trained_on}, this one is "
                f"{tokenizer.fingerprint()}; use the tokenizer it was trained with"
            )
        if len(labels) != generator.config.num_classes or len(set(labels)) != len(labels):
            raise UserError(
                f"the generator has {generator.config.num_classes} classes: expected as many different "
                f"labels, got {len(labels)}"
            )
        if descriptions is not None and len(descriptions) != len(labels):
            raise UserError(
                f"expected one description a label, {len(labels)} in all, got {len(descriptions)}"
            )
        self.tokenizer = tokenizer.eval()
        self.generator = generator.eval()
        self.scheduler = scheduler
        self.labels = list(labels)
        self.thresholds = thresholds
        self.resolution = resolution
        self.descriptions = list(descriptions or map(Description.from_label, labels))

    def to(self, device: torch.device | str) -> Self:
        """Move both models."""
        self.tokenizer.to(device)  # type: ignore[arg-type]
        self.generator.to(device)  # type: ignore[arg-type]
        return self

    @torch.no_grad()
    def __call__(
        self,
        labels: str | int | Sequence[str | int],
        *,
        ratio: Literal["auto"] | int = "auto",
        steps: int = 250,
        guidance: float = 1.5,
        seed: int = 0,
        size: int | None = None,
        scheduler: Sampler = "ddpm",
        max_tokens: int = 16_384,
        on_step: Callable[[int, int], None] | None = None,
    ) -> CATOutput:
        """Draw one picture for each label; the defaults are the paper's sampling.

        Args:
            labels: names or indices of classes.
            ratio: one for all, or "auto": from each label's complexity.
            steps: of the sampler.
            guidance: classifier-free guidance scale; 1 is none.
            seed: picture i is drawn from seed + i, whatever else is drawn beside it.
            size: side of the pictures in pixels.
            scheduler: "ddpm", "ddim" or "dpm++"; the last two need far fewer steps.
            max_tokens: most tokens in one forward pass, unconditional twins included.
            on_step: called after every step with the number of steps done and of steps in all.

        Raises:
            UserError: an unknown label, ratio, scheduler or size.
        """
        classes = [self._class_of(label) for label in ([labels] if isinstance(labels, str | int) else labels)]
        if not classes:
            raise UserError("no label to draw: expected at least one")
        ratios = self._ratios(classes, ratio)
        requests = [
            self._request(c, f, seed + i, size or self.resolution)
            for i, (c, f) in enumerate(zip(classes, ratios, strict=True))
        ]
        twins = 1 if guidance == 1 else 2
        packer = TokenBudgetPacker[int](max_tokens)
        # equal lengths side by side attend in one call
        by_length = sorted(range(len(requests)), key=lambda i: requests[i].num_tokens)
        batches = list(packer.pack((i, twins * requests[i].num_tokens) for i in by_length))
        done = 0

        def count_step() -> None:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step(done, steps * len(batches))

        latents: dict[int, torch.Tensor] = {}
        for batch in batches:
            drawn = sample(
                self.generator,
                [requests[i] for i in batch],
                self.scheduler,
                sampler=scheduler,
                steps=steps,
                guidance=guidance,
                on_step=count_step,
            )
            latents |= zip(batch, drawn, strict=True)
        images = self._decode([latents[i] for i in range(len(requests))], ratios)
        return CATOutput(images=images, ratios=ratios, tokens=[request.num_tokens for request in requests])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole pipeline: tokenizer/, generator/, scheduler/ and, last, pipeline.json."""
        folder = Path(folder)
        (folder / SETTINGS).unlink(
            missing_ok=True
        )  # without it a half-written folder is not taken for a pipeline
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.generator.save_pretrained(folder / "generator")
        self.scheduler.save_pretrained(folder / "scheduler")
        settings = {
            "labels": self.labels,
            "descriptions": [asdict(description) for description in self.descriptions],
            "thresholds": [self.thresholds.a, self.thresholds.b],
            "resolution": self.resolution,
        }
        with atomic_write(folder / SETTINGS) as part:
            part.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            UserError: the folder is no whole pipeline.
        """
        folder = Path(folder)
        if not (folder / SETTINGS).is_file():
            raise UserError(
                f"{folder} is no pipeline: {SETTINGS} is missing; give a folder that a run has finished"
            )
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            return cls(
                NestedAutoencoderKL.from_pretrained(folder / "tokenizer"),
                DiT.from_pretrained(folder / "generator"),
                DDPMScheduler.from_pretrained(folder / "scheduler"),
                settings["labels"],
                RatioThresholds(*settings["thresholds"]),
                resolution=settings["resolution"],
                descriptions=[Description(**description) for description in settings["descriptions"]],
            )
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{folder} is no whole pipeline: {error}") from error

    def _class_of(self, label: str | int) -> int:
        if isinstance(label, int):
            if not 0 <= label < len(self.labels):
                raise UserError(f"class {label}: expected 0 .. {len(self.labels) - 1}")
            return label
        if label in self.labels:
            return self.labels.index(label)
        near = difflib.get_close_matches(label, self.labels, n=3, cutoff=0.3) or self.labels[:3]
        raise UserError(f"label {label!r} is none of the {len(self.labels)} classes; near it are {near}")

    def _ratios(self, classes: list[int], ratio: Literal["auto"] | int) -> list[int]:
        if ratio != "auto":
            if ratio not in self.generator.config.ratios:
                known = ", ".join(map(str, self.generator.config.ratios))
                raise UserError(f"ratio {ratio!r}: expected 'auto' or one of {known}")
            return [ratio] * len(classes)
        results = choose_ratios([self.descriptions[c] for c in classes], thresholds=self.thresholds)
        return [result.ratio for result in results]

    def _request(self, label: int, ratio: int, seed: int, size: int) -> SampleRequest:
        tokens_per_image(ratio, size, self.generator.config.patch_size)  # refuses a size that does not divide
        side = size // (ratio * self.generator.config.patch_size)
        return SampleRequest(label=label, ratio=ratio, grid=(side, side), seed=seed)

    def _decode(self, latents: list[torch.Tensor], ratios: list[int]) -> list[Image.Image]:
        """Pictures of latents in the generator's scale, each decoded at its ratio."""
        config = self.generator.config
        groups: dict[int, list[int]] = defaultdict(list)
        for i, ratio in enumerate(ratios):
            groups[ratio].append(i)
        images: dict[int, Image.Image] = {}
        for ratio, members in groups.items():
            for chunk in (members[j : j + _DECODE_BATCH] for j in range(0, len(members), _DECODE_BATCH)):
                z = torch.stack([latents[i] for i in chunk])
                z = z / per_channel(config.scaling_factor).to(z) + per_channel(config.shift_factor).to(z)
                pictures = self.tokenizer.decode(z.to(self.tokenizer.dtype), ratio).sample
                images |= zip(chunk, map(tensor_to_image, pictures), strict=True)
        return [images[i] for i in range(len(latents))]
