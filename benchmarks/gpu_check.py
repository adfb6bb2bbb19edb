"""One command that tests and measures everything on a GPU, within eight minutes.

    python3 -m benchmarks.gpu_check --out DIR [--only BLOCK,…] [--seconds 480] [--dry] [--wheels DIR]

Each block is a process of its own with its own limit (`benchmarks/gpu/blocks.py`). Figures are appended to
results.jsonl as they are measured, so a block that fails or hangs loses only what it had not reached. At the
end, DIR holds

    results.jsonl     every figure, as it was measured
    gpu_check.json    figures by block, and the states of blocks with their reasons
    gpu_check.txt     the same as a table
    logs.zip          output of every block, and the profiler's trace

--only runs some blocks again and keeps the results of the others. --dry runs every block at toy sizes on the
CPU: its figures are marked and are not measurements. The check uses the python3 that it is started with, and
no network; --wheels names a folder of scripts/collect_gpu_wheels.sh to install from. Exit codes: 0 all blocks
passed or were skipped, 1 a block failed or was not reached, 2 invalid usage.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.blocks import BLOCKS, Block
from benchmarks.gpu.record import (
    FAILED,
    NOT_REACHED,
    PASSED,
    RESULTS,
    SKIPPED,
    TIMEOUT,
    Recorder,
    gather,
    read_entries,
)

ROOT = Path(__file__).parents[1]
SKIP_CODE = 77
"""Exit code of a block that cannot run here; its last line of output is the reason."""
MAX_FILE_BYTES = 16 * 2**20
_FINISH_SECONDS = 8.0
_LEAST_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(block.name for block in BLOCKS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", help=f"comma-separated blocks to run: {names}")
    parser.add_argument("--seconds", type=float, default=480.0, help="limit of the complete check (480)")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU; nothing is a measurement")
    parser.add_argument("--wheels", type=Path, help="folder of wheels and libraries to install from")
    given = parser.parse_args(arguments)
    only = None if given.only is None else given.only.split(",")
    if only and (unknown := set(only) - {block.name for block in BLOCKS}):
        parser.error(f"--only: unknown block {min(unknown)}: expected some of {names}")
    if given.seconds <= _FINISH_SECONDS:
        parser.error(f"--seconds: expected more than {_FINISH_SECONDS:g}, got {given.seconds:g}")
    if given.wheels is not None and not given.wheels.is_dir():
        parser.error(f"--wheels {given.wheels}: no such folder; make it with scripts/collect_gpu_wheels.sh")
    given.out.mkdir(parents=True, exist_ok=True)
    before = read_entries(given.out / RESULTS)
    if any(entry["dry"] != given.dry for entry in before):
        parser.error(f"--out {given.out}: it holds results of a {'real' if given.dry else 'dry'} run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the files are written on the way out
    check = Check(out=given.out, dry=given.dry, seconds=given.seconds, wheels=given.wheels)
    return check.run([block for block in BLOCKS if only is None or block.name in only])


@dataclass
class Running:
    """A block's process."""

    block: Block
    process: subprocess.Popen
    started: float
    deadline: float


