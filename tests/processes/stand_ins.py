"""Stand-ins for a command, DeepSpeed's launcher and its ranks, which import neither torch nor DeepSpeed.

    python -m tests.processes.stand_ins command FOLDER PHASE SECONDS

starts a launcher in a process group, and the launcher two ranks. A rank creates FOLDER/PHASE-N when it is in
the phase in which the test signals it, and FOLDER/saved-N when it has saved, which takes SECONDS.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

MODULE = "tests.processes.stand_ins"
STARTING, STEP, CHECKPOINT = "starting", "step", "checkpoint"
PHASES = (STARTING, STEP, CHECKPOINT)


def command(folder: str, phase: str, seconds: str) -> int:
    from cat_fast.processes.group import running
    from cat_fast.processes.signals import run_command

    def main() -> int:
        with running([sys.executable, "-m", MODULE, "launcher", folder, phase, seconds]) as process:
            return process.wait()

    return run_command(main)


def launcher(folder: str, phase: str, seconds: str) -> int:
    """Start two ranks; like DeepSpeed's, it handles SIGTERM by killing its ranks."""
    ranks = [
        subprocess.Popen([sys.executable, "-m", MODULE, "rank", folder, phase, seconds, str(number)])
        for number in range(2)
    ]

    def kill(number: int, frame: object) -> None:
        for rank in ranks:
            rank.kill()
        sys.exit(1)

    signal.signal(signal.SIGTERM, kill)
    return max(rank.wait() for rank in ranks)


def rank(folder: str, phase: str, seconds: str, number: str) -> int:
    stop = []

    def enter(name: str) -> None:
        (Path(folder) / f"{name}-{number}").touch()

    if phase == STARTING:
        enter(STARTING)
        time.sleep(600)
    signal.signal(signal.SIGUSR1, lambda *_: stop.append(True))
    enter(phase)
    if phase == CHECKPOINT:
        time.sleep(float(seconds))
    while not stop:
        time.sleep(0.02)
    if phase == STEP:
        deadline = time.monotonic() + float(seconds)
        while time.monotonic() < deadline:
            time.sleep(0.02)
    enter("saved")
    return 0


if __name__ == "__main__":
    sys.exit({"command": command, "launcher": launcher, "rank": rank}[sys.argv[1]](*sys.argv[2:]))
