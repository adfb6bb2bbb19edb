"""Reconstruction of all images by all columns, in parts that an interrupted evaluation does not repeat.

    OUT/parts/settings.json         identity of images, tokenizers and networks
    OUT/parts/000000.parquet        one row per image and reconstruction of 64 images
    OUT/parts/000000.npz            their features
    OUT/images/TOKENIZER-CHOICE/KEY.png    reconstructions, if they are saved
    OUT/images.parquet, reconstruction.json, worst.png      written at the end (`summary`, `gallery`)

Columns that choose the same rate for an image share its reconstruction.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor

from cat_fast.complexity.ratios.policy import ratio_of_image
from cat_fast.data.files import atomic_write
from cat_fast.data.folder_settings import claim_folder
from cat_fast.data.images.io import image_to_bytes, resize_center_crop
from cat_fast.data.input_samples import hash_name
from cat_fast.errors import UserError
from cat_fast.evaluation.features.loading import LoadedNetwork
from cat_fast.evaluation.features.perceptual import Perceptual
from cat_fast.evaluation.images.feature_files import Skipped
from cat_fast.evaluation.metrics import perceptual_distances, psnr, ssim
from cat_fast.evaluation.proxy import as_bytes
from cat_fast.evaluation.tokenizers.columns import Column
from cat_fast.evaluation.tokenizers.perception import Perceived, Perception, result_of
from cat_fast.evaluation.tokenizers.protocol import ImageTokenizer
from cat_fast.evaluation.tokenizers.samples import Samples
from cat_fast.evaluation.tokenizers.text import Word

PER_PART = 64
ORIGINAL = ""
"""Name of the tokenizer in the rows of originals."""
_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("tokenizer", pyarrow.string()),
        ("choice", pyarrow.int32()),
        ("jpeg_ratio", pyarrow.int32()),
        ("psnr", pyarrow.float64()),
        ("ssim", pyarrow.float64()),
        ("perceptual", pyarrow.float64()),
        ("words", pyarrow.string()),
        ("faces", pyarrow.string()),
        ("seconds", pyarrow.float64()),
        ("error", pyarrow.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ReconstructionSettings:
    """Settings of an evaluation of reconstructions."""

    size: int = 256
    """Side to which the centre square of each image is scaled."""
    batch_size: int = 8
    ocr: bool = True
    faces: bool = True
    save_images: bool = False
    """Write all reconstructions as PNG."""
    seed: int = 0
    """Seed of the bootstrap."""


class Rendition(NamedTuple):
    """An image's reconstruction by one tokenizer at one rate, or the image itself."""

    tokenizer: str
    choice: int


@dataclass
class Row:
    """Metrics of one rendition of one image."""

    key: str
    rendition: Rendition
    values: dict[str, Any]
    features: np.ndarray | None = None

    @property
    def words(self) -> list[Word] | None:
        stored = self.values["words"]
        return None if stored is None else [Word(*word) for word in json.loads(stored)]

    @property
    def faces(self) -> list[Any] | None:
        stored = self.values["faces"]
        return None if stored is None else [tuple(face) for face in json.loads(stored)]


@dataclass
class Results:
    """All renditions of the images that every column could reconstruct."""

    keys: list[str]
    originals: list[Row]
    columns: dict[str, list[Row]]
    """Rows of each column, in the order of `keys`."""
    skipped: list[Skipped] = field(default_factory=list)


