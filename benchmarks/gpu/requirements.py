"""Packages that the GPU check needs next to those of its machine, derived from its imports.

    python -m benchmarks.gpu.requirements

prints one `name==version` per line. The check's modules are imported in an environment that links only the
packages of that machine; a package whose absence fails an import is added until all imports succeed.
"""

import importlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.metadata import Distribution, distribution, distributions, packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
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


MISSING = 3
"""Exit code of an attempt that lacks a module, which is its last line of output."""


def needed() -> list[str]:
    """Return the packages that the imports of the check need next to those of the machine.

    Raises:
        ImportError: an import fails for another reason than a missing package.
    """
    owners = packages_distributions()
    found: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        environment = Environment(Path(folder))
        for one in distributions():
            if (name := canonical(one.name)) in PRESENT or name.startswith(("nvidia-", "cuda-", "cat-fast")):
                environment.add(one)
        while True:
            ran = environment.run("-m", "benchmarks.gpu.requirements", "--try")
            if ran.returncode == 0:
                return sorted(found)
            module = ran.stdout.split()[-1] if ran.returncode == MISSING else ""
            owner = min(map(canonical, owners.get(module.partition(".")[0], ())), default=None)
            if owner is None or owner in found:
                raise ImportError(
                    f"the check does not import with {', '.join(sorted(found))}: {ran.stderr[-2000:]}"
                )
            found.add(owner)
            environment.add(distribution(owner))


class Environment:
    """A virtual environment in a folder, with links to some packages of this one."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin/python"
        self.packages = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)

    def add(self, package: Distribution) -> None:
        """Link the modules and the metadata of a package."""
        root = Path(str(package.locate_file("")))
        paths = {str(file).split("/", 2)[0]: str(file) for file in package.files or ()}
        for name in paths.keys() - {"..", "__pycache__"}:
            if (root / name).is_dir() and not (
                name.endswith(".dist-info") or (root / name / "__init__.py").exists()
            ):  # a namespace that packages share
                children = {str(file).split("/")[1] for file in package.files or () if file.parts[0] == name}
                links = [f"{name}/{child}" for child in children]
            else:
                links = [name]
            for link in links:
                target = self.packages / link
                if (root / link).exists() and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to(root / link)

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run its Python in the repository."""
        environment = {**os.environ, "VIRTUAL_ENV": "", "PYTHONNOUSERSITE": "1"}
        command = [str(self.python), *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def canonical(name: str) -> str:
    """Return a package's name in the form of PyPI."""
    return name.lower().replace("_", "-").replace(".", "-")


def attempt() -> int:
    """Import all modules of the check; print the module whose absence is the first cause of a failure."""
    for module in IN_USE:
        try:
            importlib.import_module(module)
        except Exception as error:  # libraries wrap a failed import in errors of their own
            missing = _missing_module(error)
            if missing is None:
                raise
            print(missing)
            return MISSING
    return 0


def _missing_module(error: BaseException | None) -> str | None:
    found = None
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            found = error.name
        error = error.__cause__ or error.__context__
    return found


def main(arguments: Sequence[str]) -> int:
    if "--try" in arguments:
        return attempt()
    for name in needed():
        print(f"{name}=={distribution(name).version}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
