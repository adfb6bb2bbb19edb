"""Long work of rank 0 while the other ranks wait, without a wait that looks like a hang."""

from collections.abc import Callable

from cat_fast.training.runtime.ranks import Ranks


def long_work_on_main(work: Callable[[], None], ranks: Ranks, progress: Callable[[], None]) -> None:
    """Run `work` on rank 0, and call `progress` on every rank for each `step_context.report_progress` in it.

    Each report is a collective: one wait for all of the work would exceed the timeouts of the watchdog and of
    the process group, however well it proceeds. Collective: every rank must call it.
    """
    if not ranks.is_main:
        while ranks.broadcast(None):
            progress()
        return

    def report() -> None:
        progress()
        ranks.broadcast(True)

    try:
        with ranks.step_context.progress_reported_to(report):
            work()
    finally:
        ranks.broadcast(False)
