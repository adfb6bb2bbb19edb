"""Hugging Face datasets, streamed from local folders of parquet files or images."""

import pytest

from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.hugging_face import HubShards
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.errors import UserError
from tests.data.streams.sets import batches, image, make_source, state_of

datasets = pytest.importorskip("datasets")


def hub(path, config=None) -> HubShards:
    return HubShards(str(path), "", "train", config or StreamConfig(first_wait=0.0), ProblemLog())


@pytest.fixture
def parquet(tmp_path):
    """Write three files of five images with ratios."""
    for part in range(3):
        rows = [
            {
                "key": f"{part}-{n}",
                "image": {"bytes": image(10 * part + n), "path": None},
                "ratio": (8, 16, 32)[n % 3],
                "has_text": n == 0,
            }
            for n in range(5)
        ]
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        table.to_parquet(tmp_path / f"part-{part}.parquet")
    return tmp_path


def test_rows_are_samples_with_their_labels_and_files_are_shards(parquet):
    shards = hub(parquet)
    assert len(shards.names) == 3
    for part in range(3):
        entries = list(shards.open(part).entries(0))
        assert [entry.key for entry in entries] == [f"{part}-{n}" for n in range(5)]
        assert [entry.read() for entry in entries] == [image(10 * part + n) for n in range(5)]
        assert [entry.labels.ratio for entry in entries] == [8, 16, 32, 8, 16]
        assert [entry.labels.has_text for entry in entries] == [True, *[False] * 4]
    assert [entry.number for entry in shards.open(1).entries(3)] == [3, 4]


def test_readers_of_one_shard_are_independent(parquet):
    shard = hub(parquet).open(0)
    whole = [entry.key for entry in shard.entries(0)]
    first, second = shard.entries(0), shard.entries(2)
    together = [(next(first).key, next(second).key) for _ in range(3)]
    assert together == list(zip(whole[:3], whole[2:], strict=True))


def test_a_stream_resumes_exactly(parquet):
    stream = make_source(hub(parquet))
    batches(stream, range(7))
    again = make_source(hub(parquet))
    again.load_state_dict([state_of(stream)])
    assert batches(again, range(7, 20)) == batches(stream, range(7, 20))


def test_a_folder_of_images_is_one_shard_shared_by_ranks(tmp_path):
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(image(n))
    shards = hub(tmp_path)
    assert len(shards.names) == 1
    drawn = []
    for rank in (0, 1):
        stream = make_source(shards, rank=rank, world_size=2, rating=None, batch_size=3, shares={16: 1.0})
        drawn += stream.batch().keys
    assert len(set(drawn)) == 6


def breaking(rows, at, times):
    """Return a replacement for a shard's `rows` that raises at row `at`, `times` times."""
    left = [True] * times

    def rows_from(first):
        for number in range(first, len(rows)):
            if number == at and left:
                left.pop()
                raise ConnectionError("the line is down")
            yield rows[number]

    return rows_from


@pytest.mark.parametrize(("failures", "expected"), [(2, 5), (5, 3)])
def test_reading_resumes_after_the_last_sample_on_an_error(parquet, failures, expected):
    shard = hub(parquet).open(0)
    whole = [entry.key for entry in shard.entries(0)]
    shard.rows = breaking(list(shard.rows(0)), 3, failures)
    found = list(shard.entries(0))
    assert [entry.key for entry in found if not entry.damage] == whole[:expected]
    assert [entry.damage for entry in found if entry.damage] == ["the line is down"] * (expected < 5)


def test_data_sets_without_images_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"data\.dataset"):
        hub(tmp_path / "none")
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(UserError, match="expected an image column, got text"):
        hub(tmp_path)
