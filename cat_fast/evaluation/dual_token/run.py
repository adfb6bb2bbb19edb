"""Run of an evaluation: one row per image and method, appended as images are done.

OUT/settings.json    identity of images, tokenizer and options; another run's folder is refused
OUT/rows.jsonl       one line per image
OUT/dual.json        means and intervals
OUT/sheet.png        the first images and all methods
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cat_fast.complexity.ratios.image_ratios import PHOTOGRAPHS
from cat_fast.data.files import atomic_write, sha256
from cat_fast.data.folder_settings import claim_folder
from cat_fast.data.images.contact_sheet import Cell, contact_sheet
from cat_fast.data.images.index import read_index
from cat_fast.data.images.io import (
    find_images,
    image_to_tensor,
    load_image,
    resize_center_crop,
    tensor_to_image,
)
from cat_fast.data.input_samples import file_stamp, hash_name
from cat_fast.data.photographs import photographs
from cat_fast.data.row_file import RowFile
from cat_fast.dual_token.grid import Grid
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.evaluation.dual_token.methods import Method, Sample, format_name
from cat_fast.evaluation.metrics import psnr, ssim
from cat_fast.models.execution import execution_settings

SETTINGS, ROWS = "settings.json", "rows.jsonl"
METRICS = ("psnr", "ssim", "perceptual")


@dataclass(frozen=True)
class EvaluatedImage:
    """An image by its key."""

    key: str
    path: Path
    caption: str = ""
    """Of an image index; others have none."""


def evaluated_images(data: str, limit: int | None = None) -> list[EvaluatedImage]:
    """Return the images of a folder, an image index (.jsonl), or `photographs`, the held-out ones.

    Raises:
        UserError: there are none, or two have one key.
    """
    if data == PHOTOGRAPHS:
        found = [EvaluatedImage(one.path.stem, one.path) for one in photographs("held_out")]
    elif data.endswith(".jsonl"):
        found = [EvaluatedImage(record.key, Path(record.path), record.caption) for record in read_index(data)]
    elif not Path(data).exists():
        raise UserError(f"{data}: no such file or folder; expected images")
    else:
        root = Path(data) if Path(data).is_dir() else Path(data).parent
        found = [EvaluatedImage(str(path.relative_to(root)), path) for path in find_images([data])]
    keys = [image.key for image in found]
    if not found:
        raise UserError(f"{data}: contains no images")
    if len(set(keys)) < len(keys):
        raise UserError(f"{data}: two images have the key {max(keys, key=keys.count)!r}")
    return found[:limit]


class DualRun:
    """Evaluation of methods on images, at one size.

    Args:
        images: in the order of the results.
        methods: from `make_methods`.
        tokenizer: whose codes are counted.
        grids: grids whose codes are counted.
        size: side of the centre squares in pixels.
        perceptual: name and network of a perceptual distance.
        out: folder of the results.
        settings: everything else that the results depend on, as JSON.

    Raises:
        UserError: the folder belongs to another evaluation.
    """

    def __init__(
        self,
        images: Sequence[EvaluatedImage],
        methods: Sequence[Method],
        tokenizer: DualTokenizer,
        grids: Sequence[Grid],
        size: int,
        perceptual: tuple[str, nn.Module],
        out: Path,
        settings: Mapping[str, Any],
    ) -> None:
        self.images, self.methods, self.tokenizer = images, methods, tokenizer
        self.grids, self.size, self.out = grids, size, out
        self.perceptual_name, network = perceptual
        self.perceptual = network.to(tokenizer.device)
        identity = {
            "images": [image.key for image in images],
            "methods": [method.name for method in methods],
            "tokenizer": tokenizer.fingerprint(),
            "size": size,
            "perceptual": self.perceptual_name,
            **settings,
            **execution_settings(tokenizer.renderer_dtype),
        }
        claim_folder(out / SETTINGS, identity, "an evaluation")
        self._file = RowFile(out / ROWS)
        by_key = {image.key: image for image in images}
        self.rows = {
            row["key"]: row for row in self._file.read() if self._is_current(row, by_key.get(row["key"]))
        }

    def run(self, on_done: Callable[[int], None] = lambda count: None) -> None:
        """Evaluate the images that have no row yet; each is written when it is done."""
        done = len(self.rows)
        on_done(done)
        for image in self.images:
            if image.key in self.rows:
                continue
            row = self._evaluate(image)
            self.rows[image.key] = row
            self._file.append(row)
            on_done(1)

    def _is_current(self, row: Mapping[str, Any], image: EvaluatedImage | None) -> bool:
        """Return True unless the image could not be read, or its file or a used caption has changed."""
        if image is None or "error" in row:
            return False
        caption = self._caption_hash(image)
        # rows of earlier versions have no caption
        return row.get("stamp") == _stamp(image) and row.get("caption", caption) == caption

    def _caption_hash(self, image: EvaluatedImage) -> str | None:
        """Return a hash of an image's caption; None if no method uses it."""
        return hash_name(image.caption) if any(method.uses_caption for method in self.methods) else None

    def _evaluate(self, image: EvaluatedImage) -> dict[str, Any]:
        try:
            sample = self._read(image)
            codes = {format_name(grid): self.tokenizer.encode(sample.image, grid) for grid in self.grids}
        except UserError as error:
            return {"key": image.key, "error": str(error)}
        return {
            "key": image.key,
            "stamp": _stamp(image),
            "caption": self._caption_hash(image),
            "methods": {method.name: self._measure(method, sample) for method in self.methods},
            "guide_codes": {name: tokens.guide.flatten().tolist() for name, tokens in codes.items()},
            "semantic_codes": next(iter(codes.values())).semantic.tolist(),
        }

    @torch.no_grad()
    def _measure(self, method: Method, sample: Sample) -> dict[str, float] | None:
        """Return the metrics of one reconstruction, rounded to 8 bits like a file; None without one."""
        started = time.perf_counter()
        back = method.reconstruct(sample)
        if back is None:
            return None
        seconds = time.perf_counter() - started
        saved = ((back + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
        pair = saved[None].float(), sample.image[None].float()
        return {
            "psnr": psnr(*pair).item(),
            "ssim": ssim(*pair).item(),
            "perceptual": self.perceptual(*pair).item(),
            "seconds": round(seconds, 3),
        }

    def _read(self, image: EvaluatedImage) -> Sample:
        crop = image_to_tensor(resize_center_crop(load_image(image.path), self.size))
        seed = int(sha256(image.path)[:8], 16)
        return Sample(crop.to(self.tokenizer.device), seed, image.caption)

    def sheet(self, count: int = 8) -> Image.Image:
        """Return a sheet of the first images that could be read, one row per method."""
        shown = [image for image in self.images if "error" not in self.rows[image.key]][:count]
        samples = [self._read(image) for image in shown]
        rows, labels = [[_cell(sample.image) for sample in samples]], [["original"]]
        for method in self.methods:
            cells = []
            for sample in samples:
                back = method.reconstruct(sample)
                cells.append(_cell(torch.ones_like(sample.image) if back is None else back.clamp(-1, 1)))
            rows.append(cells)
            label = [method.name] + ([f"{method.bits:.0f} bits"] if method.bits else [])
            labels.append(label)
        return contact_sheet(rows, title=f"{len(shown)} images", labels=labels, max_cell=128)

    def write_sheet(self, count: int = 8) -> Path:
        """Write the sheet to OUT/sheet.png; return its path."""
        path = self.out / "sheet.png"
        with atomic_write(path) as part:
            self.sheet(count).save(part, format="PNG")
        return path


def _stamp(image: EvaluatedImage) -> list[int | None]:
    """Return size and time of an image's file, as JSON."""
    return [*file_stamp(str(image.path))]


def _cell(image: Tensor) -> Cell:
    return Cell(partial(tensor_to_image, image.float()))
