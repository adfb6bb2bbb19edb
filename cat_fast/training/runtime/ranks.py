"""Ranks: who we are among the processes the DeepSpeed launcher started, and how we talk.

DeepSpeed is imported here only after its accelerator is settled: on a machine without a GPU it is told so.
"""

import gc
import logging
import os
import socket
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from cat_fast.training.runtime.host_memory import keep_freed_memory
from cat_fast.training.runtime.step_context import Work


@dataclass(frozen=True)
class Ranks:
    """This process's place; a run without a launcher is one rank."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    work: Work = field(default_factory=Work, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank; any picklable object."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on every rank; any picklable object."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values


def start(patience: timedelta = timedelta(minutes=30)) -> Ranks:
    """Join the process group and settle threads; call once, before anything that uses DeepSpeed.

    Args:
        patience: how long ranks wait for each other in a collective before they give up.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _share_cores()
        keep_freed_memory()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls torch's collectives by their older names, and torch says so at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    if on_cpu:
        # DeepSpeed would compile a shared-memory backend at first use (a minute, and a lock that outlives a
        # kill); gloo alone carries what two CPU ranks exchange.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", free_port())
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", timeout=patience, verbose=False)
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
    )
    if not on_cpu:
        torch.cuda.set_device(ranks.device)
    return ranks


def _share_cores() -> None:
    """Ranks of one machine share its cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_SIZE", "1"))  # set by the launcher
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def free_port() -> str:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def stop() -> None:
    """Leave the process group, once nothing of an engine is in use any more."""
    # Engines refer to themselves in circles: freed only as the interpreter ends, after the group they use,
    # one under ZeRO-3 has been seen to abort the process.
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
