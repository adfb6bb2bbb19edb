"""Settings of the allocator, in processes of their own."""

import subprocess
import sys

import pytest

THREADS = """
import ctypes, sys, threading
from cat_fast.processes.malloc import share_arenas

assert sys.argv[1] == "own" or share_arenas()
allocated, end = threading.Barrier(9), threading.Event()

def work():
    kept = bytes(10_000)
    allocated.wait()
    end.wait()

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
allocated.wait()
ctypes.CDLL(None).malloc_stats()
end.set()
"""


@pytest.mark.parametrize(("arenas", "expected"), [("shared", {2}), ("own", set(range(3, 10)))])
def test_threads_share_two_arenas(arenas, expected):
    done = subprocess.run([sys.executable, "-c", THREADS, arenas], capture_output=True, text=True, check=True)
    assert done.stderr.count("Arena ") in expected
