"""TokenBudgetPacker: full batches of equal cost, lossless, without starvation, and deterministic."""

import json
import random
import re
import statistics
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shared import mixes
from cat_fast.errors import UserError
from cat_fast.packing import TokenBudgetPacker, packer
from cat_fast.packing.reference_packer import ReferenceBestFitPacker

native_only = pytest.mark.skipif(not packer.NATIVE, reason="cat_fast._bindings is not built")
CORES = [
    pytest.param(ReferenceBestFitPacker, id="reference"),
    pytest.param(packer.BestFitPacker, id="native", marks=native_only),
]
MIXES = {**mixes.MIXES, "uniform": mixes.UNIFORM}
"""Lengths and their shares: the paper's mixes, and a uniform one."""


@pytest.fixture(params=CORES)
def core(request, monkeypatch):
    monkeypatch.setattr(packer, "BestFitPacker", request.param)


def stream(lengths):
    return ((f"item-{i}", length) for i, length in enumerate(lengths))


def mixed_lengths(mix: Mapping[int, float], count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(list(mix), list(mix.values()), k=count)


def steps_of(budget, items):
    """Yield the steps of a packer over (item, length), flushing at the end."""
    for item, length in items:
        budget.add(item, length)
        while (batches := budget.next()) is not None:
            yield batches
    while (batches := budget.next(flush=True)) is not None:
        yield batches


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_every_item_is_packed_once_within_the_budget(core, seed, ranks):
    rng = random.Random(seed)
    by_item = dict(stream([rng.randint(1, 100) for _ in range(300)]))
    budget = TokenBudgetPacker(100, max_sequences=7, window=32, ranks=ranks)
    batches = list(budget.pack(by_item.items()))
    for batch in batches:
        assert 0 < sum(by_item[item] for item in batch) <= 100
        assert len(batch) <= 7
    assert sorted(item for batch in batches for item in batch) == sorted(by_item)


def test_worked_example_of_one_batch(core):
    """Arrival order while it fits (5, 2), then the longest that still fits (3, not 1): the older 3."""
    budget = TokenBudgetPacker(10, window=6)
    for item, length in zip("abcdef", [5, 2, 6, 1, 3, 3], strict=True):
        budget.add(item, length)
    assert budget.next() == [["a", "b", "e"]]
    assert budget.next() is None  # three pending, but the window is six
    assert budget.missing == 3
    assert budget.next(flush=True) == [["c", "d", "f"]]
    assert budget.next(flush=True) is None


def test_worked_example_of_two_ranks(core):
    """Two budgets of 10 fit a to e. The oldest (2) is placed first, then 6, 4, 4, 3 by the smallest squares:
    6 on rank 1 (0 < 4); 4 and 4 on rank 0 (4 and 20 < 36), now full; 3 on rank 1, then filled by best fit.
    """
    budget = TokenBudgetPacker(10, window=4, ranks=2)
    for item, length in zip("abcdefgh", [2, 4, 4, 6, 3, 5, 2, 1], strict=True):
        budget.add(item, length)
    assert budget.next() == [["a", "b", "c"], ["d", "e", "h"]]


def test_items_beyond_the_window_are_not_considered(core):
    """The item that would fit best is beyond the window of 3."""
    budget = TokenBudgetPacker(10, window=3)
    for item, length in zip("abcd", [7, 8, 2, 3], strict=True):
        budget.add(item, length)
    assert budget.next() == [["a", "c"]]


@pytest.mark.parametrize("ranks", [1, 4])
def test_waiting_time_is_bounded_by_the_window(core, ranks):
    """Each step includes the oldest item, so an item waits at most one step per older item."""
    rng = random.Random(ranks)
    budget = TokenBudgetPacker(64, window=16, ranks=ranks)
    arrived, steps = {}, 0
    for item in range(2000):
        budget.add(item, rng.choice([1, 2, 40, 63, 64]))
        arrived[item] = steps
        while (batches := budget.next()) is not None:
            steps += 1
            assert all(batches)  # every rank gets a batch
            assert batches[0][0] == min(arrived)
            for packed in (item for batch in batches for item in batch):
                assert steps - arrived.pop(packed) <= 16 * ranks


@native_only
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_native_and_reference_pack_the_same_batches(data):
    max_tokens = data.draw(st.sampled_from([16, 100, 1024]))
    ranks = data.draw(st.integers(1, 5))
    arguments = (
        max_tokens,
        data.draw(st.sampled_from([1, 3, max_tokens])),
        data.draw(st.integers(1, 64)),
        ranks,
    )
    native, reference = packer.BestFitPacker(*arguments), ReferenceBestFitPacker(*arguments)
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    few_lengths = [rng.randint(1, max_tokens) for _ in range(3)]
    for _ in range(100):
        lengths = [
            rng.choice([rng.randint(1, max_tokens), rng.choice(few_lengths)])
            for _ in range(rng.randint(0, 4 * ranks))
        ]
        native.extend(lengths)
        reference.extend(lengths)
        if rng.random() < 0.05:  # swap the states
            saved = native.state()
            native.restore(reference.state())
            reference.restore(saved)
        flush = rng.random() < 0.1
        assert native.next(flush) == reference.next(flush)
        assert native.pending() == reference.pending()
        assert len(native) == len(reference)


@native_only
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_plan_equals_packing_step_by_step(ranks):
    lengths = mixed_lengths(MIXES["uniform"], 2000)
    core = packer.BestFitPacker(4096, 4096, 50 * ranks, ranks)
    core.extend([5])
    ids, offsets = core.plan(np.array(lengths))
    assert core.pending() == [(0, 5)]  # planning leaves pending sequences unchanged
    planned = [ids[begin:end].tolist() for begin, end in pairwise(offsets)]
    budget = TokenBudgetPacker(4096, window=50, ranks=ranks)
    assert planned == [batch for step in steps_of(budget, enumerate(lengths)) for batch in step]


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize(
    ("mix", "min_fill"), [("252", 0.99), ("216", 0.99), ("197", 0.99), ("uniform", 0.97)]
)
def test_batches_of_the_paper_mixes_are_full(core, mix, min_fill, ranks):
    lengths = mixed_lengths(MIXES[mix], 20_000)
    budget = TokenBudgetPacker(16_384, ranks=ranks)
    steps = list(steps_of(budget, enumerate(lengths)))
    assert sum(len(batch) for step in steps for batch in step) == budget.statistics.sequences == 20_000
    assert budget.statistics.tokens == sum(lengths)
    complete = [batch for step in steps[:-1] for batch in step]  # the last step is the remainder
    assert sum(lengths[i] for batch in complete for i in batch) >= min_fill * 16_384 * len(complete)


@pytest.mark.parametrize("mix", MIXES)
def test_attention_cost_is_balanced_over_ranks(core, mix):
    """The spread of sums of squared lengths is less than a fifth of that of batches packed one by one, and
    the most expensive rank is less than 3 % above the mean."""
    ranks, lengths = 8, mixed_lengths(MIXES[mix], 10_000)

    def squares(batches):
        return [sum(lengths[i] ** 2 for i in batch) for batch in batches]

    def spread(steps):
        return statistics.mean(statistics.pstdev(step) / statistics.mean(step) for step in steps)

    balanced = [
        squares(step) for step in steps_of(TokenBudgetPacker(16_384, ranks=ranks), enumerate(lengths))
    ]
    alone = squares(TokenBudgetPacker(16_384).pack(enumerate(lengths)))
    dealt = [alone[i : i + ranks] for i in range(0, len(alone) - ranks, ranks)]
    complete = balanced[:-2]  # the last is the remainder, and the one before may lack fitting lengths
    assert spread(complete) < spread(dealt) / 5
    assert statistics.mean(max(step) / statistics.mean(step) for step in complete) < 1.03


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_resumed_packer_gives_the_same_batches(core, ranks):
    lengths = mixed_lengths({64: 4, 16: 48, 4: 48}, 500)
    uninterrupted = TokenBudgetPacker(256, window=64, ranks=ranks)
    expected = list(uninterrupted.pack(stream(lengths)))

    source = stream(lengths)
    first = TokenBudgetPacker(256, window=64, ranks=ranks)
    batches = first.pack(source)
    got = [next(batches) for _ in range(2 * ranks)]
    saved = json.loads(json.dumps(first.state_dict()))
    second = TokenBudgetPacker(256, window=64, ranks=ranks)
    second.load_state_dict(saved)
    assert len(second) == len(first)
    got += second.pack(source)
    assert got == expected
    assert second.statistics == uninterrupted.statistics


def test_state_loads_with_another_number_of_ranks(core):
    many, few = TokenBudgetPacker(100, window=8, ranks=4), TokenBudgetPacker(100, window=8, ranks=1)
    items = list(range(40))
    many.extend(items, [30] * 40)
    taken = [item for batch in many.next() for item in batch]
    few.load_state_dict(many.state_dict())
    assert sorted(taken + [item for batch in few.pack([]) for item in batch]) == items


NOT_INTEGERS = [
    7.0,
    7.9,
    np.float64(7),
    float("nan"),
    True,
    np.True_,
    torch.tensor(True),
    torch.tensor(7.0),
    "7",
]


@pytest.mark.parametrize("length", [*NOT_INTEGERS, None, [7], 2**70, -(2**70)], ids=repr)
@pytest.mark.parametrize("core", CORES)
def test_cores_refuse_lengths_that_are_not_integers_without_a_trace(core, length):
    packer = core(100, 100, 8, 1)
    packer.extend(np.array([5], dtype=np.int32))
    for lengths in ([7, length], (n for n in (7, length))):
        with pytest.raises(ValueError, match=r"integer number of tokens|does not fit a batch"):
            packer.extend(lengths)
    with pytest.raises(ValueError, match=r"integer number of tokens|does not fit a batch"):
        packer.restore({"next_id": 2, "pending": [(0, 5), (1, length)]})
    assert packer.state() == {"next_id": 1, "pending": [(0, 5)]}


@pytest.mark.parametrize("core", CORES)
def test_cores_refuse_arrays_of_floats_and_booleans(core):
    packer = core(100, 100, 8, 1)
    for lengths in (np.array([7.0]), np.array([True]), torch.tensor([7.0])):
        with pytest.raises(ValueError, match="integer number of tokens"):
            packer.extend(lengths)
    packer.extend(torch.tensor([3, 4]))
    packer.extend(np.array([5, 6], dtype=np.uint64))
    assert packer.pending() == [(0, 3), (1, 4), (2, 5), (3, 6)]


@pytest.mark.parametrize(
    ("items", "lengths", "message"),
    [
        (["a"], [1, 2], "one length per item, got 1 items and 2 lengths"),
        (["a", "b"], [1], "one length per item, got 2 items and 1 lengths"),
        (["a", "b"], [1, 2.5], "b: expected an integer number of tokens, got 2.5"),
        (["a", "b"], ["x", 1], "a: expected an integer number of tokens, got 'x'"),
        (["a", "b"], [1, 101], "b: a sequence of 101 tokens does not fit"),
    ],
)
def test_a_refused_extend_leaves_no_trace(core, items, lengths, message):
    budget = TokenBudgetPacker(100, window=2)
    budget.add("before", 60)
    before = budget.state_dict()
    with pytest.raises(UserError, match=re.escape(message)):
        budget.extend(items, lengths)
    assert budget.state_dict() == before
    budget.extend(iter(["after", "last"]), (n for n in (np.int64(40), torch.tensor(7))))
    assert list(budget.pack([])) == [["before", "after"], ["last"]]
    json.dumps(budget.state_dict())  # lengths of numpy became plain integers


@pytest.mark.parametrize(
    "change",
    [
        {"pending": [[0, 60, "a"], [1, 2.5, "b"]]},
        {"pending": [[0, 60, "a"], [0, 5, "b"]]},
        {"pending": [[0, 60, "a"], [7, 5, "b"]]},
        {"statistics": {"unknown": 1}},
        {"added": 1.5},
    ],
)
def test_a_damaged_state_is_refused_without_a_trace(core, change):
    budget = TokenBudgetPacker(100, window=2)
    budget.extend("ab", [60, 5])
    before = budget.state_dict()
    with pytest.raises(UserError):
        budget.load_state_dict(before | change)
    assert budget.state_dict() == before
    assert budget.next() == [["a", "b"]]


def test_invalid_lengths_and_settings_are_rejected(core):
    budget = TokenBudgetPacker(100)
    for length in (0, 101):
        with pytest.raises(UserError, match=rf"photo\.jpg: a sequence of {length} tokens does not fit"):
            budget.extend(["other.jpg", "photo.jpg"], [7, length])
    assert len(budget) == 0
    budget.add("fits", 100)
    assert budget.next(flush=True) == [["fits"]]
    for arguments in (
        {"max_tokens": 0},
        {"max_tokens": 8, "max_sequences": 0},
        {"max_tokens": 8, "window": 0},
        {"max_tokens": 8, "ranks": 0},
    ):
        with pytest.raises(UserError, match="at least 1 is needed"):
            TokenBudgetPacker(**arguments)
    with pytest.raises(UserError, match="expected a state saved with"):
        TokenBudgetPacker(99).load_state_dict(budget.state_dict())


def test_a_state_of_other_settings_is_repacked_on_request(core):
    before = TokenBudgetPacker(100, window=8)
    before.extend(list(range(12)), [30] * 12)
    taken = before.next()
    after = TokenBudgetPacker(60, window=4)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())), repack=True)
    assert after.statistics.batches == 0
    rest = list(after.pack([]))
    assert sorted(item for batch in taken + rest for item in batch) == list(range(12))
    assert [len(batch) for batch in rest] == [2, 2, 2, 2, 1]
    assert after.statistics.fill == 9 * 30 / (5 * 60)
    with pytest.raises(UserError, match="30 pending tokens exceed max_tokens=29; raise it"):
        TokenBudgetPacker(29).load_state_dict(before.state_dict(), repack=True)
