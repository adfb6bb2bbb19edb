"""Index of a tar archive: offsets of its members, skipping damaged parts."""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

_BLOCK = tarfile.BLOCKSIZE
_MAX_SPARSE_BYTES = 1 << 30
"""Maximum size of a sparse member, whose holes take no space in the archive."""
_MAX_LINKS = 40
"""Maximum number of symbolic links in a row, as in the kernel."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in the archive."""

    name: str
    """Name as of `normal_name`."""
    offset: int
    """Position of its first stored byte."""
    size: int
    """Size of the file in bytes."""
    parts: tuple[tuple[int, int], ...] | None = None
    """Of a sparse member, (position in the file, size) of each part, which are stored one after another."""
    damage: str = ""
    """Reason why the file cannot be read; empty if it can."""

    def read(self, file: IO[bytes]) -> bytes:
        """Return the content of the file.

        Raises:
            OSError: it cannot be read.
        """
        if self.damage:
            raise OSError(self.damage)
        if self.parts is None:
            return _read(file, self.offset, self.size)
        content, offset = bytearray(self.size), self.offset
        for position, size in self.parts:
            content[position : position + size] = _read(file, offset, size)
            offset += size
        return bytes(content)


@dataclass(frozen=True, slots=True)
class Damage:
    """An unusable member or byte range of the archive."""

    where: str
    why: str


@dataclass(frozen=True, slots=True)
class _Link:
    name: str
    hard: bool
    """Whether its target is an earlier member; that of a symbolic link may come later."""
    target: str
    """Name of the target as of `normal_name`."""
    shown: str
    """Kind and target of the link, for messages."""


def members(file: IO[bytes]) -> list[Member | Damage]:
    """Return the files in order; after a damaged header, continue at the next valid one.

    A link is a file with the content of its target. Only headers are read, not the content of files.
    """
    found: list[Member | Damage | _Link] = []
    by_name: dict[str, Member | _Link] = {}
    for item in _scan(file):
        if isinstance(item, _Link) and item.hard:
            item = _resolve(item, by_name)
        found.append(item)
        if not isinstance(item, Damage):
            by_name[item.name] = item
    return [_resolve(item, by_name) if isinstance(item, _Link) else item for item in found]


def normal_name(name: str) -> str:
    """Return a member's name without `./` and doubled slashes: `./a//b.jpg` is `a/b.jpg`."""
    return posixpath.normpath(name) if name else name


def _scan(file: IO[bytes]) -> Iterator[Member | Damage | _Link]:
    total = os.fstat(file.fileno()).st_size
    expected = 0
    try:
        # With ignore_zeros, tarfile continues after a broken header instead of ending silently.
        tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)  # noqa: SIM115
        expected = _after_global_headers(file, 0)
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # tarfile would keep all of them
            if info.offset > expected and not _zeros(file, expected, info.offset):
                yield Damage(f"byte {expected}", f"found no archive member up to byte {info.offset}")
            if info.size < 0:
                yield Damage(info.name, f"invalid size of {info.size} bytes")
                return
            sparse: Any = info.sparse  # typeshed has another type
            parts: tuple[tuple[int, int], ...] | None = None if sparse is None else tuple(sparse)
            stored = info.size if parts is None else sum(size for _, size in parts)
            if info.isreg() and info.offset_data + stored > total:
                yield Damage(info.name, f"truncated: {total - info.offset_data} of {stored} bytes")
                return
            tar.offset = expected = _after_global_headers(file, tar.offset)
            if info.isreg():
                damage = "" if parts is None else _sparse_damage(info.size, parts)
                yield Member(normal_name(info.name), info.offset_data, info.size, parts, damage)
            elif info.islnk() or info.issym():
                yield _link(info)
    except Exception as error:  # tarfile raises many types on damaged headers
        yield Damage(f"byte {expected}", f"the archive is damaged: {error}")
        return
    if expected >= total:
        yield Damage(f"byte {total}", "the archive is truncated: its end marker is missing")
    elif not _zeros(file, expected, total):
        yield Damage(f"byte {expected}", "found no archive member up to the end")


def _after_global_headers(file: IO[bytes], offset: int) -> int:
    """Return the position after global pax headers, which describe the archive, such as a commit.

    tarfile reads them with the member after them, whose offset does not include them.
    """
    while True:
        try:
            header = tarfile.TarInfo.frombuf(os.pread(file.fileno(), _BLOCK, offset), "utf-8", "replace")
        except tarfile.HeaderError:
            return offset
        if header.type != tarfile.XGLTYPE or header.size < 0:
            return offset
        offset += _BLOCK + -(-header.size // _BLOCK) * _BLOCK


def _sparse_damage(size: int, parts: tuple[tuple[int, int], ...]) -> str:
    if size > _MAX_SPARSE_BYTES:
        return f"sparse file of {size} bytes, more than the limit of {_MAX_SPARSE_BYTES}"
    if any(start < 0 or length < 0 or start + length > size for start, length in parts):
        return "invalid map of a sparse file"
    return ""


def _link(info: tarfile.TarInfo) -> _Link:
    name, shown = normal_name(info.name), f"link to {info.linkname}"
    if info.islnk():
        return _Link(name, True, normal_name(info.linkname), f"hard {shown}")
    target = normal_name(posixpath.join(posixpath.dirname(name), info.linkname))
    return _Link(name, False, target, f"symbolic {shown}")


def _resolve(link: _Link, by_name: dict[str, Member | _Link]) -> Member:
    """Return a file with the name of a link and the content of its target."""
    target: Member | _Link | None = link
    for _ in range(_MAX_LINKS):
        if not isinstance(target, _Link):
            break
        target = by_name.get(target.target)
    if isinstance(target, Member):
        return replace(target, name=link.name)
    return Member(link.name, 0, 0, damage=f"{link.shown}, which is not a file of this archive")


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    content = os.pread(file.fileno(), size, offset)
    if len(content) != size:
        raise OSError(f"read {len(content)} of {size} bytes")
    return content


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
