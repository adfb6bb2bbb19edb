"""Packages that the GPU check needs next to those of its machine, derived from its imports.

    python -m benchmarks.gpu.requirements

prints one `name==version` per line. All other packages are hidden from the imports, as they are missing on
that machine; a package whose absence fails an import is needed, with its requirements.
"""

import importlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
MISSING = 3
PRESENT = frozenset(
    """
    accelerate certifi charset-normalizer click execnet filelock fsspec hf-xet huggingface-hub idna iniconfig
    jinja2 markupsafe mpmath networkx ninja numpy nvidia packaging pillow pip pluggy psutil pybind11 pygments
    pytest pytest-xdist pyyaml regex requests safetensors setuptools sympy timm tokenizers torch torchvision
    tqdm transformers triton typing-extensions urllib3 wheel
    """.split()  # noqa: SIM905
)
"""Packages of the machine: torch 2.11 with CUDA 13.0, Python 3.12, transformers, accelerate and timm, with
their requirements, and what builds and tests need."""
IN_USE = (
    "benchmarks.gpu_check",
    *(f"benchmarks.gpu.{path.stem}" for path in sorted((ROOT / "benchmarks/gpu").glob("[a-z]*.py"))),
    "cat_fast.cli.main",
    "cat_fast.cli.info",
    "cat_fast.train",
    "cat_fast.training.loop",
    "cat_fast.training.tasks",
    "cat_fast.training.tokenizer.task",
    "cat_fast.training.generator.task",
    "cat_fast.inference",
    "deepspeed",
    "lpips",
    "pytest_timeout",
)
"""Modules of the check, and those that it imports when they are used."""


class Hidden(MetaPathFinder):
    """Finder that hides the modules of all packages that are not allowed."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self.owners = packages_distributions()
        self.allowed = {*allowed}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        top = name.partition(".")[0]
        owners = {canonical(owner) for owner in self.owners.get(top, ())}
        if owners and "cat-fast" not in owners and not owners & self.allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def owner_of(self, error: BaseException | None) -> str | None:
        """Return the hidden package whose absence is the first cause of an error, or None."""
        found = None
        while error is not None:
            if isinstance(error, ImportError):
                top = (error.name or "").partition(".")[0]
                owners = {canonical(owner) for owner in self.owners.get(top, ())}
                if owners and not owners & self.allowed:
                    found = min(owners)
            error = error.__cause__ or error.__context__
        return found


def canonical(name: str) -> str:
    """Return a package's name in the form of PyPI."""
    return name.lower().replace("_", "-").replace(".", "-")


def needed() -> list[str]:
    """Import the check with all but the present packages hidden; return the packages that it needs.

    Each attempt is a process of its own: a failed import leaves half-imported modules behind.

    Raises:
        ImportError: an import fails for another reason than a hidden package.
    """
    found: set[str] = set()
    while True:
        command = [sys.executable, "-m", "benchmarks.gpu.requirements", *sorted(found)]
        ran = subprocess.run([*command, "--try"], cwd=ROOT, capture_output=True, text=True, check=False)
        if ran.returncode == 0:
            return sorted(found)
        hidden = ran.stdout.split()
        if ran.returncode != MISSING or not hidden:
            raise ImportError(ran.stderr[-2000:])
        found |= _with_requirements(hidden[-1])


def attempt(found: Iterable[str]) -> int:
    """Import all modules of the check; print the first hidden package that is missing."""
    nvidia = (name for name in _all_names() if name.startswith(("nvidia-", "cuda-")))
    finder = Hidden({*PRESENT, *found, *nvidia})
    sys.meta_path.insert(0, finder)
    for module in IN_USE:
        try:
            importlib.import_module(module)
        except Exception as error:  # libraries wrap a failed import in errors of their own
            hidden = finder.owner_of(error)
            if hidden is None:
                raise
            print(hidden)
            return MISSING
    return 0


def _all_names() -> set[str]:
    return {canonical(owner) for owners in packages_distributions().values() for owner in owners}


def _with_requirements(name: str) -> set[str]:
    """Return a package and all that it requires, of those that are installed and not present."""
    found, waiting = set(), [name]
    while waiting:
        one = waiting.pop()
        if one in found or one in PRESENT or one.startswith(("nvidia-", "cuda-")):
            continue
        found.add(one)
        for text in distribution(one).requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonical(requirement.name))
    return found


def main(arguments: Sequence[str]) -> int:
    if "--try" in arguments:
        return attempt(name for name in arguments if name != "--try")
    for name in needed():
        print(f"{name}=={distribution(name).version}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
