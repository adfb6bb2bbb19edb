"""Index of a tar archive: offsets of its members, skipping damaged parts."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Member:
    """A file in the archive: `size` bytes from `offset`."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """An unusable member or byte range of the archive."""

    where: str
    why: str


def members(file: IO[bytes]) -> Iterator[Member | Damage]:
    """Yield the files in order; after a damaged header, continue at the next valid one.

    Only headers are read, not the content of files.
    """
    total = os.fstat(file.fileno()).st_size
    expected = 0
    try:
        # With ignore_zeros, tarfile continues after a broken header instead of ending silently.
        tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)  # noqa: SIM115
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # tarfile would keep all of them
            if info.offset > expected and not _zeros(file, expected, info.offset):
                yield Damage(f"byte {expected}", f"found no archive member up to byte {info.offset}")
            if info.size < 0:
                yield Damage(info.name, f"invalid size of {info.size} bytes")
                return
            end = info.offset_data + info.size
            expected = -(-end // _BLOCK) * _BLOCK
            if end > total:
                yield Damage(info.name, f"truncated: {total - info.offset_data} of {info.size} bytes")
                return
            if info.isfile():
                yield Member(info.name, info.offset_data, info.size)
    except Exception as error:  # tarfile raises many types on damaged headers
        yield Damage(f"byte {expected}", f"the archive is damaged: {error}")
        return
    if expected >= total:
        yield Damage(f"byte {total}", "the archive is truncated: its end marker is missing")
    elif not _zeros(file, expected, total):
        yield Damage(f"byte {expected}", "found no archive member up to the end")


def _zeros(file: IO[bytes], start: int, stop: int) -> bool:
    position = file.tell()
    try:
        while start < stop:
            chunk = os.pread(file.fileno(), min(1 << 20, stop - start), start)
            if not chunk:
                return True
            if chunk.strip(b"\0"):
                return False
            start += len(chunk)
        return True
    finally:
        file.seek(position)
