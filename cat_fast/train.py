"""Entry point of every training run, started by the DeepSpeed launcher:

    deepspeed --num_gpus 2 --module cat_fast.train configs/tokenizer/nano.yaml [key=value …]

The `task` key of the YAML file says what is trained. Ends with 0 when the run is complete and with 2 on
input that cannot be used.
"""

import argparse
import os
import sys

from cat_fast.config import fill, read_yaml
from cat_fast.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="cat_fast.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of the run, such as configs/tokenizer/nano.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as schedule.total_steps=100")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        train(given.config, given.overrides)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print("error:" if rank == "0" else f"error (rank {rank}):", error, file=sys.stderr, flush=True)
        return 2
    return 0


def train(path: str, overrides: list[str]) -> None:
    """Run the training that a YAML file describes, as this process's rank.

    Raises:
        UserError: the configuration or the data cannot be used.
    """
    values = read_yaml(path)
    from cat_fast.training.settings import RUNS

    kind = values.get("task")
    if kind not in RUNS:
        raise UserError(f"configuration {path}: task {kind!r} is not one of {', '.join(RUNS)}")
    config = fill(RUNS[kind], values, overrides, source=f"configuration {path}")

    ranks_started = int(os.environ.get("WORLD_SIZE", "1"))
    if config.world_size not in (0, ranks_started):
        raise UserError(
            f"configuration {path}: it is made for {config.world_size} ranks, and there are {ranks_started}: "
            "start as many, or set world_size=0 and adapt the batch"
        )

    from cat_fast.training import distributed, loop
    from cat_fast.training.tasks import make_task

    ranks = distributed.start()
    loop.run(make_task(config, ranks), config, ranks)
    distributed.stop()


if __name__ == "__main__":
    sys.exit(main())
