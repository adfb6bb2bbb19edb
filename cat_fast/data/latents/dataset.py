"""Latents on disk: encoded once with the tokenizer, read in every epoch of a DiT's training.

A folder contains shards, each with a commit record (`cat_fast.data.latents.format`), so a killed process
loses at most the shard it was filling.

    with LatentShardWriter(folder, tokenizer.fingerprint(), resolution=128, class_names=names) as writer:
        for key, ... in photographs:
            if key not in writer:
                writer.add(key, latent, label=3, ratio=16)
    dataset = LatentDataset(folder, tokenizer.fingerprint())
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from cat_fast.data.latents.format import (
    HEADER,
    LatentEntry,
    claim_latents,
    damage,
    read_json,
    records,
    write_shard,
)
from cat_fast.data.latents.inputs import INPUT_SHARDS, EncodedInputs
from cat_fast.data.latents.moments import Moments, per_channel
from cat_fast.data.latents.reader import LatentReader
from cat_fast.data.latents.table import LatentTable
from cat_fast.errors import UserError

__all__ = ["LatentDataset", "LatentEntry", "LatentSample", "LatentShardWriter"]


@dataclass(frozen=True, kw_only=True)
class LatentSample:
    """One latent of a `LatentDataset`."""

    key: str
    latent: torch.Tensor
    """(c, h, w) float32, in the scale of the DiT."""
    label: int
    ratio: int


class LatentShardWriter:
    """Writer of latent shards for a single process; reopening a folder with the same settings resumes it.

    Keys are held in memory; `cat_fast.inference.encoding.latent_shards` writes data sets of any size from
    several processes. It is a context manager: leaving it without an exception writes the last, smaller
    shard.

    Args:
        folder: output folder; created if missing.
        fingerprint: fingerprint of the tokenizer that encodes the latents.
        resolution: side of the images in pixels.
        class_names: names of the labels 0, 1, ...
        latents_per_shard: number of latents per shard, and so the most that a killed process loses.

    Raises:
        UserError: the folder contains latents of another tokenizer, resolution or list of classes.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str,
        *,
        resolution: int,
        class_names: Sequence[str],
        latents_per_shard: int = 1024,
    ) -> None:
        if latents_per_shard < 1:
            raise UserError(f"expected latents_per_shard of at least 1, got {latents_per_shard}")
        self._folder = Path(folder)
        self._fingerprint = fingerprint
        self._per_shard = latents_per_shard
        self._class_count = len(class_names)
        claim_latents(
            self._folder,
            {"fingerprint": fingerprint, "resolution": resolution, "class_names": list(class_names)},
        )
        self._buffer: dict[str, torch.Tensor] = {}
        self._entries: list[LatentEntry] = []
        self._keys: set[str] = set()
        self._taken: set[str] = set()
        for record in records(self._folder):
            if damage(self._folder, record) is None:
                self._taken.add(record["shard"])
                self._keys.update(entry["key"] for entry in record["latents"])

    def __contains__(self, key: object) -> bool:
        """Return whether the latent of this key is written or buffered."""
        return key in self._keys

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()

    def add(
        self, key: str, latent: torch.Tensor, *, label: int, ratio: int, caption: str | None = None
    ) -> None:
        """Append one (c, h, w) latent as encoded by the tokenizer; stored as float32.

        Raises:
            UserError: the key exists, the latent is not three-dimensional and finite, or the label is
                invalid.
        """
        if key in self._keys:
            raise UserError(f"latent {key!r} exists already; skip keys that are `in` the writer")
        if latent.ndim != 3 or not torch.isfinite(latent).all():
            raise UserError(f"latent {key!r}: expected finite (c, h, w), got shape {tuple(latent.shape)}")
        if not 0 <= label < self._class_count:
            raise UserError(f"latent {key!r}: expected a label below {self._class_count}, got {label}")
        channels, height, width = latent.shape
        self._entries.append(
            LatentEntry(key=key, label=label, ratio=ratio, shape=(channels, height, width), caption=caption)
        )
        self._buffer[key] = latent.detach().to("cpu", torch.float32, copy=True).contiguous()
        self._keys.add(key)
        if len(self._buffer) >= self._per_shard:
            self.flush()

    def flush(self) -> None:
        """Write the buffered latents as a shard, atomically."""
        if not self._buffer:
            return
        names = (f"shard-{index:05d}.safetensors" for index in range(len(self._taken) + 1))
        name = next(name for name in names if name not in self._taken)
        write_shard(self._folder / name, self._buffer, self._entries, self._fingerprint)
        self._taken.add(name)
        self._buffer.clear()
        self._entries.clear()


