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
PRESENT = frozenset((Path(__file__).parent / "present_packages.txt").read_text().split())
"""Packages of the machine: torch 2.11 with CUDA 13.0, Python 3.12."""
NEWER_HERE = frozenset({"httpcore2", "httpx2", "truststore"})
"""Packages that only newer versions of the machine's packages require, such as huggingface-hub 2."""
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
    "webdataset",
)
"""Modules of the check, and those that it imports when they are used."""
MISSING = 3
"""Exit code of an attempt that lacks modules, whose names are its last line of output."""


def needed() -> list[str]:
    """Return the packages that the imports of the check need next to those of the machine.

    Raises:
        ImportError: an import fails for another reason than a missing package.
    """
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        environment = Environment(Path(folder))
        environment.add_present()
        return environment.complete()


class Environment:
    """A virtual environment in a folder, with links to some packages of this one."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin/python"
        self.packages = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)

    def add_present(self) -> None:
        """Link the packages of the machine that are installed here."""
        for package in distributions():
            if is_present(canonical(package.name)):
                self.add(package)

    def complete(self) -> list[str]:
        """Link packages that the imports of the check lack until all succeed; return their names."""
        owners, found = packages_distributions(), set[str]()
        while True:
            ran = self.run("-m", "benchmarks.gpu.requirements", "--try")
            if ran.returncode == 0:
                return sorted(found)
            modules = ran.stdout.splitlines()[-1].split() if ran.returncode == MISSING else []
            lacking = {min(map(canonical, owners.get(module.partition(".")[0], [""]))) for module in modules}
            if not lacking or "" in lacking or lacking <= found:
                raise ImportError(
                    f"the check does not import with {', '.join(sorted(found)) or 'the machine alone'}: "
                    f"{' '.join(modules) or 'exit code ' + str(ran.returncode)}: {ran.stderr[-2000:]}"
                )
            for name in lacking - found:
                self.add(distribution(name))
            found |= lacking

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


def is_present(name: str) -> bool:
    """Return True for a package of the machine, this one, and those that only newer versions require."""
    return name in PRESENT | NEWER_HERE or name.startswith(("cat-fast", "cuda-", "nvidia-"))


def attempt() -> int:
    """Import all modules of the check; print those whose absence is the first cause of a failure."""
    missing, other = set(), None
    for module in IN_USE:
        try:
            importlib.import_module(module)
        except Exception as error:  # libraries wrap a failed import in errors of their own
            name = _missing_module(error)
            if name is None:
                other = error  # a module that is half imported fails otherwise at its next import
            else:
                missing.add(name)
    if missing:
        print(*sorted(missing))
        return MISSING
    if other is not None:
        raise other
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
