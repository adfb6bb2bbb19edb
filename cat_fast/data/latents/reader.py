"""Latents read one by one from the shards of a folder; those that were read last stay open."""

import io
import os
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from cat_fast.data.files import sha256
from cat_fast.data.latents.format import SUFFIXES
from cat_fast.data.latents.table import Place
from cat_fast.data.streams.formats.tar_index import Member, members
from cat_fast.errors import UserError

_MOST_OPEN = 512


class LatentReader:
    """Safe to hand to loader workers, each of which opens files of its own.

    Args:
        folder: of the shards.
        hashes: SHA-256 of the shards that are compared with it when they are first read.
    """

    def __init__(self, folder: Path, hashes: dict[str, str]) -> None:
        self._folder, self._hashes = folder, dict(hashes)
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._arrays: dict[str, np.ndarray] = {}
        """Of archives, (rows, 2): offset and size of each latent, found once and kept when the file is
        closed."""

    def read(self, place: Place, key: str) -> torch.Tensor:
        """The latent of this key, which lies there, as it was written.

        Raises:
            UserError: its shard cannot be read, or is not what was written.
        """
        file = self._file(place)
        if place.shard not in self._arrays:
            return file.get_tensor(key)
        offset, size = self._arrays[place.shard][place.row].tolist()
        content = os.pread(file.fileno(), size, offset)
        return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # file handles stay with their process

    def _file(self, place: Place) -> Any:
        name = place.shard
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path = self._folder / name
        # By its size alone the encode step takes the shard for whole as long as its record is there.
        advice = f"delete {path.with_suffix('.json')} and encode again"
        try:
            if name in self._hashes and sha256(path) != self._hashes[name]:
                raise UserError(f"{path} is damaged: its content is not what was written; {advice}")
            self._open[name] = self._opened(path, place.rows)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); {advice}") from error
        self._hashes.pop(name, None)  # once is enough
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        return self._open[name]

    def _opened(self, path: Path, rows: int) -> Any:
        if path.suffix != SUFFIXES["webdataset"]:
            return safe_open(path, framework="pt")
        file = path.open("rb")
        if path.name not in self._arrays:
            self._arrays[path.name] = _arrays(file, rows)
        return file


def _arrays(file: IO[bytes], rows: int) -> np.ndarray:
    found = [m for m in members(file) if isinstance(m, Member) and m.name.endswith(".npy")]
    if len(found) != rows:
        raise OSError(f"{len(found)} latents in it, {rows} in its record")
    return np.array([(member.offset, member.size) for member in found], dtype=np.int64)
