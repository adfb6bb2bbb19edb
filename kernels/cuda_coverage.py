"""GPUs that the compiled CUDA kernels run on.

A cubin of compute capability X.Y runs on GPUs X.Z with Z >= Y; PTX of X.Y is compiled by the driver for any
GPU from X.Y on; code of an architecture such as 9.0a runs on exactly that one. Without this check, the first
launch on another GPU would fail with "no kernel image is available", although Triton could serve it.
"""

import functools
import re

import torch

Capability = tuple[int, int]


def covers(architectures: str, capability: Capability) -> bool:
    """Return True if kernels built for `architectures`, as in TORCH_CUDA_ARCH_LIST, run on such a GPU."""
    return any(_covers(entry, capability) for entry in re.split(r"[;\s]+", architectures.strip()))


def _covers(entry: str, capability: Capability) -> bool:
    found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
    if found is None:
        return False
    built = (int(found[1]), int(found[2]))
    if found[3] == "a":
        return capability == built
    return (capability[0] == built[0] and capability >= built) or (bool(found[4]) and capability >= built)


def uncovered_reason(architectures: str, capability: Capability) -> str | None:
    """Return why kernels built for `architectures` cannot run on a GPU, or None."""
    if covers(architectures, capability):
        return None
    name = ".".join(map(str, capability))
    return f"built for {architectures}, not for this GPU's compute capability {name}"


@functools.cache
def capability_of(index: int) -> Capability:
    """Return the compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)
