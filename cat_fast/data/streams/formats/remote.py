"""Files of any file system that fsspec knows (local, s3://, gs://, memory:// …), with patience."""

import errno
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import IO, TypeVar

import fsspec
from fsspec.core import url_to_fs

from cat_fast.data.streams.formats.base import UnreadableShard
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.problems import Problems
from cat_fast.data.streams.formats.retries import Retries
from cat_fast.errors import UserError, one_line

T = TypeVar("T")
_CHUNK = 1 << 22
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Remote:
    """Finds and opens files, trying again with growing waits where that may help.

    Raises:
        UserError: nothing can be written to the scratch folder that the configuration names.
    """

    def __init__(self, config: StreamConfig, problems: Problems) -> None:
        self.config, self.problems = config, problems
        if config.scratch:
            self._scratch_file().close()

    def glob(self, pattern: str) -> list[str]:
        """What is there under names with wildcards, without the scheme; empty if nothing is.

        Raises:
            UnreadableShard: nobody tells, after all attempts.
            ValueError, ImportError: a file system that nobody knows, or whose package is missing.
        """
        filesystem, path = url_to_fs(pattern)
        return self._patiently(pattern, lambda: _glob(filesystem, path))

    def open(self, url: str) -> IO[bytes]:
        """A seekable local file: the file itself, or a nameless copy of a remote or compressed one.

        The copy has no name in any folder, so that nothing is left behind however the process ends.

        Raises:
            UnreadableShard: missing, forbidden, or not to be had after all attempts.
            UserError: there is no room for the copy.
        """
        return self._patiently(url, lambda: self._open(url))

    def read_if_there(self, url: str) -> bytes | None:
        """A small file whole; None if there is no such file."""

        def read() -> bytes | None:
            try:
                with fsspec.open(url, "rb") as file:
                    return file.read()
            except FileNotFoundError:
                return None

        return self._patiently(url, read)

    def _open(self, url: str) -> IO[bytes]:
        filesystem, path = url_to_fs(url)
        compressed = path.endswith((".gz", ".bz2", ".xz", ".zst"))
        if "file" in _protocols(filesystem) and not compressed:
            return open(path, "rb")
        expected = None if compressed else filesystem.size(path)
        copy = self._scratch_file()
        try:
            with fsspec.open(url, "rb", compression="infer" if compressed else None) as file:
                shutil.copyfileobj(file, copy, _CHUNK)
            if expected is not None and copy.tell() != expected:
                raise OSError(f"{copy.tell()} bytes of {expected} arrived")
        except BaseException:
            copy.close()
            raise
        copy.seek(0)
        return copy

    def _scratch_file(self) -> IO[bytes]:
        try:
            return tempfile.TemporaryFile(dir=self.config.scratch or None)
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> UserError:
        folder = self.config.scratch or "the system's temporary folder"
        return UserError(
            f"data.stream.scratch: {folder}: {error.strerror or error}; make room for copies of remote "
            "shards, two a ratio and rank, or name another folder"
        )

    def _patiently(self, url: str, work: Callable[[], T]) -> T:
        retries = Retries(self.config, self.problems, url)
        while True:
            try:
                return work()
            except UserError:
                raise
            except (FileNotFoundError, PermissionError, IsADirectoryError, ImportError) as error:
                raise UnreadableShard(_reason(error)) from error  # waiting does not help
            except Exception as error:  # every file system has exceptions of its own
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise self._no_room(error) from error
                if not retries.failed(_reason(error)):
                    raise UnreadableShard(f"{_reason(error)}, {retries.failures} attempts") from error


def _glob(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """As fsspec's own, which however takes folders that cannot be read for empty ones."""
    if "**" in path:
        return filesystem.glob(path)
    folder, _, pattern = path.rpartition("/")
    found = []
    for parent in _glob(filesystem, folder) if "*" in folder else [folder or filesystem.root_marker]:
        try:
            names = filesystem.ls(parent, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            continue
        # Of a file, its own name is all that is listed.
        found += [n for n in names if n != parent and fnmatchcase(n.rpartition("/")[2], pattern)]
    return found


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
