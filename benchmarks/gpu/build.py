"""Build the extensions next to other blocks, and load both the built and the prebuilt libraries."""

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.body import Context

ROOT = Path(__file__).parents[2]
LOAD = """
import sys, torch
for path in sys.argv[1:]:
    torch.ops.load_library(path)
print(torch.ops.cat_fast.cuda_architectures() if hasattr(torch.ops.cat_fast, "cuda_architectures") else "cpu")
"""


def build(context: Context) -> None:
    """Record whether the prebuilt libraries load, and the seconds of a build with this machine's compiler.

    The package's own libraries, which other blocks have loaded, stay as they are.
    """
    prebuilt = {name: ROOT / f"cat_fast/{name}.abi3.so" for name in ("_ops", "_ops_cuda")}
    needed: list[Path] = []
    for name, path in prebuilt.items():
        needed.append(path)
        figure = f"prebuilt{name}"
        if not path.exists():
            context.record.skipped(figure, f"{path.name} is not there")
        elif (error := _load_error(needed)) is not None:
            context.record.skipped(figure, f"it does not load: {error}")
        else:
            context.record.figure(figure, 1.0, "loads")
    started = time.monotonic()
    target = context.work / "built"
    command = [sys.executable, "setup.py"]
    command += ["--version"] if context.dry else ["build_ext", "--build-lib", str(target)]
    environment = {**os.environ, "CAT_FAST_CUDA": "auto" if context.dry else "1", "MAX_JOBS": "6"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    context.record.figure("seconds", time.monotonic() - started, "s")
    if context.dry:
        context.record.skipped("loads", "a dry run does not compile")
        return
    built = [target / "cat_fast" / path.name for path in prebuilt.values()]
    error = _load_error(built)
    if error is not None:
        raise RuntimeError(f"the built libraries do not load: {error}")
    context.record.figure("loads", 1.0, "loads")


def _load_error(paths: list[Path]) -> str | None:
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, paths)], capture_output=True, text=True, check=False
    )
    return None if ran.returncode == 0 else (ran.stderr.strip().splitlines() or ["no message"])[-1][:300]
