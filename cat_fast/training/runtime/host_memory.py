"""The memory of a training on the CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3), from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let what freed tensors held stay with the process, as CUDA's caching allocator keeps it on a GPU.

    glibc gives blocks over 32 MiB back to the system when they are freed, and every step then pays again for
    a fault on each of their pages: a fifth of a step of a DiT-B/2 block on 16,384 tokens. The process is left
    as large as it was at most.

    Returns:
        Whether it is so from now on; not without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl, for one, does not have it
    return mallopt is not None and all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])
