"""Batched encoding of photographs to a latent file and decoding; errors of single images are collected."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from cat_fast.complexity import tokens_per_image
from cat_fast.complexity.ratios.policy import RatioChoice, RatioPolicy
from cat_fast.data.files import require_writable, write_json
from cat_fast.data.images.io import image_to_bytes, load_image, resize_center_crop, tensor_to_image
from cat_fast.data.images.writer import ImageWriter
from cat_fast.data.streams.formats.base import Labels
from cat_fast.errors import UserError
from cat_fast.inference.encoding.latent_file import LatentFile, LatentRecord, unique_keys, write_latents
from cat_fast.inference.encoding.photo_descriptions import PhotoDescriptions
from cat_fast.inference.encoding.ratio_batches import ImageToEncode, batches_ahead, encode_by_ratio, to_device
from cat_fast.inference.encoding.requirements import require_patches
from cat_fast.models.decode_tier import decode_tier
from cat_fast.models.execution import describe_execution
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.pipeline_config import upcast

T = TypeVar("T")
NOT_FINITE = "the latent contains NaN or infinite values; check the weights of the tokenizer"
"""Error of an image that the tokenizer cannot encode."""
EXECUTION = "execution.json"
"""Record of `describe_execution` next to images."""
IMAGE_FORMATS = ("png", "jpg", "webp")
_SCORING_BATCH_SIZE = 256
"""Captions per call of the scorer."""


@dataclass(frozen=True, kw_only=True)
class EncodedPhoto:
    """Result for one photograph: the choice of ratio, or an error."""

    file: Path
    key: str
    """Unique name of its latent in the latent file."""
    choice: RatioChoice | None = None
    tokens: int | None = None
    """Tokens of its latent for a DiT with patch size 2."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class DecodedLatent:
    """Result for one latent: an image file, or an error."""

    key: str
    ratio: int
    size: int
    """Side of the image in pixels."""
    file: Path | None = None
    error: str | None = None


def encode_files(
    photos: Sequence[Path],
    out: Path,
    *,
    tokenizer: NestedAutoencoderKL,
    policy: RatioPolicy,
    descriptions: PhotoDescriptions | None = None,
    size: int = 256,
    batch_size: int = 8,
    on_done: Callable[[EncodedPhoto], None] = lambda photo: None,
) -> list[EncodedPhoto]:
    """Encode the centre square of each photograph, scaled to size x size, and write all latents to `out`.

    Captions are scored in batches, and images of equal ratio are encoded in batches. Each latent is the mode
    of the posterior. `out` is written atomically at the end, and left untouched if every photograph failed.

    Args:
        policy: chooses each photograph's ratio; it falls back to pixels for photographs without a caption.
        descriptions: captions of the photographs; by default read from text files next to them.
        on_done: called with each result as it becomes available.

    Returns:
        One result per photograph, in order.

    Raises:
        UserError: `size` does not divide into patches at every ratio, or `out` cannot be written.
    """
    require_patches(size, max(tokenizer.config["ratios"]))
    require_writable(out)
    descriptions = descriptions or PhotoDescriptions()
    results: dict[str, EncodedPhoto] = {}
    latents: dict[str, Tensor] = {}

    def done(result: EncodedPhoto) -> None:
        results[result.key] = result
        on_done(result)

    keys = unique_keys([os.fsencode(photo.stem).decode("utf-8", "replace") for photo in photos])

    def prepared() -> Iterator[ImageToEncode[EncodedPhoto]]:
        for chunk in _chunks(list(zip(photos, keys, strict=True)), _SCORING_BATCH_SIZE):
            choices = _choose(policy, descriptions, [photo for photo, _ in chunk])
            for (file, key), choice in zip(chunk, choices, strict=True):
                try:
                    image = load_image(file)
                    if isinstance(choice, UserError):
                        raise choice
                    choice = choice or policy.choose_by_pixels(image)
                except UserError as error:
                    done(EncodedPhoto(file=file, key=key, error=str(error)))
                    continue
                tokens = tokens_per_image(choice.ratio, size)
                photo = EncodedPhoto(file=file, key=key, choice=choice, tokens=tokens)
                pixels = image_to_bytes(resize_center_crop(image, size))
                yield ImageToEncode(photo, pixels, choice.ratio)

    for batch in encode_by_ratio(tokenizer, prepared(), batch_size):
        for photo, latent in batch:
            if not torch.isfinite(latent).all():
                done(EncodedPhoto(file=photo.file, key=photo.key, error=f"{photo.file}: {NOT_FINITE}"))
                continue
            latents[photo.key] = latent
            done(photo)

    ordered = [results[key] for key in keys]
    records = {photo.key: _record(photo, size) for photo in ordered if photo.choice}
    if records:
        latents = {key: latents[key] for key in records}
        made_with = describe_execution(tokenizer.device, tokenizer.dtype)
        write_latents(out, latents, records, tokenizer=tokenizer.latents_fingerprint(), made_with=made_with)
    return ordered


