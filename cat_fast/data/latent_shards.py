"""Latents on disk: written once by the tokenizer, read many times by the generator.

A folder of latents holds

    latents.json                 tokenizer fingerprint, resolution, class names; written once
    shard-00000.safetensors      the latents of one shard under their keys
    shard-00000.json             key, label, ratio, shape, caption of each; size, SHA-256 and moments of the
    shard

The little JSON beside a shard is its commit record: it appears after the shard is safely on disk. A shard
without
one, or whose size does not match it, is no shard: what it held is written again, never twice. So a killed run
loses at most the shard it was filling.

    with LatentShardWriter(folder, tokenizer.fingerprint(), resolution=128, class_names=names) as writer:
        for key, ... in photographs:
            if key not in writer:
                writer.add(key, latent, label=3, ratio=16)
    dataset = LatentDataset(folder, tokenizer.fingerprint())
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from cat_fast.data.files import atomic_write
from cat_fast.data.moments import Moments, per_channel
from cat_fast.errors import UserError

HEADER = "latents.json"


@dataclass(frozen=True, kw_only=True)
class LatentEntry:
    """What is known of a latent without reading it."""

    key: str
    label: int
    ratio: int
    shape: tuple[int, int, int]
    """(c, h, w)."""
    caption: str | None = None


@dataclass(frozen=True, kw_only=True)
class LatentSample:
    """One latent of a `LatentDataset`."""

    key: str
    latent: torch.Tensor
    """(c, h, w) float32, each channel with zero mean and unit standard deviation over the data set."""
    label: int
    ratio: int


class LatentShardWriter:
    """Writes latents in shards of `latents_per_shard`; opened on a folder of its own making, it goes on
    there.

    A context manager: leaving it without an exception writes the last, smaller shard.

    Args:
        folder: where the shards go; made if missing.
        fingerprint: of the tokenizer that makes the latents.
        resolution: side of the pictures in pixels.
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
        self._per_shard = latents_per_shard
        self._class_count = len(class_names)
        header = {"fingerprint": fingerprint, "resolution": resolution, "class_names": list(class_names)}
        self._write_or_check_header(header)
        self._buffer: dict[str, torch.Tensor] = {}
        self._entries: list[LatentEntry] = []
        self._keys: set[str] = set()
        self._taken: set[int] = set()
        for record in _records(self._folder):
            if _damage(self._folder, record) is None:
                self._taken.add(int(record["shard"].removeprefix("shard-").removesuffix(".safetensors")))
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
        index = next(i for i in range(len(self._taken) + 1) if i not in self._taken)
        path = self._folder / f"shard-{index:05d}.safetensors"
        path.with_suffix(".json").unlink(missing_ok=True)  # a lost shard's record must not vouch for this one
        with atomic_write(path) as part:
            save_file(self._buffer, part)
        moments = Moments.of(self._buffer.values())
        record = {
            "shard": path.name,
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
            "moments": asdict(moments),
            "latents": [asdict(entry) for entry in self._entries],
        }
        _write_json(path.with_suffix(".json"), record)
        self._taken.add(index)
        self._buffer.clear()
        self._entries.clear()

    def _write_or_check_header(self, header: dict[str, Any]) -> None:
        path = self._folder / HEADER
        if not path.exists():
            _write_json(path, header)
            return
        found = _read_json(path)
        for name, value in header.items():
            if found.get(name) != value:
                raise UserError(
                    f"{self._folder} holds latents with {name} {found.get(name)!r}, not {value!r}; "
                    "give another folder, or delete this one"
                )


class LatentDataset(Dataset[LatentSample]):
    """The latents of a folder, in the order of their shards; map-style, and safe to hand to loader workers.

    Latents come out in the generator's scale, (latent - shift_factor) * scaling_factor, channel by channel.

    Args:
        folder: what a `LatentShardWriter` wrote.
        fingerprint: of the tokenizer that will decode; checked if given.
        verify: compare each shard with its SHA-256 when it is first read.

    Raises:
        UserError: no latents there, latents of another tokenizer, or a shard that is missing or damaged
            (named).
    """

    def __init__(self, folder: str | Path, fingerprint: str | None = None, *, verify: bool = True) -> None:
        self._folder = Path(folder)
        if not (self._folder / HEADER).is_file():
            raise UserError(
                f"{self._folder} holds no latents: {HEADER} is missing; write them with the encode step"
            )
        header = _read_json(self._folder / HEADER)
        self.fingerprint: str = header["fingerprint"]
        self.resolution: int = header["resolution"]
        self.class_names: list[str] = header["class_names"]
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise UserError(
                f"{self._folder} holds latents of tokenizer {self.fingerprint}, not of {fingerprint}; "
                "encode the pictures with this tokenizer first"
            )
        records = _records(self._folder)
        if not records:
            raise UserError(f"{self._folder} holds no whole shard yet; let the encode step finish")
        for record in records:
            if damage := _damage(self._folder, record):
                raise UserError(f"{self._folder / record['shard']} {damage}; encode again to rewrite it")
        self.entries: list[LatentEntry] = []
        """Key, label, ratio and shape of every latent, in order."""
        self._shard_of: list[str] = []
        for record in records:
            for entry in record["latents"]:
                self.entries.append(LatentEntry(**entry | {"shape": tuple(entry["shape"])}))
                self._shard_of.append(record["shard"])
        moments = Moments.merge([Moments(**record["moments"]) for record in records])
        self.shift_factor = list(moments.mean)
        """Mean of each channel over all latents."""
        self.scaling_factor = [1 / std if std > 0 else 1.0 for std in moments.std]
        """One over its standard deviation."""
        self._sha256 = {record["shard"]: record["sha256"] for record in records if verify}
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> LatentSample:
        entry = self.entries[index]
        latent = self._shard(self._shard_of[index]).get_tensor(entry.key)
        latent = (latent - per_channel(self.shift_factor)) * per_channel(self.scaling_factor)
        return LatentSample(key=entry.key, latent=latent, label=entry.label, ratio=entry.ratio)

    def token_counts(self, patch_size: int = 2) -> list[int]:
        """How many tokens each latent makes, without reading any."""
        return [entry.shape[1] * entry.shape[2] // patch_size**2 for entry in self.entries]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # file handles stay with their process

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            path = self._folder / name
            try:
                if name in self._sha256 and _sha256(path) != self._sha256[name]:
                    raise UserError(f"{path} is damaged: its content is not what was written; encode again")
                self._open[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}); encode again to rewrite it") from error
        return self._open[name]


def _records(folder: Path) -> list[dict[str, Any]]:
    """The commit records of a folder, in shard order."""
    return [_read_json(path) for path in sorted(folder.glob("shard-*.json"))]


def _damage(folder: Path, record: dict[str, Any]) -> str | None:
    """What is wrong with a recorded shard as far as its size tells, or None."""
    path = folder / record["shard"]
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != record["bytes"]:
        return f"is damaged: {path.stat().st_size} bytes of {record['bytes']}"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and encode again") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
