"""Parent of a process group: ends the group if the process that started it dies.

    python -m cat_fast.processes.guard STARTER COMMAND …

`cat_fast.processes.group` starts it as the leader of a new session, so that signals of the terminal do not
reach the group. It exits with the exit code of the command.
"""

import os
import subprocess
import sys

from cat_fast.processes.ending import end_group

_POLL_SECONDS = 0.2


def main(starter: str, *command: str) -> int:
    """Run the command until it exits or process `starter` dies, then end what is left of the group."""
    child = subprocess.Popen(command)
    while os.getppid() == int(starter):
        try:
            child.wait(_POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            pass
    end_group(os.getpgrp())
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
