"""Entry point of every training run, started by the DeepSpeed launcher:

    deepspeed --num_gpus 2 --module cat_fast.train configs/tokenizer/nano.yaml [key=value …]

The `task` key of the YAML file selects the model to train. Exit codes:

    0     the run is complete, or was stopped by SIGTERM, SIGHUP or SIGUSR1 and saved
    2     invalid input, or the output folder is not writable
    3     the run hung
    130   stopped by Ctrl-C and saved
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from cat_fast.console import safe_output
from cat_fast.errors import UserError
from cat_fast.training.config.load import load_run


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="cat_fast.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of the run, such as configs/tokenizer/nano.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides, such as schedule.total_steps=100"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        reason = train(given.config, given.overrides)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print("error:", error, file=sys.stderr, flush=True)
        elif not getattr(error, "shared", False):  # rank 0 prints a SharedError
            print(f"error (rank {rank}):", error, file=sys.stderr, flush=True)
        return 2
    return 130 if reason == "SIGINT" else 0


def train(path: str, overrides: list[str]) -> str:
    """Train from a YAML file, as the rank of this process.

    Returns:
        Empty at the end of the schedule, else the reason why the run was stopped before.

    Raises:
        UserError: the configuration or the data is invalid.
    """
    config = load_run(path, overrides)
    ranks_started = int(os.environ.get("WORLD_SIZE", "1"))
    if config.world_size not in (0, ranks_started):
        raise UserError(
            f"configuration {path}: expected {config.world_size} ranks (world_size), got {ranks_started}: "
            f"start {config.world_size} ranks, or set world_size=0 and adapt the batch size"
        )

    from cat_fast.data.folder_lock import require_unlocked
    from cat_fast.training.health.run_status import TRAINING

    if os.environ.get("RANK", "0") == "0":  # before this run takes the memory that the other one needs
        require_unlocked(Path(config.output_dir), TRAINING)

    from cat_fast.training import loop
    from cat_fast.training.health.preemption import resume_command
    from cat_fast.training.health.watchdog import collective_timeout
    from cat_fast.training.pretrained_weights import require_weights
    from cat_fast.training.runtime.collective_errors import SharedError
    from cat_fast.training.runtime.determinism import set_determinism
    from cat_fast.training.runtime.ranks import start, stop
    from cat_fast.training.tasks import make_task

    require_weights(config, shlex.join(["cat-fast", "fetch", path, *overrides]))
    command = resume_command([path, *overrides])
    if config.checkpoint.resume == "never":
        command += " checkpoint.resume=auto"
    set_determinism(config.deterministic)
    ranks = start(collective_timeout(config.watchdog))
    try:
        ended = loop.run(make_task(config, ranks), config, ranks, command)
    except SharedError:  # raised by all ranks, so all of them can leave the group
        stop()
        raise
    stop()
    return ended.reason if ended else ""


if __name__ == "__main__":
    sys.exit(main())
