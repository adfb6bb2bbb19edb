"""The members of a tar archive with their places in the file, whatever is damaged between them."""

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
    """A stretch of the archive, or a member of it, that holds nothing to use."""

    where: str
    why: str


def members(file: IO[bytes]) -> Iterator[Member | Damage]:
    """Files in order; after a damaged header the search goes on at the next whole one.

    The data are not read, only passed over.
    """
    total = os.fstat(file.fileno()).st_size
    expected = 0
    try:
        # Zeros are ignored so that tarfile goes on after a broken header, where it would else end in silence.
        tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)  # noqa: SIM115
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # it would keep them all
            if info.offset > expected and not _zeros(file, expected, info.offset):
                yield Damage(f"byte {expected}", f"no archive member up to byte {info.offset}")
            if info.size < 0:
                yield Damage(info.name, f"a size of {info.size} bytes")
                return
            end = info.offset_data + info.size
            expected = -(-end // _BLOCK) * _BLOCK
            if end > total:
                yield Damage(info.name, f"cut short: {total - info.offset_data} bytes of {info.size}")
                return
            if info.isfile():
                yield Member(info.name, info.offset_data, info.size)
    except Exception as error:  # damaged headers make tarfile raise anything
        yield Damage(f"byte {expected}", f"the archive is damaged: {error}")
        return
    if expected >= total:
        yield Damage(f"byte {total}", "the archive is cut short: its end mark is missing")
    elif not _zeros(file, expected, total):
        yield Damage(f"byte {expected}", "no archive member up to the end")


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
