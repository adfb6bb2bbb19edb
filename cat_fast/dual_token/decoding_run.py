"""Decoding of token records to image files, which a killed run does not decode again.

decoded.json         settings, and a hash of the codes of each image; written before the first image
execution.json       device, dtype, versions and backends of the last call
KEY.png              an image; its noise depends on the seed and its key, not on the other images
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat_fast.data.files import require_writable, write_json
from cat_fast.data.folder_settings import claim_folder, require_same_settings
from cat_fast.data.images.io import tensor_to_image
from cat_fast.data.images.writer import ImageWriter, is_complete_image
from cat_fast.dual_token.rerender.backend import Size
from cat_fast.dual_token.rerender.rerender import RerenderSettings
from cat_fast.dual_token.token_file import TokenRecord
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.inference.encoding.codec import EXECUTION, IMAGE_FORMATS
from cat_fast.models.execution import describe_execution, execution_settings

PLAN = "decoded.json"


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How guides and codes become images."""

    size: Size | None = None
    """Height and width in pixels; None for the size that the diffusion model was trained on."""
    settings: RerenderSettings = field(default_factory=RerenderSettings)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Result for one record: an image file, or an error."""

    key: str
    file: Path | None = None
    error: str | None = None


class DecodingRun:
    """Images of token records in one folder.

    Args:
        records: with distinct keys.
        out: created if missing; resumed if started with the same arguments.
        tokenizer: the tokenizer.
        image_format: one of `IMAGE_FORMATS`; jpg and webp have quality 95.
        rendering: None writes the guides alone.

    Raises:
        UserError: unknown format, a record that lacks what the mode needs, a size or a number of steps that
            the diffusion model does not have, or a folder with images made with other arguments. Nothing is
            written then.
    """

    def __init__(
        self,
        records: Sequence[TokenRecord],
        out: Path,
        tokenizer: DualTokenizer,
        image_format: str = "png",
        rendering: Rendering | None = None,
    ) -> None:
        self.records, self.out, self.tokenizer = records, out, tokenizer
        self.image_format, self.rendering = image_format, rendering
        if image_format not in IMAGE_FORMATS:
            raise UserError(f"unknown image format {image_format!r}; expected {', '.join(IMAGE_FORMATS)}")
        if rendering is None:
            self._require_guides("has semantic codes only, and no guide to decode")
        else:
            self._check(rendering)
        self._plan = self._make_plan()
        require_same_settings(out / PLAN, self._plan, "images")
        self._is_claimed = (out / PLAN).exists()

    def path(self, record: TokenRecord) -> Path:
        """Return the image file of a record."""
        return self.out / f"{record.key}.{self.image_format}"

    def count_done(self) -> int:
        """Return the number of images that an earlier call has written."""
        return sum(map(self._is_done, self.records))

    def decode(self, on_progress: Callable[[float], Any] = lambda count: None) -> list[Decoded]:
        """Decode the missing images and return the results of all, in order.

        An image that cannot be decoded is an error of its own.

        Args:
            on_progress: called after every step with the fraction of images that it amounts to.

        Raises:
            UserError: the folder cannot be written.
        """
        require_writable(self.out / PLAN)
        results = []
        with ImageWriter() as writer:  # files are encoded while the next image is decoded
            for record in self.records:
                results.append(self._decode_missing(record, writer, on_progress))
        return results

    def _decode_missing(
        self, record: TokenRecord, writer: ImageWriter, on_progress: Callable[[float], Any]
    ) -> Decoded:
        file = self.path(record)
        if self._is_done(record):
            return Decoded(key=record.key, file=file)
        try:
            image = self._decode(record, on_progress)
        except UserError as error:
            return Decoded(key=record.key, error=f"{record.key}: {error}")
        self._claim()
        name = {"jpg": "jpeg"}.get(self.image_format, self.image_format)
        writer.write(file, tensor_to_image(image), format=name, quality=95)
        return Decoded(key=record.key, file=file)

    def _decode(self, record: TokenRecord, on_progress: Callable[[float], Any]) -> Tensor:
        rendering = self.rendering
        if rendering is None:
            (image,) = self.tokenizer.decode_guides([record.tokens])
            on_progress(1)
            return image
        settings, seeds = rendering.settings, [_seed_of(rendering.seed, record.key)]
        steps = settings.total_steps
        image = self.tokenizer.decode_batch(
            [record.tokens], rendering.size, settings, seeds, lambda: on_progress(1 / steps)
        )[0]
        if not steps:
            on_progress(1)
        return image

    def _claim(self) -> None:
        """Claim the folder. Not before the first image: a run that fails must not keep others from it."""
        if self._is_claimed:
            return
        for record in self.records:  # images of other arguments, which would count as decoded
            self.path(record).unlink(missing_ok=True)
        claim_folder(self.out / PLAN, self._plan, "images")
        tokenizer = self.tokenizer
        write_json(self.out / EXECUTION, describe_execution(tokenizer.device, self._dtype))
        self._is_claimed = True

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of the model that makes the images."""
        tokenizer = self.tokenizer
        return tokenizer.guide.dtype if self.rendering is None else tokenizer.renderer_dtype

    def _is_done(self, record: TokenRecord) -> bool:
        return self._is_claimed and is_complete_image(self.path(record))

    def _check(self, rendering: Rendering) -> None:
        backend, settings = self.tokenizer.backend, rendering.settings
        size = rendering.size or backend.default_size
        backend.check_size(size)
        backend.trajectory(settings.steps, size, settings.equations)
        if settings.mode != "semantic":
            self._require_guides("has no guide; use the mode semantic, or remove it")
        if settings.mode in ("full", "semantic"):
            for record in self.records:
                if not record.tokens.semantic.numel():
                    raise UserError(
                        f"{record.key}: has no semantic codes; use the mode unconditioned, or remove it"
                    )

    def _require_guides(self, problem: str) -> None:
        for record in self.records:
            if not record.tokens.guide.numel():
                raise UserError(f"{record.key}: {problem}")

    def _make_plan(self) -> dict[str, Any]:
        """Return everything that determines the bits of the images; a resumed run must match it."""
        tokenizer, rendering = self.tokenizer, self.rendering
        settings: dict[str, Any] = {
            "tokenizer": tokenizer.fingerprint(),
            "format": self.image_format,
            "device": tokenizer.device.type,
            "rendering": None if rendering is None else asdict(rendering),
            **execution_settings(self._dtype),
        }
        if rendering is not None:
            settings["renderer"] = tokenizer.backend.fingerprint()
        vocabulary = tokenizer.vocabulary
        images = {record.key: _hash(vocabulary.flatten(record.tokens)) for record in self.records}
        return {"settings": settings, "images": images}


def _hash(ids: Sequence[int]) -> str:
    return hashlib.blake2b(json.dumps(list(ids)).encode(), digest_size=8).hexdigest()


def _seed_of(seed: int, key: str) -> int:
    digest = hashlib.blake2b(f"{seed} {key}".encode(errors="surrogatepass"), digest_size=7).digest()
    return int.from_bytes(digest, "little")
