"""The table of latents is a sequence of entries like a list of them, at a fraction of the memory."""

import pickle
from dataclasses import asdict

import pytest

from cat_fast.data.latent_format import LatentEntry
from cat_fast.data.latent_table import LatentTable

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


def test_it_is_read_as_a_list_is(table):
    assert list(table) == ENTRIES
    assert [table[i] for i in range(-8, 8)] == ENTRIES * 2
    assert table[2:7:2] == ENTRIES[2:7:2]
    with pytest.raises(IndexError):
        table[8]
    assert list(pickle.loads(pickle.dumps(table))) == ENTRIES


def test_rows_know_their_shard_and_what_lies_beside_them(table):
    shards = [shard for shard, size in SIZES.items() for _ in range(size)]
    assert [table.shard_of(i) for i in range(8)] == shards
    for i in range(8):
        beside = [entry.key for entry, shard in zip(ENTRIES, shards, strict=True) if shard == shards[i]]
        assert table.keys_beside(i) == beside


def test_a_latent_takes_its_key_its_caption_and_a_few_dozen_bytes():
    builder, count = LatentTable.Builder(), 20_000
    row = {"label": 1, "ratio": 16, "shape": [16, 32, 32], "caption": "c" * 60}
    for shard in range(count // 1000):
        builder.add(f"{shard}", [{"key": f"{n:020d}", **row} for n in range(1000)])
    assert len(pickle.dumps(builder.finish())) < count * (20 + 60 + 40)
