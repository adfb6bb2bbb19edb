"""TokenBudgetPacker: full batches, nothing lost, nothing starved, the same batches every time."""

import json
import random

import pytest

from cat_fast.errors import UserError
from cat_fast.packing import TokenBudgetPacker, packer
from cat_fast.packing.reference_packer import ReferenceBestFitPacker

CORES = [
    pytest.param(ReferenceBestFitPacker, id="reference"),
    pytest.param(
        packer.BestFitPacker,
        id="native",
        marks=pytest.mark.skipif(not packer.NATIVE, reason="cat_fast._bindings is not built"),
    ),
]


@pytest.fixture(params=CORES)
def core(request, monkeypatch):
    monkeypatch.setattr(packer, "BestFitPacker", request.param)


def stream(lengths):
    return ((f"item-{i}", length) for i, length in enumerate(lengths))


def mixed_lengths(mix: dict[int, int], count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(list(mix), list(mix.values()), k=count)


@pytest.mark.parametrize("seed", range(8))
def test_every_item_comes_out_once_whole_and_within_budget(core, seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 100) for _ in range(300)]
    batches = list(TokenBudgetPacker(100, max_sequences=7, window=32).pack(stream(lengths)))
    by_item = dict(stream(lengths))
    for batch in batches:
        assert sum(by_item[item] for item in batch) <= 100
        assert len(batch) <= 7
    assert sorted(item for batch in batches for item in batch) == sorted(by_item)


def test_a_batch_by_hand(core):
    """Arrival order while it fits (5, 2), then the largest that still fits (3, not 1), the older 3."""
    budget = TokenBudgetPacker(10, window=6)
    for item, length in zip("abcdef", [5, 2, 6, 1, 3, 3], strict=True):
        budget.add(item, length)
    assert budget.next() == ["a", "b", "e"]
    assert budget.next() is None  # three pending, a window of six
    assert budget.next(flush=True) == ["c", "d", "f"]
    assert budget.next(flush=True) is None


def test_nothing_past_the_window_is_looked_at(core):
    """Behind a window of 3 lies the item that would fit best: it must wait."""
    budget = TokenBudgetPacker(10, window=3)
    for item, length in zip("abcd", [7, 8, 2, 3], strict=True):
        budget.add(item, length)
    assert budget.next() == ["a", "c"]


@pytest.mark.parametrize("seed", range(4))
def test_nobody_waits_longer_than_the_window(core, seed):
    """Each batch begins with the oldest, so an item leaves within as many batches as are before it."""
    rng = random.Random(seed)
    budget = TokenBudgetPacker(64, window=16)
    arrived, batches = {}, 0
    for item in range(2000):
        budget.add(item, rng.choice([1, 2, 40, 63, 64]))
        arrived[item] = batches
        while (batch := budget.next()) is not None:
            batches += 1
            assert batch[0] == min(arrived)
            for done in batch:
                assert batches - arrived.pop(done) <= 16


@pytest.mark.skipif(not packer.NATIVE, reason="cat_fast._bindings is not built")
@pytest.mark.parametrize("seed", range(40))
def test_native_and_reference_pack_the_same_batches(seed):
    rng = random.Random(seed)
    max_tokens = rng.choice([16, 100, 1024])
    arguments = (max_tokens, rng.choice([1, 3, max_tokens]), rng.choice([1, 2, 17, 64]))
    native, reference = packer.BestFitPacker(*arguments), ReferenceBestFitPacker(*arguments)
    few_lengths = [rng.randint(1, max_tokens) for _ in range(3)]
    for _ in range(300):
        for _ in range(rng.randint(0, 4)):
            length = rng.choice([rng.randint(1, max_tokens), rng.choice(few_lengths)])
            native.add(length)
            reference.add(length)
        if rng.random() < 0.05:  # swap the states: each goes on with the other's
            saved = native.state()
            native.restore(reference.state())
            reference.restore(saved)
        flush = rng.random() < 0.1
        assert native.next(flush) == reference.next(flush)
        assert native.pending() == reference.pending()
        assert len(native) == len(reference)


@pytest.mark.parametrize(
    ("mix", "least"),
    [
        ({1024: 10, 256: 48, 64: 42}, 0.99),
        ({1024: 6, 256: 49, 64: 45}, 0.99),
        ({1024: 4, 256: 49, 64: 47}, 0.99),
        (dict.fromkeys(range(16, 1025), 1), 0.97),
    ],
)
def test_batches_of_the_paper_are_full(core, mix, least):
    budget = TokenBudgetPacker(16_384)
    count = sum(len(batch) for batch in budget.pack(stream(mixed_lengths(mix, 20_000))))
    assert count == budget.statistics.sequences == 20_000
    assert budget.statistics.tokens == sum(mixed_lengths(mix, 20_000))
    assert budget.statistics.fill >= least


def test_a_run_that_was_cut_goes_on_with_the_same_batches(core):
    lengths = mixed_lengths({64: 4, 16: 48, 4: 48}, 500)
    whole = TokenBudgetPacker(256, window=64)
    expected = list(whole.pack(stream(lengths)))

    source = stream(lengths)
    first = TokenBudgetPacker(256, window=64)
    batches = first.pack(source)
    got = [next(batches) for _ in range(5)]
    saved = json.loads(json.dumps(first.state_dict()))
    second = TokenBudgetPacker(256, window=64)
    second.load_state_dict(saved)
    assert len(second) == len(first)
    got += second.pack(source)
    assert got == expected
    assert second.statistics == whole.statistics


def test_what_cannot_be_packed_is_refused(core):
    budget = TokenBudgetPacker(100)
    for length in (0, 101):
        with pytest.raises(UserError, match=rf"photo\.jpg: a sequence of {length} tokens does not fit"):
            budget.add("photo.jpg", length)
    assert len(budget) == 0
    budget.add("fits", 100)
    assert budget.next(flush=True) == ["fits"]
    for arguments in (
        {"max_tokens": 0},
        {"max_tokens": 8, "max_sequences": 0},
        {"max_tokens": 8, "window": 0},
    ):
        with pytest.raises(UserError, match="at least 1 is needed"):
            TokenBudgetPacker(**arguments)
    with pytest.raises(UserError, match="the saved state is of"):
        TokenBudgetPacker(99).load_state_dict(budget.state_dict())
