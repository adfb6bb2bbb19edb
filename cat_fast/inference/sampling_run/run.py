"""Drawing of many images into a folder, in batches that a killed run does not draw again.

    samples.json             settings, and each image's label, ratio, tokens and seed; written before them
    execution.json           device, dtype, versions, backends and decode tier of the last call
    images/000000.png        image i, drawn from seed + i
    grid.png, samples.npz    written on request once all images are drawn

Images of one batch share a forward pass. Batches are a function of samples.json, so a batch drawn again gives
the same bits. The result depends neither on interruptions nor on the number of machines.
"""

import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from cat_fast.data.files import atomic_write, write_json
from cat_fast.data.folder_settings import claim_folder, require_same_settings
from cat_fast.data.images.contact_sheet import Cell, contact_sheet
from cat_fast.data.images.writer import ImageWriter, is_complete_image
from cat_fast.generator.captured_step import captured_step
from cat_fast.generator.sampling import Guidance, check_guidance_channels
from cat_fast.generator.solvers import Sampler, set_steps
from cat_fast.inference.pipeline.cat_pipeline import MAX_TOKENS, CATPipeline, Prompt
from cat_fast.inference.pipeline.folder import pipeline_digest
from cat_fast.models.execution import describe_execution, execution_settings

PLAN, EXECUTION = "samples.json", "execution.json"
_MAX_IN_GRID = 100


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Settings of a run; see `CATPipeline.__call__`."""

    ratio: Literal["auto"] | int = "auto"
    mean_tokens: float | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 250
    guidance_scale: Guidance = 1.5
    guidance_channels: int | None = None
    scheduler: Sampler | None = None
    seed: int = 0
    """Image i is drawn from seed + i."""
    max_tokens: int = MAX_TOKENS
    decode_tier: str = "exact"
    """See `CATPipeline.use_decode_tier`."""


class SampleRun:
    """Images of one run in one folder.

    Args:
        pipeline: loaded from `source`, on the device that draws; its decode tier is set.
        prompts: one per image.
        folder: created if missing; resumed if started with the same arguments.
        source: folder that `pipeline` was loaded from.

    Raises:
        UserError: invalid prompts or settings, or a folder that contains images made with other arguments.
    """

    def __init__(
        self,
        pipeline: CATPipeline,
        prompts: Sequence[Prompt],
        settings: SampleSettings,
        folder: Path,
        source: Path,
    ) -> None:
        self.pipeline, self.settings, self.folder = pipeline, settings, folder
        # checked before anything is written
        set_steps(pipeline.scheduler, settings.scheduler, settings.num_inference_steps)
        check_guidance_channels(settings.guidance_channels, pipeline.transformer.config.in_channels)
        self.requests = pipeline.plan(
            prompts,
            ratio=settings.ratio,
            mean_tokens=settings.mean_tokens,
            height=settings.height,
            width=settings.width,
            seed=settings.seed,
        )
        self.batches = pipeline.batches(
            self.requests, guidance_scale=settings.guidance_scale, max_tokens=settings.max_tokens
        )
        self.names = [self._name_of(prompt) for prompt in prompts]
        tier = pipeline.use_decode_tier(settings.decode_tier)
        # everything that determines the bits of an image; a resumed run must match it
        self._plan = {
            "settings": asdict(settings)
            | {
                "pipeline": pipeline_digest(source),
                "device": pipeline.device.type,
                "decode_tier": None if tier == "exact" else tier,
            }
            | execution_settings(pipeline.dtype),
            "images": [
                {
                    "file": self.path(i).relative_to(folder).as_posix(),
                    "prompt": self.names[i],
                    "label": request.label,
                    "ratio": request.ratio,
                    "tokens": request.num_tokens,
                    "seed": request.seed,
                }
                for i, request in enumerate(self.requests)
            ],
        }
        require_same_settings(folder / PLAN, self._plan, "images")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        settings, default = self.settings, self.pipeline.resolution
        return settings.height or default, settings.width or default

    def path(self, i: int) -> Path:
        """Return the file of image i."""
        return self.folder / "images" / f"{i:06d}.png"

    def draw(
        self, rank: int = 0, world_size: int = 1, on_progress: Callable[[float], None] = lambda count: None
    ) -> int:
        """Draw the missing images of one machine's batches and return their number.

        Args:
            on_progress: called after every step with the fraction of images that it amounts to.
        """
        drawn = 0
        with ImageWriter() as writer:  # files are encoded while the next batch is drawn
            for batch in self.batches[rank::world_size]:
                drawn += self._draw_missing(batch, writer, on_progress)
        return drawn

    def _draw_missing(
        self, batch: Sequence[int], writer: ImageWriter, on_progress: Callable[[float], None]
    ) -> int:
        """Draw a batch if an image of it is missing; write the missing ones and return their number."""
        settings, missing = self.settings, [i for i in batch if not is_complete_image(self.path(i))]
        if not missing:
            return 0
        share = len(missing) / settings.num_inference_steps
        images = self.pipeline.draw(
            [self.requests[i] for i in batch],  # the complete batch: see docs/decisions.md
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            guidance_channels=settings.guidance_channels,
            scheduler=settings.scheduler,
            callback_on_step_end=lambda *_: on_progress(share),
            callback_on_step_end_tensor_inputs=(),
        )
        # Not before: a run that fails at its first batch must not keep others from using the folder.
        claim_folder(self.folder / PLAN, self._plan, "images")
        write_json(self.folder / EXECUTION, self._describe_execution())
        for i, image in zip(batch, images, strict=True):
            if i in missing:
                writer.write(self.path(i), image, format="PNG")
        return len(missing)

    def count_missing(self, rank: int = 0, world_size: int = 1) -> int:
        """Return the number of images of one machine's batches that are not drawn yet."""
        return sum(
            not is_complete_image(self.path(i)) for batch in self.batches[rank::world_size] for i in batch
        )

    def write_grid(self) -> Path:
        """Write the first hundred images to one sheet, each above its prompt, ratio and number of tokens."""
        cells = [
            Cell(
                partial(Image.open, self.path(i)),
                (self.names[i], f"{request.ratio}x, {_format_tokens(request.num_tokens)}"),
            )
            for i, request in enumerate(self.requests[:_MAX_IN_GRID])
        ]
        distinct = len(set(self.names))
        columns = distinct if distinct <= 10 else math.ceil(math.sqrt(len(cells)))
        rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
        path = self.folder / "grid.png"
        with atomic_write(path) as part:
            contact_sheet(rows).save(part, format="PNG")
        return path

    def write_npz(self) -> Path:
        """Write samples.npz in the format of guided diffusion's evaluation (Dhariwal & Nichol, 2021).

        `arr_0` is (N, H, W, 3) uint8. `arr_1` is (N,) int64 with the labels, left out if an image has none.
        One image is in memory at a time.
        """
        path = self.folder / "samples.npz"
        shape = (len(self.requests), *self.size, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        labels = np.array([request.label for request in self.requests], dtype=np.int64)
        with atomic_write(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for i in range(len(self.requests)):
                    with Image.open(self.path(i)) as image:
                        file.write(np.asarray(image.convert("RGB")).tobytes())
            if labels.max() < len(self.pipeline.labels):
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, labels)
        return path

    def _describe_execution(self) -> dict[str, Any]:
        pipeline = self.pipeline
        graphs = captured_step(pipeline.transformer).report if pipeline.device.type == "cuda" else None
        return describe_execution(pipeline.device, pipeline.dtype) | {
            "cuda_graphs": None if graphs is None else graphs.to_json(),
            "decode_tier": pipeline.decode_tier,
        }

    def _name_of(self, prompt: Prompt) -> str:
        if isinstance(prompt, int):
            return self.pipeline.labels[prompt]
        return prompt if isinstance(prompt, str) else prompt.caption


def _format_tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"
