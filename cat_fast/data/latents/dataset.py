"""Latents on disk: written once by the tokenizer, read many times by the generator.

A folder holds shards and, beside each, the record that vouches for it (`cat_fast.data.latents.format`), so a
killed run loses at most the shard it was filling.

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
    """(c, h, w) float32, in the generator's scale."""
    label: int
    ratio: int


class LatentShardWriter:
    """Writes latents in shards of `latents_per_shard`; opened on a folder of its own making, it goes on
    there.

    For one process, which knows its keys; `cat_fast.inference.encoding.latent_shards` writes sets of any size
    from many. A context manager: leaving it without an exception writes the last, smaller shard.

    Args:
        folder: where the shards go; made if missing.
        fingerprint: of the tokenizer that makes the latents.
        resolution: side of the images in pixels.
        class_names: what the labels 0, 1, ... mean.
        latents_per_shard: how many latents a kill may lose, and a shard holds.

    Raises:
        UserError: the folder holds latents of another tokenizer, resolution or set of classes.
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
            raise UserError(f"latents_per_shard is {latents_per_shard}: at least 1 is needed")
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
        """Whether the latent of this key is written, or waits in the shard being filled."""
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
        """Append one (c, h, w) latent, as the tokenizer gives it; stored as float32.

        Raises:
            UserError: a key that is there already, a shape of another rank, values that are not finite, or a
                label that is no class.
        """
        if key in self._keys:
            raise UserError(f"latent {key!r} is there already; skip the keys that are `in` the writer")
        if latent.ndim != 3 or not torch.isfinite(latent).all():
            raise UserError(f"latent {key!r}: expected finite (c, h, w), got shape {tuple(latent.shape)}")
        if not 0 <= label < self._class_count:
            raise UserError(f"latent {key!r}: label {label} is none of the {self._class_count} classes")
        channels, height, width = latent.shape
        self._entries.append(
            LatentEntry(key=key, label=label, ratio=ratio, shape=(channels, height, width), caption=caption)
        )
        self._buffer[key] = latent.detach().to("cpu", torch.float32, copy=True).contiguous()
        self._keys.add(key)
        if len(self._buffer) >= self._per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard, whole or not at all."""
        if not self._buffer:
            return
        names = (f"shard-{index:05d}.safetensors" for index in range(len(self._taken) + 1))
        name = next(name for name in names if name not in self._taken)
        write_shard(self._folder / name, self._buffer, self._entries, self._fingerprint)
        self._taken.add(name)
        self._buffer.clear()
        self._entries.clear()


class LatentDataset(Dataset[LatentSample]):
    """The latents of a folder, in the order of their shards; map-style, and safe to hand to loader workers.

    Latents come out in the generator's scale, (latent - shift_factor) * scaling_factor, channel by channel:
    with zero mean and unit standard deviation over the data set, or not `normalized`, as they were written.

    Args:
        folder: what a `LatentShardWriter` or `cat-fast encode-shards` wrote.
        fingerprint: of the tokenizer that will decode; checked if given.
        normalized: whether the scale is that of the data set.
        verify: compare each shard with its SHA-256 when it is first read.

    Raises:
        UserError: no latents there, latents of another tokenizer, input shards that are not encoded to the
            end, or a shard that is missing or damaged (named).
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
                f"{self._folder} holds no latents: {HEADER} is missing; write them with the encode step"
            )
        header = read_json(self._folder / HEADER)
        self.fingerprint: str = header["fingerprint"]
        self.resolution: int = header["resolution"]
        self.class_names: list[str] = header["class_names"]
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise UserError(
                f"{self._folder} holds latents of tokenizer {self.fingerprint}, not of {fingerprint}; "
                "encode the images with this tokenizer first"
            )
        hashes: dict[str, str] = {}
        moments: list[Moments] = []
        inputs, table = EncodedInputs(), LatentTable.Builder()
        for record in records(self._folder):
            self._require_whole(record)
            inputs.add(record)
            table.add(record["shard"], record["latents"])
            if record["latents"]:
                moments.append(Moments(**record["moments"]))
            if verify:
                hashes[record["shard"]] = record["sha256"]
        if INPUT_SHARDS in header:
            inputs.require_all(self._folder, header[INPUT_SHARDS])
        if not moments:
            raise UserError(f"{self._folder} holds no whole shard yet; let the encode step finish")
        self.entries = table.finish()
        """Key, label, ratio and shape of every latent, in order."""
        total = Moments.merge(moments)
        self.shift_factor = list(total.mean) if normalized else [0.0] * len(total.mean)
        """Mean of each channel over all latents, or 0."""
        self.scaling_factor = [1 / std if normalized and std > 0 else 1.0 for std in total.std]
        """One over its standard deviation, or 1."""
        self._reader = LatentReader(self._folder, hashes)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> LatentSample:
        entry = self.entries[index]
        latent = self._reader.read(self.entries.place_of(index), entry.key)
        latent = (latent - per_channel(self.shift_factor)) * per_channel(self.scaling_factor)
        return LatentSample(key=entry.key, latent=latent, label=entry.label, ratio=entry.ratio)

    @cached_property
    def digest(self) -> str:
        """Of what a run learns from: the tokenizer, the scale, and key, label, ratio and shape of each."""
        scale = np.array([self.shift_factor, self.scaling_factor])
        found = hashlib.sha256(self.fingerprint.encode() + scale.tobytes())
        self.entries.add_to(found)
        return found.hexdigest()[:16]

    def token_counts(self, patch_size: int = 2) -> list[int]:
        """How many tokens each latent makes, without reading any."""
        return (self.entries.shapes[:, 1:].prod(axis=1) // patch_size**2).tolist()

    def _require_whole(self, record: dict[str, Any]) -> None:
        path = self._folder / record["shard"]
        if why := damage(self._folder, record):
            raise UserError(f"{path} {why}; encode again to rewrite it")
        if (found := record.get("fingerprint", self.fingerprint)) != self.fingerprint:
            raise UserError(
                f"{path} holds latents of tokenizer {found}, the others are of {self.fingerprint}"
            )
