"""Cache of decoded images: fewer decodes, identical batches."""

from collections import Counter

import pytest

from cat_fast.data.images.index import ImageRecord
from cat_fast.data.streams import image_cache
from cat_fast.data.streams.decoding import CropSettings
from cat_fast.data.streams.formats.image_files import RecordShards
from tests.data.streams.sets import batches, image, make_source, state_of

IMAGE_BYTES = 4 * 20 * 16
ALL, SOME = 100 * IMAGE_BYTES, 5 * IMAGE_BYTES + 1


@pytest.fixture
def shards(tmp_path):
    """Twelve images with the same key; the fifth is broken."""
    records = []
    for n in range(12):
        path = tmp_path / f"{n}.png"
        path.write_bytes(b"not an image" if n == 4 else image(n))
        flags = {"has_text": n % 2 == 1, "has_faces": False}
        fields = {"caption": "", "score": 5, "ratio": (8, 16, 32)[n % 3]}
        records.append(ImageRecord(key="same", path=str(path), **flags, **fields))
    return RecordShards(records)


@pytest.mark.parametrize("cache_bytes", [SOME, ALL])
@pytest.mark.parametrize("max_side", [0, 12])
def test_batches_do_not_depend_on_the_cache(shards, cache_bytes, max_side):
    crop = CropSettings(8, 0.5, max_side=max_side)
    straight = batches(make_source(shards, crop=crop), range(40))
    source = make_source(shards, crop=crop, cache_bytes=cache_bytes)
    assert batches(source, range(25)) == straight[:25]
    resumed = make_source(shards, crop=crop, cache_bytes=cache_bytes)
    resumed.load_state_dict([state_of(source)])
    assert batches(resumed, range(25, 40)) == straight[25:]


def test_images_that_fit_are_decoded_once_and_memory_is_bounded(shards, monkeypatch):
    decoded: Counter[bytes] = Counter()
    original = image_cache.decode

    def counting(data, settings):
        decoded[data] += 1
        return original(data, settings)

    monkeypatch.setattr(image_cache, "decode", counting)
    source = make_source(shards, cache_bytes=ALL)
    batches(source, range(60))
    broken = decoded.pop(b"not an image")
    assert broken > 1
    assert len(decoded) == 11
    assert set(decoded.values()) == {1}
    assert (len(source.cache), source.cache.size, source.cache.full) == (11, 11 * IMAGE_BYTES, False)

    small = make_source(shards, cache_bytes=SOME)
    batches(small, range(60))
    assert (len(small.cache), small.cache.size, small.cache.full) == (5, 5 * IMAGE_BYTES, True)


def test_worker_processes_start_only_if_the_data_set_does_not_fit(shards):
    held = make_source(shards, cache_bytes=ALL, workers=1)
    expected = batches(held, range(20))
    assert held.pool._executor is None
    small = make_source(shards, cache_bytes=SOME, workers=1)
    assert batches(small, range(20)) == expected
    assert small.pool._executor is not None
    small.close()
