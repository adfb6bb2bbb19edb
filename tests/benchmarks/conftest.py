"""One measurement of a benchmark's case, without the rates that only a benchmark needs."""

from collections.abc import Callable

import pytest

from benchmarks.shared import harness

ONCE = harness.Effort(min_pairs=1, max_pairs=1, seconds=0.0)


@pytest.fixture
def measure_once() -> Callable[[harness.Case], harness.Result]:
    """Measures a case in one pair of turns; the rate of a matrix product is taken as 1 GFLOP/s."""
    return lambda case: harness.measure(case, ONCE, rate_of=lambda dtype, clock: 1e9)
