"""The table of latents behaves like a list of entries, with a fraction of the memory."""

import pickle
from dataclasses import asdict

import pytest

from cat_fast.data.latents.format import LatentEntry
from cat_fast.data.latents.table import LatentTable

ENTRIES = [
    LatentEntry(
        key=f"Straße/{n}", label=n % 5, ratio=(8, 16, 32)[n % 3], shape=(4, n + 1, 2), caption=caption
    )
    for n, caption in enumerate(["a", None, "", "über", None, "b", "c", "d"])
]
SIZES = {"first": 3, "empty": 0, "second": 1, "third": 4}


@pytest.fixture
def table():
    builder, start = LatentTable.Builder(), 0
    for shard, size in SIZES.items():
        builder.add(shard, [asdict(entry) for entry in ENTRIES[start : start + size]])
        start += size
    return builder.finish()


def test_it_behaves_like_a_list(table):
    assert list(table) == ENTRIES
    assert [table[i] for i in range(-8, 8)] == ENTRIES * 2
    assert table[2:7:2] == ENTRIES[2:7:2]
    with pytest.raises(IndexError):
        table[8]
    assert list(pickle.loads(pickle.dumps(table))) == ENTRIES


def test_rows_have_a_location_in_their_shard(table):
    locations = [(shard, row, size) for shard, size in SIZES.items() for row in range(size)]
    assert [table.locate(i) for i in range(8)] == locations
    assert table.locate(-1) == locations[-1]
    with pytest.raises(IndexError):
        table.locate(8)


def test_a_latent_takes_a_few_dozen_bytes_plus_key_and_caption():
    builder, count = LatentTable.Builder(), 20_000
    row = {"label": 1, "ratio": 16, "shape": [16, 32, 32], "caption": "c" * 60}
    for shard in range(count // 1000):
        builder.add(f"{shard}", [{"key": f"{n:020d}", **row} for n in range(1000)])
    assert len(pickle.dumps(builder.finish())) < count * (20 + 60 + 40)


def test_distinct_captions_are_counted_and_sampled(table):
    assert table.distinct_captions(most=10) == (6, ["a", "", "über", "b", "c", "d"])
    assert table.distinct_captions(most=3) == (6, ["a", "über", "c"])
    builder = LatentTable.Builder()
    builder.add("one", [asdict(entry) for entry in ENTRIES[:4] * 50])
    assert builder.finish().distinct_captions(most=2) == (3, ["a", "über"])
