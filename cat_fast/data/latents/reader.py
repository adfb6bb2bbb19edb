"""Random access to the latents of a folder, with an LRU cache of open shards."""

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
from cat_fast.data.latents.table import Location
from cat_fast.data.streams.formats.tar_index import Member, members
from cat_fast.errors import UserError

_MAX_OPEN_FILES = 512


class LatentReader:
    """Reader of single latents; can be passed to loader workers, each of which opens its own files.

    Args:
        folder: folder of the shards.
        hashes: expected SHA-256 by shard, compared when the shard is first read.
    """

    def __init__(self, folder: Path, hashes: dict[str, str]) -> None:
        self._folder, self._hashes = folder, dict(hashes)
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._arrays: dict[str, np.ndarray] = {}
        """Offset and size of each latent, (rows, 2), by archive; kept when the file is closed."""

    def read(self, location: Location, key: str) -> torch.Tensor:
        """Return a latent as it was written.

        Raises:
            UserError: its shard cannot be read, or does not have the expected SHA-256.
        """
        file = self._file(location)
        if location.shard not in self._arrays:
            return file.get_tensor(key)
        offset, size = self._arrays[location.shard][location.row].tolist()
        content = os.pread(file.fileno(), size, offset)
        return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # file handles cannot be pickled

    def _file(self, location: Location) -> Any:
        name = location.shard
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path = self._folder / name
        # The encoder checks only sizes: while the record exists, it considers the shard complete.
        advice = f"delete {path.with_suffix('.json')} and encode again"
        try:
            if name in self._hashes and sha256(path) != self._hashes[name]:
                raise UserError(f"{path} is damaged: its SHA-256 differs from its record; {advice}")
            self._open[name] = self._open_shard(path, location.rows)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); {advice}") from error
        self._hashes.pop(name, None)  # verified only once
        if len(self._open) > _MAX_OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[name]

    def _open_shard(self, path: Path, rows: int) -> Any:
        if path.suffix != SUFFIXES["webdataset"]:
            return safe_open(path, framework="pt")
        file = path.open("rb")
        if path.name not in self._arrays:
            self._arrays[path.name] = _arrays(file, rows)
        return file


def _arrays(file: IO[bytes], rows: int) -> np.ndarray:
    found = [m for m in members(file) if isinstance(m, Member) and m.name.endswith(".npy")]
    if len(found) != rows:
        raise OSError(f"expected {rows} latents as in its record, found {len(found)}")
    return np.array([(member.offset, member.size) for member in found], dtype=np.int64)
