"""Which processes are waited for, and which are killed."""

import subprocess
import sys

from cat_fast.processes import ending

RANK = """
import signal, sys, time
done = []
signal.signal(signal.SIGUSR1, lambda *_: done.append(True))
print("ready", flush=True)
while not done:
    time.sleep(0.01)
signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # as Python does before it exits
time.sleep(1.5)
sys.exit(7)
"""


def test_a_process_that_has_saved_may_take_its_time_to_exit(monkeypatch):
    monkeypatch.setattr(ending, "_EXIT_SECONDS", 0.2)
    rank = subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "ready\n"
    ending.end_processes(lambda: ending.still_running([rank.pid]))
    assert rank.wait() == 7
    rank.stdout.close()
