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
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
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
    MOMENTS,
    SCALE,
    LatentEntry,
    claim_latents,
    damage,
    read_json,
    records,
)
from cat_fast.data.latents.inputs import INPUT_SHARDS, EncodedInputs
from cat_fast.data.latents.moments import Moments
from cat_fast.data.latents.reader import LatentReader
from cat_fast.data.latents.scale import Factor, LatentScale, Normalization, read_normalization
from cat_fast.data.latents.shard_file import write_shard
from cat_fast.data.latents.table import LatentTable
from cat_fast.data.ratio_origin import RatioOrigin, origins_from_json, origins_to_json
from cat_fast.errors import UserError

__all__ = ["LatentDataset", "LatentEntry", "LatentSample", "LatentShardWriter"]

_FIXED = RatioOrigin(source="fixed")
_LOG = logging.getLogger("cat_fast.data")


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
        scale: the tokenizer's own scale, `latent_scale(tokenizer)`, which a DiT with `data.normalized: none`
            applies.
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
        scale: LatentScale | None = None,
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
            {
                "fingerprint": fingerprint,
                SCALE: (scale or LatentScale()).to_json(),
                "resolution": resolution,
                "class_names": list(class_names),
            },
        )
        self._buffer: dict[str, torch.Tensor] = {}
        self._entries: list[LatentEntry] = []
        self._origins: Counter[RatioOrigin] = Counter()
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
        self,
        key: str,
        latent: torch.Tensor,
        *,
        label: int,
        ratio: int,
        caption: str | None = None,
        origin: RatioOrigin = _FIXED,
    ) -> None:
        """Append one (c, h, w) latent as encoded by the tokenizer; stored as float32.

        Args:
            origin: what decided the ratio, if not the caller.

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
        self._origins[origin] += 1
        if len(self._buffer) >= self._per_shard:
            self.flush()

    def flush(self) -> None:
        """Write the buffered latents as a shard, atomically."""
        if not self._buffer:
            return
        names = (f"shard-{index:05d}.safetensors" for index in range(len(self._taken) + 1))
        name = next(name for name in names if name not in self._taken)
        origins = origins_to_json(self._origins)
        write_shard(self._folder / name, self._buffer, self._entries, self._fingerprint, origins=origins)
        self._taken.add(name)
        self._buffer.clear()
        self._entries.clear()
        self._origins.clear()


class LatentDataset(Dataset[LatentSample]):
    """Map-style data set of the latents in a folder, in shard order; can be passed to loader workers.

    Latents are returned in the scale of the DiT, (latent - shift_factor) * scaling_factor.

    Args:
        folder: output of `LatentShardWriter` or `cat-fast encode-shards`.
        fingerprint: fingerprint of the tokenizer that will decode; checked if given.
        normalized: `none` applies the tokenizer's own shift and scaling factor; `per_channel` gives each
            channel mean 0 and standard deviation 1 over the data set, with the same weight for every image;
            `per_ratio` does so for the latents of each ratio. True and False are `per_channel` and `none`.
        tokenizer_scale: the tokenizer's own scale; by default the one recorded when the latents were encoded.
        verify: compare each shard with its SHA-256 when it is first read.
        part: index and number of processes that divide this comparison among them, such as the ranks of a
            run, so that a large data set is not hashed by each of them. Another process may read a
            damaged shard before the damage is found.

    Raises:
        UserError: the folder contains no latents, latents of another tokenizer, incompletely encoded input
            shards, or a missing or damaged shard; or the tokenizer's scale is needed and unknown.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str | None = None,
        *,
        normalized: Normalization | bool = "per_channel",
        tokenizer_scale: LatentScale | None = None,
        verify: bool = True,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self._folder = Path(folder)
        normalization = read_normalization(normalized)
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
        moments: defaultdict[int, list[Moments]] = defaultdict(list)
        unmeasured: set[str] = set()
        self.origins: Counter[RatioOrigin] = Counter()
        """Number of latents per origin of their ratio."""
        inputs, table = EncodedInputs(), LatentTable.Builder()
        index, parts = part
        for number, record in enumerate(records(self._folder)):
            self._require_intact(record)
            inputs.add(record)
            table.add(record["shard"], record["latents"])
            self.origins += origins_from_json(record.get("origins", ()))
            if MOMENTS not in record and record["latents"]:
                unmeasured.add(record["shard"])
            for ratio, found in record.get(MOMENTS, {}).items():
                moments[int(ratio)].append(Moments(**found))
            if verify and number % parts == index:
                hashes[record["shard"]] = record["sha256"]
        if INPUT_SHARDS in header:
            inputs.require_complete(self._folder, header[INPUT_SHARDS])
        if not moments and not unmeasured:
            raise UserError(f"{self._folder} contains no complete shard; wait until encoding has finished")
        self.entries = table.finish()
        """Key, label, ratio and shape of every latent, in order."""
        self._reader = LatentReader(self._folder, hashes)
        if unmeasured and normalization != "none":
            self._measure(unmeasured, moments)
        self.moments = {ratio: Moments.merge(parts) for ratio, parts in sorted(moments.items())}
        """Moments of the latents of each ratio, as they were written."""
        if normalization == "none":
            self.scale = tokenizer_scale or self._recorded_scale(header)
        else:
            self.scale = LatentScale.normalizing(self.moments, normalization)

    @property
    def shift_factor(self) -> Factor:
        """Shift of `scale`."""
        return self.scale.shift_factor

    @property
    def scaling_factor(self) -> Factor:
        """Factor of `scale`."""
        return self.scale.scaling_factor

    def reach(self) -> dict[int, float]:
        """Estimate the largest absolute value per ratio in the scale of the DiT: mean and 4 std."""
        found = {}
        for ratio, moments in self.moments.items():
            mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (moments.mean, moments.std))
            ends = torch.stack([self.scale.apply(mean + side * 4 * std, ratio) for side in (-1, 1)])
            found[ratio] = float(ends.abs().max())
        return found

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> LatentSample:
        entry = self.entries[index]
        latent = self._reader.read(self.entries.locate(index), entry.key)
        latent = self.scale.apply(latent, entry.ratio)
        return LatentSample(key=entry.key, latent=latent, label=entry.label, ratio=entry.ratio)

    @cached_property
    def digest(self) -> str:
        """Hash of the training data: tokenizer, scale, and key, label, ratio and shape of each latent."""
        factors = self.scale.shift_factor, self.scale.scaling_factor
        values = [[*factor.values()] if isinstance(factor, Mapping) else factor for factor in factors]
        found = hashlib.sha256(self.fingerprint.encode() + np.array(values).tobytes())
        self.entries.update_digest(found)
        return found.hexdigest()[:16]

    def token_counts(self, patch_size: int = 2) -> list[int]:
        """Return the number of tokens of each latent, without reading it."""
        return (self.entries.shapes[:, 1:].prod(axis=1) // patch_size**2).tolist()

    def _measure(self, shards: Collection[str], moments: defaultdict[int, list[Moments]]) -> None:
        """Add the moments of shards of an earlier version, whose records do not hold them by ratio."""
        _LOG.warning(
            "data: %s: %d shards were encoded by an earlier version; reading their latents for statistics",
            *(self._folder, len(shards)),
        )
        entries = self.entries
        for shard, start, stop in zip(entries.shards, entries.starts, entries.starts[1:], strict=False):
            if shard not in shards:
                continue
            rows = ((int(i), entries[int(i)]) for i in range(start, stop))
            latents = ((row.ratio, self._reader.read(entries.locate(i), row.key)) for i, row in rows)
            for ratio, found in Moments.by_group(latents).items():
                moments[ratio].append(found)

    def _recorded_scale(self, header: Mapping[str, Any]) -> LatentScale:
        if SCALE not in header:
            raise UserError(
                f"{self._folder} does not record the scaling factor of its tokenizer, because an earlier "
                "version encoded it; set data.tokenizer to the folder of the tokenizer"
            )
        channels = self.entries[0].shape[0]
        return LatentScale(
            **(header[SCALE] or {"shift_factor": [0.0] * channels, "scaling_factor": [1.0] * channels})
        )

    def _require_intact(self, record: dict[str, Any]) -> None:
        path = self._folder / record["shard"]
        if why := damage(self._folder, record):
            raise UserError(f"{path} {why}; encode again to rewrite it")
        if (found := record.get("fingerprint", self.fingerprint)) != self.fingerprint:
            raise UserError(
                f"{path}: expected latents of tokenizer {self.fingerprint} like the other shards, got {found}"
            )