class LatentDataset(Dataset[LatentSample]):
    """Map-style data set of the latents in a folder, in shard order; can be passed to loader workers.

    Latents are returned in the scale of the DiT, (latent - shift_factor) * scaling_factor per channel: with
    zero mean and unit standard deviation over the data set if `normalized`, else as they were written.

    Args:
        folder: output of `LatentShardWriter` or `cat-fast encode-shards`.
        fingerprint: fingerprint of the tokenizer that will decode; checked if given.
        normalized: normalise each channel over the data set.
        verify: compare each shard with its SHA-256 when it is first read.

    Raises:
        UserError: the folder contains no latents, latents of another tokenizer, incompletely encoded input
            shards, or a missing or damaged shard.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str | None = None,
        *,
        normalized: bool = True,
        verify: bool = True,
    ) -> None:
        self._folder = Path(folder)
        if not (self._folder / HEADER).is_file():
            raise UserError(
                f"{self._folder} contains no latents: {HEADER} is missing; run cat-fast encode-shards"
            )
        header = read_json(self._folder / HEADER)
        self.fingerprint: str = header["fingerprint"]
        self.resolution: int = header["resolution"]
        self.class_names: list[str] = header["class_names"]
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise UserError(
                f"{self._folder}: expected latents of tokenizer {fingerprint}, got {self.fingerprint}; "
                "encode the images with this tokenizer first"
            )
        hashes: dict[str, str] = {}
        moments: list[Moments] = []
        inputs, table = EncodedInputs(), LatentTable.Builder()
        for record in records(self._folder):
            self._require_intact(record)
            inputs.add(record)
            table.add(record["shard"], record["latents"])
            if record["latents"]:
                moments.append(Moments(**record["moments"]))
            if verify:
                hashes[record["shard"]] = record["sha256"]
        if INPUT_SHARDS in header:
            inputs.require_complete(self._folder, header[INPUT_SHARDS])
        if not moments:
            raise UserError(f"{self._folder} contains no complete shard; wait until encoding has finished")
        self.entries = table.finish()
        """Key, label, ratio and shape of every latent, in order."""
        total = Moments.merge(moments)
        self.shift_factor = list(total.mean) if normalized else [0.0] * len(total.mean)
        """Mean per channel over all latents, or 0."""
        self.scaling_factor = [1 / std if normalized and std > 0 else 1.0 for std in total.std]
        """Inverse standard deviation per channel, or 1."""
        self._reader = LatentReader(self._folder, hashes)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> LatentSample:
        entry = self.entries[index]
        latent = self._reader.read(self.entries.locate(index), entry.key)
        latent = (latent - per_channel(self.shift_factor)) * per_channel(self.scaling_factor)
        return LatentSample(key=entry.key, latent=latent, label=entry.label, ratio=entry.ratio)

    @cached_property
    def digest(self) -> str:
        """Hash of the training data: tokenizer, scale, and key, label, ratio and shape of each latent."""
        scale = np.array([self.shift_factor, self.scaling_factor])
        found = hashlib.sha256(self.fingerprint.encode() + scale.tobytes())
        self.entries.update_digest(found)
        return found.hexdigest()[:16]

    def token_counts(self, patch_size: int = 2) -> list[int]:
        """Return the number of tokens of each latent, without reading it."""
        return (self.entries.shapes[:, 1:].prod(axis=1) // patch_size**2).tolist()

    def _require_intact(self, record: dict[str, Any]) -> None:
        path = self._folder / record["shard"]
        if why := damage(self._folder, record):
            raise UserError(f"{path} {why}; encode again to rewrite it")
        if (found := record.get("fingerprint", self.fingerprint)) != self.fingerprint:
            raise UserError(
                f"{path}: expected latents of tokenizer {self.fingerprint} like the other shards, got {found}"
            )
