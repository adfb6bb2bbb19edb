"""Install the package, and what the machine lacks from a folder of wheels, without network."""

import gzip
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.body import Context

ROOT = Path(__file__).parents[2]


def install(context: Context) -> None:
    """Install wheels, libraries and the package; print `cat-fast info`."""
    started = time.monotonic()
    if not context.dry:
        wheels = sorted(context.wheels.glob("*.whl")) if context.wheels else []
        if wheels:
            pip("--no-deps", *map(str, wheels))
        if context.wheels:
            install_libraries(context.wheels, ROOT / "cat_fast")
        pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT), CAT_FAST_BUILD="0")
    info = "from cat_fast.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", info, "info"], cwd=ROOT, check=True)
    context.record.figure("seconds", time.monotonic() - started, "s")


def install_libraries(folder: Path, package: Path) -> None:
    """Uncompress the libraries of a folder that `scripts/collect_gpu_wheels.sh` filled into the package."""
    for packed in sorted(folder.glob("*.so.gz")):
        part = package / f"{packed.stem}.part"
        with gzip.open(packed) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
        part.replace(package / packed.stem)  # a process that has loaded the old file keeps it


def pip(*arguments: str, **environment: str) -> None:
    """Run `pip install` offline."""
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], cwd=ROOT, env={**os.environ, **environment}, check=True)