class ReconstructionRun:
    """Evaluation of columns on samples.

    Args:
        network: features for rFID.

    Raises:
        UserError: the size does not divide by a ratio, or the folder contains another evaluation.
    """

    def __init__(
        self,
        samples: Samples,
        columns: Sequence[Column],
        settings: ReconstructionSettings,
        network: LoadedNetwork,
        perceptual: Perceptual,
        out: Path,
        device: str | torch.device = "cpu",
    ) -> None:
        self.samples, self.columns, self.settings = samples, columns, settings
        self.network, self.perceptual, self.out, self.device = network, perceptual, out, device
        self.choices = {column.name: column.choose(samples.scored, settings.size) for column in columns}
        for tokenizer in filter(lambda tokenizer: tokenizer.is_spatial, self.tokenizers.values()):
            for choice in tokenizer.choices:
                if settings.size % choice and self._uses(tokenizer, choice):
                    expected = f"expected a multiple of {choice}, a ratio of {tokenizer.name}"
                    raise UserError(f"--size {settings.size}: {expected}")
        identity = {
            "samples": samples.fingerprint(),
            "files": hash_name(repr(samples.stamps)),
            "columns": [column.name for column in columns],
            "thresholds": [list(column.thresholds.pair) for column in columns],
            "tokenizers": [tokenizer.record() for tokenizer in self.tokenizers.values()],
            "settings": {k: v for k, v in asdict(settings).items() if k not in ("batch_size", "seed")},
            "network": network.checksum,
            "perceptual": perceptual.record,
        }
        claim_folder(out / "parts" / "settings.json", identity, "an evaluation")

    @property
    def tokenizers(self) -> dict[str, ImageTokenizer]:
        return {column.tokenizer.name: column.tokenizer for column in self.columns}

    @property
    def parts(self) -> range:
        return range(-(-len(self.samples.scored) // PER_PART))

    def missing(self) -> list[int]:
        """Return the numbers of parts that have not been evaluated."""
        return [part for part in self.parts if not self._path(part, "parquet").is_file()]

    def run(self, perception: Perception, on_images: Callable[[int], None] = lambda count: None) -> None:
        """Evaluate the missing parts."""
        for part in self.missing():
            rows = self._evaluate(part, perception, on_images)
            features = {
                str(number): row.features for number, row in enumerate(rows) if row.features is not None
            }
            with atomic_write(self._path(part, "npz")) as temporary, temporary.open("wb") as file:
                np.savez(file, **features)  # type: ignore[arg-type]
            table = pyarrow.Table.from_pylist([_to_stored(row) for row in rows], _SCHEMA)
            with atomic_write(self._path(part, "parquet")) as temporary:
                pyarrow.parquet.write_table(table, temporary)

    def results(self) -> Results:
        """Return the rows of all parts, by column."""
        rows: dict[str, dict[Rendition, Row]] = defaultdict(dict)
        skipped = list(self.samples.skipped)
        for part in self.parts:
            with np.load(self._path(part, "npz"), allow_pickle=False) as features:
                stored = pyarrow.parquet.read_table(self._path(part, "parquet")).to_pylist()
                for number, values in enumerate(stored):
                    if values["error"] is not None:
                        skipped.append(Skipped(values["key"], values["error"]))
                        continue
                    rendition = Rendition(values["tokenizer"], values["choice"])
                    row = Row(values["key"], rendition, values, features[str(number)])
                    rows[values["key"]][rendition] = row
        bad = {entry.name for entry in skipped}
        numbers = [n for n, scored in enumerate(self.samples.scored) if scored.key not in bad]
        keys = [self.samples.scored[number].key for number in numbers]
        if not keys:
            name, why = skipped[0]
            raise UserError(f"{self.samples.data}: no image could be evaluated; {name}: {why}")
        original = Rendition(ORIGINAL, 0)
        return Results(
            keys=keys,
            originals=[rows[key][original] for key in keys],
            columns={
                column.name: [
                    rows[key][self._rendition(column, number, rows[key][original].values["jpeg_ratio"])]
                    for key, number in zip(keys, numbers, strict=True)
                ]
                for column in self.columns
            },
            skipped=skipped,
        )

    def reconstruct_one(self, key: str, rows: Sequence[Row]) -> list[Image.Image]:
        """Return an image and its renditions, computed again, for the gallery."""
        number = next(n for n, scored in enumerate(self.samples.scored) if scored.key == key)
        (_, image), *_ = self.samples.read(number, number + 1)
        assert isinstance(image, Image.Image)
        original = resize_center_crop(image, self.settings.size)
        x = _as_floats(image_to_bytes(original)[None])
        found = [original]
        for row in rows:
            tokenizer = self.tokenizers[row.rendition.tokenizer]
            pixels = as_bytes(tokenizer.reconstruct(x, row.rendition.choice).cpu())
            found.append(Image.fromarray(_as_array(pixels[0])))
        return found

    def _uses(self, tokenizer: ImageTokenizer, choice: int) -> bool:
        return any(
            column.rule == "jpeg" or choice in self.choices[column.name]
            for column in self.columns
            if column.tokenizer is tokenizer
        )

    def _rendition(self, column: Column, number: int, jpeg_ratio: int | None) -> Rendition:
        choice = self.choices[column.name][number]
        chosen = jpeg_ratio if choice is None else choice
        assert chosen is not None
        return Rendition(column.tokenizer.name, chosen)

    def _evaluate(self, part: int, perception: Perception, on_images: Callable[[int], None]) -> list[Row]:
        first = part * PER_PART
        by_jpeg = any(column.rule == "jpeg" for column in self.columns)
        rows: list[Row] = []
        pixels: list[Tensor] = []
        wanted: dict[Rendition, list[int]] = defaultdict(list)
        keys: list[str] = []
        for offset, (scored, image) in enumerate(self.samples.read(first, first + PER_PART)):
            if isinstance(image, str):
                rows.append(_failed(scored.key, Rendition(ORIGINAL, 0), image))
                on_images(1)
                continue
            jpeg_ratio = ratio_of_image(image) if by_jpeg else None
            index = len(pixels)
            pixels.append(image_to_bytes(resize_center_crop(image, self.settings.size)))
            keys.append(scored.key)
            for rendition in {self._rendition(c, first + offset, jpeg_ratio) for c in self.columns}:
                wanted[rendition].append(index)
            rows.append(Row(scored.key, Rendition(ORIGINAL, 0), {"jpeg_ratio": jpeg_ratio}))
        usable = [row for row in rows if "error" not in row.values]
        looked = [perception.submit(_as_array(image)) for image in pixels]
        for batch in self._batches(range(len(pixels))):
            features = self._features(torch.stack([pixels[n] for n in batch]))
            for number, one in zip(batch, features, strict=True):
                usable[number].features = one
        waiting: list[tuple[Row, Any]] = list(zip(usable, looked, strict=True))
        share = 1 / max(1, len(wanted))
        done = 0.0
        for rendition in sorted(wanted):
            for batch in self._batches(wanted[rendition]):
                for row, output in self._reconstruct(rendition, batch, keys, pixels):
                    rows.append(row)
                    if output is not None:
                        waiting.append((row, perception.submit(_as_array(output))))
                        if self.settings.save_images:
                            self._save(row, output)
            before, done = int(done), done + share * len(pixels)
            on_images(int(done + 1e-6) - before)
        for row, future in waiting:
            found: Perceived = result_of(future)
            row.values["words"] = None if found.words is None else json.dumps(found.words)
            row.values["faces"] = None if found.faces is None else json.dumps(found.faces)
        return rows

    def _reconstruct(
        self, rendition: Rendition, batch: Sequence[int], keys: Sequence[str], pixels: Sequence[Tensor]
    ) -> list[tuple[Row, Tensor | None]]:
        tokenizer = self.tokenizers[rendition.tokenizer]
        original = torch.stack([pixels[n] for n in batch])
        x = _as_floats(original)
        started = time.perf_counter()
        y = tokenizer.reconstruct(x, rendition.choice).float().cpu()
        seconds = (time.perf_counter() - started) / len(batch)
        if y.shape != x.shape:
            raise UserError(
                f"{tokenizer.name}: expected reconstructions {tuple(x.shape)}, got {tuple(y.shape)}"
            )
        finite = torch.isfinite(y).flatten(1).all(1)
        found: list[tuple[Row, Tensor | None]] = [
            (_failed(keys[n], rendition, f"{tokenizer.name}: the reconstruction is NaN or infinite"), None)
            for n, usable in zip(batch, finite.tolist(), strict=True)
            if not usable
        ]
        if not finite.any():
            return found
        output, x = as_bytes(y[finite]), x[finite]
        z = _as_floats(output)
        features = self._features(output)
        pair = z.to(self.device), x.to(self.device)
        distances = perceptual_distances(self.perceptual.network, *pair).cpu()
        metrics = zip(psnr(z, x).tolist(), ssim(z, x).tolist(), distances.tolist(), strict=True)
        kept = [n for n, usable in zip(batch, finite.tolist(), strict=True) if usable]
        for n, (decibels, structure, distance), one, image in zip(
            kept, metrics, features, output, strict=True
        ):
            values = {"psnr": decibels, "ssim": structure, "perceptual": distance, "seconds": seconds}
            found.append((Row(keys[n], rendition, values, one), image))
        return found

    def _batches(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        size = self.settings.batch_size
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def _features(self, images: Tensor) -> list[np.ndarray]:
        return list(self.network.network(images.to(self.device))["pool"].float().cpu().numpy())

    def _save(self, row: Row, image: Tensor) -> None:
        key = "".join(c if c.isalnum() or c in "-_." else "_" for c in row.key.removesuffix(".png"))
        folder = self.out / "images" / f"{row.rendition.tokenizer}-{row.rendition.choice}"
        with atomic_write(folder / f"{key}.png", flush=False) as part:
            Image.fromarray(_as_array(image)).save(part, format="PNG")

    def _path(self, part: int, suffix: str) -> Path:
        return self.out / "parts" / f"{part:06d}.{suffix}"


def _failed(key: str, rendition: Rendition, why: str) -> Row:
    return Row(key, rendition, {"error": why})


def _to_stored(row: Row) -> dict[str, Any]:
    return {
        "key": row.key,
        "tokenizer": row.rendition.tokenizer,
        "choice": row.rendition.choice,
        **dict.fromkeys(_SCHEMA.names[3:]),
        **row.values,
    }


def _as_floats(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _as_array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).contiguous().numpy()
