"""Number of kernels that Triton compiles or loads from its cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton


@contextmanager
def count_compilations() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of kernels that Triton has compiled or loaded since."""
    found = 0
    before = triton.knobs.runtime.jit_post_compile_hook

    def count(*arguments: Any, **keywords: Any) -> Any:
        nonlocal found
        found += 1
        return before(*arguments, **keywords) if before is not None else None

    triton.knobs.runtime.jit_post_compile_hook = count
    try:
        yield lambda: found
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
