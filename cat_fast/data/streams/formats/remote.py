"""Files on any fsspec file system (local, s3://, gs://, memory:// …), with retries."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import IO, TypeVar

import fsspec
from fsspec.compression import compr
from fsspec.core import url_to_fs

from cat_fast.data.streams.formats.base import UnreadableShard
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.retries import Retries
from cat_fast.errors import UserError, one_line

T = TypeVar("T")
_CHUNK = 1 << 22
_ZSTANDARD = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16)))
"""First bytes of a frame, and of the skippable frames that come first in files of pzstd."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", **dict.fromkeys(_ZSTANDARD, "zstd")}
"""Compression by the first bytes of a file, as fsspec names it."""
_VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "created")
"""Fields that change with a file's content, by file system."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Remote:
    """Client that lists and opens files; temporary errors are retried with growing waits.

    Raises:
        UserError: the configured scratch folder is not writable.
    """

    def __init__(self, config: StreamConfig, problems: ProblemLog) -> None:
        self.config, self.problems = config, problems
        if config.scratch:
            self._scratch_file().close()

    def glob(self, pattern: str) -> list[str]:
        """Return the paths that match a pattern with wildcards, without the scheme.

        Raises:
            UnreadableShard: listing failed in all attempts.
            ValueError, ImportError: the file system is unknown, or its package is missing.
        """
        filesystem, path = url_to_fs(pattern)
        return self._with_retries(pattern, lambda: _glob(filesystem, path))

    def open(self, url: str) -> IO[bytes]:
        """Return a seekable local file: the file itself, or an unnamed copy of a remote or compressed one.

        Whether it is compressed (gzip, bzip2, xz, zstd) follows from its first bytes, not from its name.
        The copy is an unlinked temporary file, so it disappears even if the process is killed.

        Raises:
            UnreadableShard: the file is missing, access is denied, or all attempts failed.
            UserError: the scratch folder is full.
        """
        return self._with_retries(url, lambda: self._open(url))

    def read_if_exists(self, url: str) -> bytes | None:
        """Return the content of a small file, or None if it does not exist."""

        def read() -> bytes | None:
            try:
                with fsspec.open(url, "rb") as file:
                    return file.read()
            except FileNotFoundError:
                return None

        return self._with_retries(url, read)

    def stamp(self, url: str) -> list[int | str]:
        """Return size and modification time of a file, or what else its file system has to notice a change.

        Raises:
            UnreadableShard: the file is missing, access is denied, or all attempts failed.
        """
        filesystem, path = url_to_fs(url)

        def read() -> list[int | str]:
            if "file" in _protocols(filesystem):
                status = os.stat(path)
                return [status.st_size, status.st_mtime_ns]
            info = filesystem.info(path)
            return [info["size"], next((str(info[name]) for name in _VERSIONS if name in info), "")]

        return self._with_retries(url, read)

    def _open(self, url: str) -> IO[bytes]:
        filesystem, path = url_to_fs(url)
        local = "file" in _protocols(filesystem)
        file: IO[bytes] = open(path, "rb") if local else self._copy(filesystem, url, path)  # noqa: SIM115
        start = os.pread(file.fileno(), max(map(len, _COMPRESSED)), 0)
        compression = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
        if compression is None:
            return file
        with file:
            return self._decompressed(file, compression)

    def _copy(self, filesystem: fsspec.AbstractFileSystem, url: str, path: str) -> IO[bytes]:
        expected = filesystem.size(path)
        copy = self._scratch_file()
        try:
            with fsspec.open(url, "rb") as file:
                shutil.copyfileobj(file, copy, _CHUNK)
            if expected is not None and copy.tell() != expected:
                raise OSError(f"received {copy.tell()} of {expected} bytes")
        except BaseException:
            copy.close()
            raise
        copy.seek(0)
        return copy

    def _decompressed(self, file: IO[bytes], compression: str) -> IO[bytes]:
        copy = self._scratch_file()
        try:
            if compression == "zstd":
                _decompress_zstandard(file, copy)
            else:
                with compr[compression](file, mode="rb") as content:
                    shutil.copyfileobj(content, copy, _CHUNK)
        except BaseException:
            copy.close()
            raise
        copy.seek(0)
        return copy

    def _scratch_file(self) -> IO[bytes]:
        try:
            return tempfile.TemporaryFile(dir=self.config.scratch or None)
        except OSError as error:
            raise self._scratch_error(error) from error

    def _scratch_error(self, error: OSError) -> UserError:
        folder = self.config.scratch or "the system's temporary folder"
        return UserError(
            f"data.stream.scratch: {folder}: {error.strerror or error}; free space for copies of remote "
            "shards, two per ratio and rank, or choose another folder"
        )

    def _with_retries(self, url: str, work: Callable[[], T]) -> T:
        retries = Retries(self.config, self.problems, url)
        while True:
            try:
                return work()
            except UserError:
                raise
            except (FileNotFoundError, PermissionError, IsADirectoryError, ImportError) as error:
                raise UnreadableShard(_reason(error)) from error  # retrying does not help
            except Exception as error:  # each file system has its own exceptions
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise self._scratch_error(error) from error
                if not retries.failed(_reason(error)):
                    raise UnreadableShard(f"{_reason(error)}, after {retries.failures} attempts") from error


def _decompress_zstandard(file: IO[bytes], copy: IO[bytes]) -> None:
    """Write the content of all frames of a file to `copy`; fsspec would stop after the first frame.

    Raises:
        ImportError: zstandard is not installed.
        EOFError: the file ends within a frame.
    """
    try:
        from zstandard import ZstdDecompressor
    except ImportError as error:
        raise ImportError("compressed with zstd: decompress it, or pip install zstandard") from error
    frame = None
    while chunk := file.read(_CHUNK):
        while chunk:
            frame = frame or ZstdDecompressor().decompressobj()
            copy.write(frame.decompress(chunk))
            ended = frame.eof
            chunk, frame = (frame.unused_data, None) if ended else (b"", frame)
    if frame is not None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")


def _glob(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Glob like fsspec, but raise for folders that cannot be read, which fsspec treats as empty."""
    if "**" in path:
        return filesystem.glob(path)
    folder, _, pattern = path.rpartition("/")
    found = []
    for parent in _glob(filesystem, folder) if "*" in folder else [folder or filesystem.root_marker]:
        try:
            names = filesystem.ls(parent, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            continue
        # Listing a file returns its own name.
        found += [n for n in names if n != parent and fnmatchcase(n.rpartition("/")[2], pattern)]
    return found


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
