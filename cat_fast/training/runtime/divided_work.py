"""Work on many items before training, divided among the ranks."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from cat_fast.errors import UserError
from cat_fast.training.runtime.collective_errors import on_each, raise_together
from cat_fast.training.runtime.ranks import Ranks

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_over_ranks(
    action: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], ranks: Ranks, per_rank: int
) -> Iterator[list[Result]]:
    """Yield the results of items on every rank, in order, in parts that the ranks compute together.

    Collective: every rank must exhaust it. Ranks wait for each other after every part only, so `per_rank`
    items must take less time than the timeout of collectives. A `UserError` on any rank is raised by all, as
    a `SharedError`.

    Args:
        action: returns one result per item; called once per part with the rank's share, which may be empty.
        items: the same ones on every rank.
        per_rank: maximum number of items of a rank in a part.

    Raises:
        SharedError: a rank has another number of items.
    """
    world, count = ranks.world_size, ranks.broadcast(len(items))
    different = UserError(f"got {len(items)} images, rank 0 {count}: all ranks must see the same files")
    raise_together(None if count == len(items) else different, ranks)
    for start in range(0, count, per_rank * world):
        part = items[start : start + per_rank * world]
        shares = ranks.gather(on_each(partial(action, part[ranks.rank :: world]), ranks))
        yield [shares[i % world][i // world] for i in range(len(part))]