def decode_file(
    latents: Path,
    out: Path,
    *,
    tokenizer: NestedAutoencoderKL,
    image_format: str = "png",
    force: bool = False,
    batch_size: int = 8,
    on_done: Callable[[DecodedLatent], None] = lambda latent: None,
) -> list[DecodedLatent]:
    """Decode every latent of a file to `out`/KEY.`image_format`, writing each image atomically.

    Files are encoded by background threads, and a GPU decodes a batch while the one before is read.

    Args:
        latents: a file written by `encode_files`.
        out: output folder, created if missing.
        image_format: "png", "jpg" (quality 95) or "webp" (quality 95).
        force: decode latents of another tokenizer too; a different number of channels is still an error.
        on_done: called with each result as it becomes available; its file may still be being written.

    Returns:
        One result per latent, in file order.

    Raises:
        UserError: not a latent file, latents of another tokenizer, or a folder that cannot be written.
    """
    if image_format not in IMAGE_FORMATS:
        raise UserError(f"unknown image format {image_format!r}; expected {', '.join(IMAGE_FORMATS)}")
    stored = LatentFile.open(latents)
    fingerprint = tokenizer.latents_fingerprint()
    if stored.tokenizer != fingerprint and not force:
        raise UserError(
            f"{latents}: encoded by tokenizer {stored.tokenizer}, but the checkpoint is {fingerprint};"
            " use the checkpoint that encoded it, or pass --force to decode anyway"
        )
    require_writable(out / "image")
    execution = describe_execution(tokenizer.device, tokenizer.dtype)
    write_json(out / EXECUTION, execution | {"decode_tier": decode_tier(tokenizer)})
    results: dict[str, DecodedLatent] = {}

    def done(result: DecodedLatent) -> None:
        results[result.key] = result
        on_done(result)

    batches: dict[tuple[int, tuple[int, ...]], list[str]] = defaultdict(list)
    for key, record in stored.records.items():
        problem = _reason_undecodable(key, record, stored.shapes[key], tokenizer)
        if problem:
            done(DecodedLatent(key=key, ratio=record.ratio, size=record.size, error=f"{key}: {problem}"))
        else:
            batches[record.ratio, stored.shapes[key]].append(key)
    running: deque[tuple[list[str], int, Tensor]] = deque()
    with ImageWriter() as writer:

        def finish_all_but(ahead: int) -> None:
            while len(running) > ahead:
                keys, ratio, x_BCHW = running.popleft()
                for key, x in zip(keys, x_BCHW.cpu(), strict=True):
                    done(_write(writer, key, x, ratio, out / f"{key}.{image_format}"))

        for (ratio, _), keys in batches.items():
            for batch in _chunks(keys, batch_size):
                x_BCHW = _start_decoding(tokenizer, [stored.load(key) for key in batch], ratio)
                running.append((batch, ratio, x_BCHW))
                finish_all_but(batches_ahead(tokenizer.device))
        finish_all_but(0)
    return [results[key] for key in stored.records]


def _record(photo: EncodedPhoto, size: int) -> LatentRecord:
    assert photo.choice is not None
    source = os.fsencode(photo.file.name).decode("utf-8", "replace")
    choice = photo.choice
    return LatentRecord(
        ratio=choice.ratio,
        size=size,
        source=source,
        score=choice.score,
        why=choice.why,
        scored_by=choice.scored_by,
        thresholds=choice.thresholds,
        jpeg_thresholds=choice.jpeg_thresholds,
    )


def _choose(
    policy: RatioPolicy, descriptions: PhotoDescriptions, photos: Sequence[Path]
) -> list[RatioChoice | UserError | None]:
    """Choose the ratios of photographs, with captions scored in one batch; None without a description."""
    if policy.fixed:
        return [policy.fixed] * len(photos)
    unreadable: dict[int, UserError] = {}
    labels = []
    for number, photo in enumerate(photos):
        description = None
        try:
            description = descriptions.find(photo)
        except UserError as error:
            unreadable[number] = error
        labels.append(Labels() if description is None else Labels(**asdict(description)))
    return [unreadable.get(number, choice) for number, choice in enumerate(policy.choose(labels))]


@torch.inference_mode()
def _start_decoding(tokenizer: NestedAutoencoderKL, latents: list[Tensor], ratio: int) -> Tensor:
    """Return the images, float32 on the tokenizer's device, without waiting for it."""
    with upcast(tokenizer):
        z_BCHW = to_device(torch.stack(latents), tokenizer.device).to(tokenizer.dtype)
        return tokenizer.decode(z_BCHW, ratio).sample.float()


def _reason_undecodable(
    key: str, record: LatentRecord, shape: tuple[int, ...], tokenizer: NestedAutoencoderKL
) -> str | None:
    """Return why a latent cannot be decoded, or None; the file is not trusted."""
    if key in (".", "..") or set(key) & {"/", "\\", "\0"}:
        return "the latent's name is not a valid file name; rename it in the latent file"
    if record.ratio not in tokenizer.config["ratios"]:
        return f"the tokenizer has no ratio {record.ratio}"
    side = record.size // record.ratio
    if shape != (expected := (tokenizer.config["latent_channels"], side, side)):
        return f"expected a latent of shape {expected}, got {shape}"
    return None


def _write(writer: ImageWriter, key: str, x: Tensor, ratio: int, file: Path) -> DecodedLatent:
    size = x.shape[-1]
    try:
        image = tensor_to_image(x)
    except ValueError as error:
        return DecodedLatent(key=key, ratio=ratio, size=size, error=f"{key}: {error}")
    image_format = file.suffix[1:].upper().replace("JPG", "JPEG")
    writer.write(file, image, format=image_format, quality=95)
    return DecodedLatent(key=key, ratio=ratio, size=size, file=file)


def _chunks(items: list[T], length: int) -> Iterator[list[T]]:
    for start in range(0, len(items), length):
        yield items[start : start + length]
