"""Many images into a folder, in batches that a killed run does not have to draw again.

    samples.json             settings, and of each image label, ratio, tokens and seed; written first
    images/000000.png      image i, drawn from seed + i
    grid.png, samples.npz    what was asked for besides, once all images are there

Images of one batch share a forward pass, and a batch is a function of samples.json: drawn again it is the
same to the bit. So is the whole, however often the run was cut, and by however many machines it was shared.
"""

import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from cat_fast.data.files import atomic_write
from cat_fast.data.folder_settings import claim_folder
from cat_fast.data.images.contact_sheet import Cell, contact_sheet
from cat_fast.generator.sampling import Sampler, set_steps
from cat_fast.inference.pipeline.cat_pipeline import MAX_TOKENS, CATPipeline, Prompt, pipeline_digest

PLAN = "samples.json"
_MOST_IN_GRID = 100


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """As for `CATPipeline.__call__`."""

    ratio: Literal["auto"] | int = "auto"
    mean_tokens: float | None = None
    steps: int = 250
    guidance: float = 1.5
    scheduler: Sampler = "ddpm"
    seed: int = 0
    size: int | None = None
    max_tokens: int = MAX_TOKENS


class SampleRun:
    """One folder of images.

    Args:
        pipeline: from `source`, on the device that draws.
        prompts: one for each image.
        folder: made if missing; one that was begun with the same arguments is gone on with.
        source: the folder that `pipeline` was read from.

    Raises:
        UserError: prompts or settings that the pipeline refuses, or a folder begun with others.
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
        set_steps(
            pipeline.scheduler, settings.scheduler, settings.steps
        )  # refused before anything is written
        self.requests = pipeline.plan(
            prompts,
            ratio=settings.ratio,
            mean_tokens=settings.mean_tokens,
            seed=settings.seed,
            size=settings.size,
        )
        self.batches = pipeline.batches(
            self.requests, guidance=settings.guidance, max_tokens=settings.max_tokens
        )
        self.names = [self._name_of(prompt) for prompt in prompts]
        # What decides the bits of an image is written down, and what is written down is held to.
        device = pipeline.generator.device.type
        plan = {
            "settings": asdict(settings) | {"pipeline": pipeline_digest(source), "device": device},
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
        claim_folder(folder / PLAN, plan, "images")

    def path(self, i: int) -> Path:
        """The file of image i."""
        return self.folder / "images" / f"{i:06d}.png"

    def draw(
        self, rank: int = 0, world_size: int = 1, on_progress: Callable[[float], None] = lambda count: None
    ) -> int:
        """Draw what is missing of one machine's batches; returns how many images that were.

        Args:
            on_progress: told, after every step, how many images' worth of work it was.
        """
        settings, drawn = self.settings, 0
        for batch in self.batches[rank::world_size]:
            absent = [i for i in batch if not self.path(i).exists()]
            if not absent:
                continue
            share = len(absent) / settings.steps
            images = self.pipeline.draw(
                [self.requests[i] for i in batch],  # all of it: other neighbours would give other bits
                steps=settings.steps,
                guidance=settings.guidance,
                scheduler=settings.scheduler,
                on_step=lambda share=share: on_progress(share),  # type: ignore[misc]
            )
            for i, image in zip(batch, images, strict=True):
                if i in absent:
                    with atomic_write(self.path(i)) as part:
                        image.save(part, format="PNG")
            drawn += len(absent)
        return drawn

    def count_missing(self, rank: int = 0, world_size: int = 1) -> int:
        """How many images of one machine's batches are still to be drawn."""
        return sum(not self.path(i).exists() for batch in self.batches[rank::world_size] for i in batch)

    def write_grid(self) -> Path:
        """The first hundred images on one sheet, each over its prompt and what it cost."""
        cells = [
            Cell(
                partial(Image.open, self.path(i)),
                (self.names[i], f"{request.ratio}x, {_tokens(request.num_tokens)}"),
            )
            for i, request in enumerate(self.requests[:_MOST_IN_GRID])
        ]
        different = len(set(self.names))
        columns = different if different <= 10 else math.ceil(math.sqrt(len(cells)))
        rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
        path = self.folder / "grid.png"
        with atomic_write(path) as part:
            contact_sheet(rows).save(part, format="PNG")
        return path

    def write_npz(self) -> Path:
        """samples.npz as the evaluation of guided diffusion (Dhariwal & Nichol, 2021) reads it: arr_0 (N, H,
        W, 3) uint8, arr_1 (N,) int64 with the labels, left out where an image has none. One image is held
        at a time.
        """
        path, side = self.folder / "samples.npz", self.settings.size or self.pipeline.resolution
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.requests), side, side, 3)}
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

    def _name_of(self, prompt: Prompt) -> str:
        if isinstance(prompt, int):
            return self.pipeline.labels[prompt]
        return prompt if isinstance(prompt, str) else prompt.caption


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"
