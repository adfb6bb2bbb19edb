"""Size of the repository: a check on a GPU machine copies every tracked file."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 42 << 20
SHIPPED_LIMIT = 20_000_000


def tracked_files() -> list[Path]:
    """Return the files that git tracks; skip outside a git checkout."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout")
    return [path for name in found.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_tracked_files_have_at_most_42_mib():
    size = sum(path.stat().st_size for path in tracked_files())
    assert size <= LIMIT, f"{size / 2**20:.1f} MiB"


def test_shipped_models_have_at_most_20_mb():
    shipped = ROOT / "cat_fast" / "weights" / "shipped_models"
    files = [path for path in tracked_files() if shipped in path.parents]
    size = sum(path.stat().st_size for path in files)
    assert size <= SHIPPED_LIMIT, f"{size / 1e6:.1f} MB in {[path.name for path in files]}"
