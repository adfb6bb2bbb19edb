"""The Debian packages of the corpus, pinned by version and SHA-256, and how they are obtained."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cat_fast.data.files import sha256
from cat_fast.errors import UserError
from cat_fast.processes.group import running


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian 12, for all architectures."""

    name: str
    version: str
    sha256: str
    size: int
    """Size of the .deb file, bytes."""

    @property
    def file(self) -> str:
        """File name of the package as apt-get writes it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


class Unavailable(Exception):
    """Raised for a package that cannot be obtained, with the reason in one line."""


PACKAGES = {
    row["name"]: DebianPackage(**row)
    for row in json.loads(Path(__file__).with_name("packages.json").read_text(encoding="utf-8"))
}
"""Packages by name."""


def can_download() -> bool:
    """Return True if apt-get is installed."""
    return shutil.which("apt-get") is not None


def obtain(package: DebianPackage, folder: Path, given: Path | None = None) -> Path:
    """Return the package's file: an earlier download in `folder`, a file in `given`, or a new download.

    Args:
        folder: downloads are kept here, so that an interrupted run continues.
        given: folder of .deb files to take instead of downloading.

    Raises:
        Unavailable: the file is missing or its content is not the pinned one.
    """
    earlier = folder / package.file
    if earlier.exists() and sha256(earlier) == package.sha256:
        return earlier
    if given is not None:
        return _require_pinned(_find(package, given), package)
    if not can_download():
        raise Unavailable("apt-get is not installed; pass a folder with the file to --from")
    folder.mkdir(parents=True, exist_ok=True)
    earlier.unlink(missing_ok=True)
    _download(package, folder)
    if not earlier.exists():
        raise Unavailable(f"version {package.version} is gone; apt-get found another or none")
    try:
        return _require_pinned(earlier, package)
    except Unavailable:
        earlier.unlink()
        raise


def list_of_files(packages: Sequence[DebianPackage]) -> str:
    """Return what to fetch by other means: one line per package with file name, size and SHA-256."""
    return "\n".join(f"{p.file}  {p.size / 1e6:.0f} MB  sha256:{p.sha256}" for p in packages)


def require_source(packages: Sequence[DebianPackage], folder: Path, given: Path | None) -> None:
    """Check that packages can be obtained at all.

    Raises:
        UserError: `given` is not a folder; or it is not given, apt-get is missing and a package has not been
            downloaded before. The message lists the files to fetch.
    """
    if given is not None and not given.is_dir():
        raise UserError(f"--from {given}: no such folder; expected a folder of .deb files")
    missing = [package for package in packages if not (folder / package.file).exists()]
    if given is None and missing and not can_download():
        raise UserError(
            "apt-get is not installed; fetch these files of Debian 12 and pass their folder to --from:"
            f" {'; '.join(list_of_files(missing).splitlines())}"
        )


def _find(package: DebianPackage, given: Path) -> Path:
    for name in (package.file, package.file.replace("%3a", ":"), package.file.replace(_epoch(package), "")):
        if (given / name).exists():
            return given / name
    raise Unavailable(f"{given} does not contain {package.file}")


def _epoch(package: DebianPackage) -> str:
    """Return the part of the file name that mirrors leave out, such as "1%3a"."""
    epoch, colon, _ = package.version.partition(":")
    return f"{epoch}%3a" if colon else "\0"


def _require_pinned(path: Path, package: DebianPackage) -> Path:
    if (found := sha256(path)) != package.sha256:
        raise Unavailable(f"{path.name} has SHA-256 {found[:12]}…, expected {package.sha256[:12]}…")
    return path


def _download(package: DebianPackage, folder: Path) -> None:
    command = ["apt-get", "download", "--quiet=2", f"{package.name}={package.version}"]
    with (folder / "apt.log").open("w+") as log:
        with running(command, cwd=folder, stdout=log, stderr=log) as process:
            code = process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.startswith("E:")]
    if code:
        raise Unavailable(lines[-1] if lines else f"apt-get exited with code {code}")
