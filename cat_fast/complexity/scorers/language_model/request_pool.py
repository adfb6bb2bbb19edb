"""Concurrent requests to one server."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cat_fast.complexity.scorers.language_model.json_client import RequestFailed
from cat_fast.errors import UserError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_CONCERN_ALL = (401, 403, 404)
"""HTTP statuses that a wrong key, URL or model causes."""
_FIRST_FAILURES = 3
"""Server errors before the first answer after which the server counts as unusable."""


class RequestPool:
    """Runs tasks that send requests, several at a time.

    Up to the first answer they run one by one, so that an unusable server is reported at once.

    Raises:
        UserError: the number of concurrent requests is not positive.
    """

    def __init__(self, concurrency: int) -> None:
        if concurrency < 1:
            raise UserError(f"the number of concurrent requests must be at least 1, got {concurrency}")
        self._concurrency = concurrency
        self._failures = 0
        self.answered = False
        """True once the server has answered; to be set by tasks that send several requests."""

    def run(self, task: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result | UserError]:
        """Return the result of the task for each item, in order, or the UserError that it raised.

        Raises:
            RequestFailed: no request was answered so far, and this one failed for a reason that concerns all.
        """
        results: list[_Result | UserError] = []
        while len(results) < len(items) and not self.answered:
            results.append(self._attempt(task, items[len(results)]))
        rest = items[len(results) :]
        if self._concurrency == 1 or len(rest) < 2:
            return results + [self._attempt(task, item) for item in rest]
        pool = ThreadPoolExecutor(min(self._concurrency, len(rest)))
        try:
            return results + list(pool.map(lambda item: self._attempt(task, item), rest))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _attempt(self, task: Callable[[_Item], _Result], item: _Item) -> _Result | UserError:
        try:
            result = task(item)
        except RequestFailed as failure:
            if not self.answered and self._unusable(failure):
                raise
            return failure
        except UserError as error:
            return error
        self.answered = True
        return result

    def _unusable(self, failure: RequestFailed) -> bool:
        """Return whether a failure before the first answer concerns all requests."""
        self._failures += failure.transient
        if failure.status is None or failure.status in _CONCERN_ALL:
            return True
        return self._failures == _FIRST_FAILURES
