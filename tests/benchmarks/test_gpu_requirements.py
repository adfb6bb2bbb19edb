"""The packages that are brought along to the GPU check's machine are those that its imports need there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROUGHT = {"deepspeed", "diffusers", "omegaconf", "lpips", "pytest-timeout", "typer"}
"""Some that the check cannot run without."""
TOO_LARGE = {"scipy", "scikit-learn", "pyarrow", "xformers", "opencv-python-headless", "stlpips-pytorch"}


pytestmark = pytest.mark.slow  # the check is imported a dozen times


@pytest.fixture(scope="module")
def needed():
    command = [sys.executable, "-m", "benchmarks.gpu.requirements"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return dict(line.split("==") for line in ran.stdout.splitlines())


def test_the_check_imports_with_the_present_and_the_brought_packages_only(needed):
    """All others are hidden from its imports."""
    assert needed.keys() >= BROUGHT
    assert not needed.keys() & TOO_LARGE


def test_what_the_machine_has_is_not_brought(needed):
    from benchmarks.gpu.requirements import PRESENT

    assert not needed.keys() & PRESENT