@dataclass
class Check:
    """One run of some blocks."""

    out: Path
    dry: bool
    seconds: float
    wheels: Path | None = None
    blocks: Sequence[Block] = BLOCKS
    """All blocks of the JSON, also those that do not run."""
    started: float = field(default_factory=time.monotonic)
    running: list[Running] = field(default_factory=list)
    """Blocks whose processes have not ended."""

    def run(self, chosen: Sequence[Block]) -> int:
        """Run blocks and write all files; return the exit code."""
        with tempfile.TemporaryDirectory(prefix="gpu_check_") as work:
            self.work = Path(work)
            try:
                for block in chosen:
                    self._run_block(block)
                self._wait_for_background()
            finally:
                while self.running:  # after SIGTERM or Ctrl-C
                    self._end(self.running[0], FAILED, "the check was interrupted")
                self._write()
        return self._report(chosen)

    @property
    def left(self) -> float:
        """Seconds until the check has to write its files."""
        return self.seconds - _FINISH_SECONDS - (time.monotonic() - self.started)

    def _run_block(self, block: Block) -> None:
        if block.alone:
            self._wait_for_background()
        if self.left < _LEAST_SECONDS:
            self._recorder(block).state(NOT_REACHED, 0.0, "no time was left")
            return
        print(f"{block.name} …", flush=True)
        running = self._start(block)
        self.running.append(running)
        if not block.background:
            self._finish(running)
            self._collect_finished()

    def _start(self, block: Block) -> Running:
        limit = min(block.dry_seconds if self.dry else block.seconds, self.left)
        log = (self.work / f"{block.name}.log").open("ab")
        with log:
            process = subprocess.Popen(
                self.command(block),
                cwd=ROOT,
                env=self._environment(limit),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        now = time.monotonic()
        return Running(block, process, now, now + limit)

    def command(self, block: Block) -> list[str]:
        """Return the command line of a block's process."""
        return [
            *(sys.executable, "-m", "benchmarks.gpu.body", block.name),
            *("--out", str(self.out.resolve()), "--work", str(self.work)),
            *(["--dry"] if self.dry else []),
            *(["--wheels", str(self.wheels.resolve())] if self.wheels else []),
        ]

    def _environment(self, limit: float) -> dict[str, str]:
        environment = {**os.environ, "GPU_CHECK_SECONDS": f"{limit:.1f}", "PYTHONUNBUFFERED": "1"}
        if self.dry:
            environment |= {
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
                "TRITON_INTERPRET": "1",
            }
        return environment

    def _finish(self, running: Running) -> None:
        """Wait for a block's end or limit, and record its state."""
        reason = None
        try:
            code = running.process.wait(max(0.0, running.deadline - time.monotonic()))
            state = {0: PASSED, SKIP_CODE: SKIPPED}.get(code, FAILED)
            if state != PASSED:
                reason = self._last_line(running.block) or f"exit code {code}"
        except subprocess.TimeoutExpired:
            state, reason = TIMEOUT, f"it took longer than {running.deadline - running.started:.0f} s"
        self._end(running, state, reason)

    def _collect_finished(self) -> None:
        for running in [each for each in self.running if each.process.poll() is not None]:
            self._finish(running)

    def _wait_for_background(self) -> None:
        while self.running:
            self._finish(self.running[0])

    def _end(self, running: Running, state: str, reason: str | None) -> None:
        """End a block's process and all that it has started; record its state."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
        self.running.remove(running)
        seconds = time.monotonic() - running.started
        self._recorder(running.block).state(state, seconds, reason)
        print(
            f"{running.block.name}: {state} in {seconds:.1f} s" + (f": {reason}" if reason else ""),
            flush=True,
        )

    def _last_line(self, block: Block) -> str | None:
        text = (self.work / f"{block.name}.log").read_text(errors="replace").splitlines()
        return next((line.strip()[:300] for line in reversed(text) if line.strip()), None)

    def _recorder(self, block: Block) -> Recorder:
        return Recorder(self.out / RESULTS, block.name, self.dry)

    def content(self) -> dict[str, Any]:
        """Return the content of gpu_check.json."""
        expected = {block.name: tuple(block.figures) for block in self.blocks}
        blocks, machine = gather(read_entries(self.out / RESULTS), expected), _machine()
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        return {
            "dry": self.dry,
            "about": {"benchmark": "gpu_check", "date": date, "gpus": [machine.get("gpu")]},
            "date": date,
            "machine": machine,
            "seconds": round(time.monotonic() - self.started, 1),
            "blocks": blocks,
            "cases": timed_cases(blocks),
        }

    def _write(self) -> None:
        content = self.content()
        (self.out / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.out / "gpu_check.txt").write_text("\n".join(table(content)) + "\n")
        archive = self.out / "logs.zip"
        files = sorted(path for path in self.work.iterdir() if path.is_file())
        for kept in (files, [path for path in files if path.suffix == ".log"]):  # the trace may be too large
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
                for path in kept:
                    zipped.write(path, path.name)
            if archive.stat().st_size < MAX_FILE_BYTES:
                break

    def _report(self, chosen: Sequence[Block]) -> int:
        content = self.content()
        print(*table(content), sep="\n", flush=True)
        states = {block.name: content["blocks"][block.name]["state"] for block in chosen}
        bad = [name for name, state in states.items() if state not in (PASSED, SKIPPED)]
        if bad:
            dry = " --dry" if self.dry else ""
            print(f"run again: python3 -m benchmarks.gpu_check --out {self.out} --only {','.join(bad)}{dry}")
        return 1 if bad else 0


def timed_cases(blocks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures in milliseconds in the form of other benchmarks, for `benchmarks.compare`."""
    return {
        f"{block}.{name.removesuffix('.milliseconds')}": {
            "seconds": {
                "ours": {
                    quantile: found.get(quantile, found["value"]) / 1e3
                    for quantile in ("low", "median", "high")
                }
            }
        }
        for block, content in blocks.items()
        for name, found in content["figures"].items()
        if name.endswith(".milliseconds") and found["value"] is not None
    }


def table(content: dict[str, Any]) -> list[str]:
    """Return one line per block and figure."""
    title = (
        "DRY RUN: no figure is a measurement" if content["dry"] else content["machine"].get("gpu", "no GPU")
    )
    lines = [f"{title}; {content['date']}; {content['seconds']} s"]
    for name, block in content["blocks"].items():
        reason = f": {block['reason']}" if block["reason"] else ""
        lines.append(f"{name}: {block['state']} in {block['seconds']} s{reason}")
        for figure, found in block["figures"].items():
            if found["value"] is None:
                lines.append(f"  {figure:52} missing: {found.get('reason')}")
            else:
                backend = f"  ({found['backend']})" if "backend" in found else ""
                lines.append(f"  {figure:52} {found['value']:.6g} {found.get('unit', '')}{backend}")
    return lines


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "processor": platform.machine()}
    query = shutil.which("nvidia-smi")
    if query:
        options = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        ran = subprocess.run([query, *options], capture_output=True, text=True, check=False)
        if ran.returncode == 0 and ran.stdout.strip():
            name, driver, memory = (part.strip() for part in ran.stdout.splitlines()[0].split(","))
            found |= {"gpu": name, "driver": driver, "memory": memory}
    return found


if __name__ == "__main__":
    sys.exit(main())
