"""Unpacking of Debian packages, without root and without dpkg."""

import tarfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

_MAGIC = b"!<arch>\n"
_HEADER = 60


def unpack(package: Path, folder: Path, patterns: Sequence[str]) -> int:
    """Unpack the files of a .deb whose path matches one of the patterns; return their number.

    Args:
        patterns: shell patterns of paths below the root, such as "usr/share/fonts/*.ttf"; `*` also matches
            slashes.

    Raises:
        ValueError: the file is not a Debian package, or is damaged.
    """
    count = 0
    with package.open("rb") as file:
        try:
            with tarfile.open(fileobj=_data(file), mode="r|*") as tar:
                for member in tar:
                    path = member.name.removeprefix("./")
                    if (member.isfile() or member.issym()) and any(fnmatch(path, p) for p in patterns):
                        tar.extract(member, folder, filter="data")
                        count += 1
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{package.name}: not a readable Debian package ({error})") from error
    return count


def _data(file: IO[bytes]) -> IO[bytes]:
    """Position an `ar` archive at its data.tar member and return it."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError(f"{file.name}: not a Debian package")
    while header := file.read(_HEADER):
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58]
        if name.startswith("data.tar"):
            return file
        try:
            file.seek(int(size) + int(size) % 2, 1)
        except ValueError:
            break
    raise ValueError(f"{file.name}: the package has no data.tar member")
