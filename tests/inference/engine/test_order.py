"""Selection of the requests of a step: nothing blocks, nothing starves, and rows are filled."""

import random
from types import SimpleNamespace

import pytest

from cat_fast.inference.engine.forecast import Work, finish_seconds
from cat_fast.inference.engine.order import CostAware, FifoPacked, select


def waiting(number, rows, *, last_step=0, priority=0, remaining=1.0, arrived=0.0):
    return SimpleNamespace(
        number=number,
        rows=rows,
        last_step=last_step,
        priority=priority,
        remaining_seconds=remaining,
        arrived=arrived,
    )


def test_a_large_request_does_not_block_those_behind_it():
    requests = [waiting(0, 60), waiting(1, 50), waiting(2, 30), waiting(3, 10)]
    assert select(requests, FifoPacked(), 100, step=1, now=0) == [0, 2, 3]


def test_a_request_larger_than_the_budget_has_a_step_to_itself():
    requests = [waiting(0, 120), waiting(1, 60), waiting(2, 30)]
    assert select(requests, FifoPacked(), 100, step=1, now=0) == [0]
    assert select(requests[::-1], CostAware(), 100, step=1, now=0) == [2]
    requests[0].priority = -1
    assert select(requests, FifoPacked(), 100, step=1, now=0) == [1, 2]


def test_higher_priority_goes_first_but_starves_nobody():
    order = FifoPacked(patience=5)
    requests = [waiting(0, 60), waiting(1, 60, priority=2)]
    assert select(requests, order, 100, step=1, now=0) == [1]
    assert select(requests, order, 100, step=6, now=0)[0] == 0


def test_short_requests_go_first_until_a_long_one_has_waited():
    order = CostAware(ageing=0.5)
    requests = [waiting(0, 60, remaining=10, arrived=0.0), waiting(1, 60, remaining=1, arrived=9.0)]
    assert select(requests, order, 100, step=1, now=10) == [1]
    assert select(requests, order, 100, step=1, now=20) == [1]
    requests[1].arrived = 19.0
    assert select(requests, order, 100, step=1, now=20) == [0]


@pytest.mark.parametrize("order", [CostAware(patience=8), FifoPacked(patience=8), CostAware(patience=1)])
def test_no_request_waits_for_longer_than_the_bound(order):
    """Against an adversary: short requests of high priority keep arriving."""
    rng = random.Random(0)
    requests, longest, most, number = [], 0, 0, 0
    for step in range(1, 2000):
        while len(requests) < 12:
            short = rng.random() < 0.8
            requests.append(
                waiting(
                    number,
                    rng.choice([4, 8]) if short else 64,
                    last_step=step - 1,
                    priority=int(short),
                    remaining=0.1 if short else 100.0,
                    arrived=step,
                )
            )
            requests[-1].left = 2 if short else 30
            number += 1
        most = max(most, len(requests))
        chosen = [requests[i] for i in select(requests, order, 64, step, now=step)]
        assert sum(one.rows for one in chosen) <= 64
        for one in requests:
            longest = max(longest, step - one.last_step - (one in chosen))
        for one in chosen:
            one.last_step, one.left = step, one.left - 1
        requests = [one for one in requests if one.left]
    assert longest <= order.patience + most


def test_steps_are_filled_while_requests_that_fit_wait():
    rng = random.Random(1)
    for _ in range(200):
        requests = [waiting(i, rng.choice([16, 32, 64, 128, 256, 512])) for i in range(40)]
        chosen = select(requests, CostAware(), 1024, step=1, now=0)
        free = 1024 - sum(requests[i].rows for i in chosen)
        assert not any(one.rows <= free for i, one in enumerate(requests) if i not in chosen)
        if any(one.rows == 16 for i, one in enumerate(requests) if i not in chosen):
            assert free < 16


def test_the_forecast_equals_a_simulation_of_single_steps():
    rng = random.Random(2)
    for _ in range(100):
        works = [
            Work(rng.randint(1, 9), rng.choice([1, 2, 5, 8, 12]), rng.randint(1, 50), rng.random())
            for _ in range(6)
        ]
        elapsed, left = 0.0, [work.steps for work in works]
        free, finished = 0.0, {}
        while any(left):
            room, chosen = 10, []
            for i, work in enumerate(works):
                if left[i] and (not chosen or work.rows <= room):
                    chosen.append(i)
                    room, left[i] = room - work.rows, left[i] - 1
            elapsed += 0.1 + sum(works[i].flops for i in chosen)
            for i in chosen:
                if not left[i]:
                    free = finished[i] = max(free, elapsed) + works[i].decoding
        targets = rng.sample(range(6), 3)
        found = finish_seconds(works, targets, 10, lambda f: 0.1 + f)
        assert found == pytest.approx([finished[i] for i in targets])
