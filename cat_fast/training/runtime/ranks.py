"""This process's rank and its collectives.

DeepSpeed is imported only after `DS_ACCELERATOR` is set: it picks its accelerator at import.
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

from cat_fast.hardware import run_device_type
from cat_fast.processes.malloc import keep_freed_memory
from cat_fast.training.runtime.step_context import StepContext


@dataclass(frozen=True)
class Ranks:
    """This process's rank among all of a run; a single rank if started without a launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    step_context: StepContext = field(default_factory=StepContext, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if run_device_type() == "cuda" else torch.device("cpu")

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, any picklable object, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, any picklable objects, in rank order on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place; return it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values


def start(timeout: timedelta = timedelta(minutes=30)) -> Ranks:
    """Join the process group and set the number of threads; call once, before anything that uses DeepSpeed.

    Args:
        timeout: longest time that ranks wait for each other in a collective.

    Raises:
        UserError: DS_ACCELERATOR selects a device that is not available.
    """
    on_cpu = run_device_type() == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _share_cores()
        keep_freed_memory()
    elif not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        # Batches differ in size: segments that grow leave no gaps. Read at the first allocation.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed uses deprecated names of torch's collectives, and torch warns at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    if on_cpu:
        # DeepSpeed would compile a shared-memory backend at first use (a minute, and a lock that outlives a
        # killed process); gloo is fast enough for a few CPU ranks.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", free_port())
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", timeout=timeout, verbose=False)
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
    )
    if not on_cpu:
        torch.cuda.set_device(ranks.device)
    return ranks


def _share_cores() -> None:
    """Divide this machine's cores among its ranks, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_SIZE", "1"))  # set by the launcher
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def free_port() -> str:
    """Return a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def stop() -> None:
    """Leave the process group; call once no engine is in use any more."""
    # Engines hold reference cycles. One under ZeRO-3 that was freed at interpreter exit, after its process
    # group, has been seen to abort the process.
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
