"""Entry point of every training run, started by the DeepSpeed launcher:

    deepspeed --num_gpus 2 --module cat_fast.train configs/tokenizer/nano.yaml [key=value …]

The `task` key of the YAML file says what is trained. Ends with 0 when the run is complete, or was told to end
by SIGTERM or SIGUSR1 and saved; with 130 after Ctrl-C, saved as well; with 2 on input that cannot be used and
where nothing can be written; with 3 if the run hung.
"""

import argparse
import os
import shlex
import sys

from cat_fast.errors import UserError
from cat_fast.training.config.load import load_run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="cat_fast.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of the run, such as configs/tokenizer/nano.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as schedule.total_steps=100")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        reason = train(given.config, given.overrides)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print("error:", error, file=sys.stderr, flush=True)
        elif not getattr(error, "shared", False):  # as a SharedError is: rank 0 tells it
            print(f"error (rank {rank}):", error, file=sys.stderr, flush=True)
        return 2
    return 130 if reason == "SIGINT" else 0


def train(path: str, overrides: list[str]) -> str:
    """Run the training that a YAML file describes, as this process's rank.

    Returns:
        Empty at the end of the schedule, else what asked the run to end before.

    Raises:
        UserError: the configuration or the data cannot be used.
    """
    config = load_run(path, overrides)
    ranks_started = int(os.environ.get("WORLD_SIZE", "1"))
    if config.world_size not in (0, ranks_started):
        raise UserError(
            f"configuration {path}: it is made for {config.world_size} ranks, and there are {ranks_started}: "
            "start as many, or set world_size=0 and adapt the batch"
        )

    from cat_fast.training import loop
    from cat_fast.training.health.preemption import resume_command
    from cat_fast.training.health.watchdog import patience_of
    from cat_fast.training.pretrained_weights import require_weights
    from cat_fast.training.runtime.collective_errors import SharedError
    from cat_fast.training.runtime.ranks import start, stop
    from cat_fast.training.tasks import make_task

    require_weights(config, shlex.join(["cat-fast", "fetch", path, *overrides]))
    command = resume_command([path, *overrides])
    if config.checkpoint.resume == "never":
        command += " checkpoint.resume=auto"
    ranks = start(patience_of(config.watchdog))
    try:
        ended = loop.run(make_task(config, ranks), config, ranks, command)
    except SharedError:  # which all ranks raise
        stop()
        raise
    stop()
    return ended.reason if ended else ""


if __name__ == "__main__":
    sys.exit(main())
