"""Long work of rank 0: its progress reaches the ranks that wait for it."""

import pytest

from cat_fast.training.runtime.long_work import long_work_on_main
from cat_fast.training.runtime.ranks import Ranks
from tests.training.thread_ranks import on_thread_ranks


@pytest.mark.parametrize("world_size", [1, 3])
def test_progress_of_the_work_reaches_every_rank(world_size):
    def on_rank(ranks: Ranks) -> list[str]:
        calls: list[str] = []

        def work() -> None:
            for batch in range(3):
                calls.append(f"batch {batch}")
                ranks.step_context.report_progress()

        long_work_on_main(work, ranks, lambda: calls.append("progress"))
        ranks.step_context.report_progress()  # the work has ended
        return calls

    main, *others = on_thread_ranks(world_size, on_rank)
    assert main == ["batch 0", "progress", "batch 1", "progress", "batch 2", "progress"]
    assert others == [["progress"] * 3] * (world_size - 1)


def test_an_error_of_the_work_ends_the_wait_of_the_others():
    def on_rank(ranks: Ranks) -> str:
        def fail() -> None:
            raise RuntimeError("no kernel image")

        try:
            long_work_on_main(fail, ranks, lambda: None)
        except RuntimeError as error:
            return str(error)
        return "ended"

    assert on_thread_ranks(2, on_rank) == ["no kernel image", "ended"]
