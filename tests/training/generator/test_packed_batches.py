"""Prefetching changes neither batches nor checkpoints, nor the step at which an error is raised."""

import json
import threading

import pytest
import torch

from benchmarks.shared.random_latents import write_latents
from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.errors import UserError
from cat_fast.packing import PackedSequence
from cat_fast.training.generator.packed_batches import PackedBatches
from cat_fast.training.generator.packed_stream import PackedStream
from cat_fast.training.runtime.ranks import Ranks

PREFETCH = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("latents"))


def streamed(folder) -> tuple[LatentDataset, PackedStream]:
    latents = LatentDataset(folder)
    return latents, PackedStream(latents.token_counts(), 96, 8, 0, Ranks())


@pytest.fixture
def batches(folder):
    latents, stream = streamed(folder)
    batches = PackedBatches(latents, stream, patch_size=2, prefetch=PREFETCH, device=torch.device("cpu"))
    yield batches
    batches.close()


def keys(batches: PackedBatches, count: int) -> list[tuple[str, ...]]:
    taken, seconds = batches.take(count)
    assert seconds >= 0
    return [batch.packed.key for batch in taken]


def test_batches_equal_those_of_the_stream(folder, batches):
    latents, stream = streamed(folder)
    taken = [batch for count in (1, 3, 2, 5) for batch in batches.take(count)[0]]
    for batch in taken:
        samples = [latents[i] for i in stream.next()]
        expected = PackedSequence.from_latents([s.latent for s in samples], [s.ratio for s in samples])
        assert torch.equal(batch.packed.tokens, expected.tokens)
        assert torch.equal(batch.packed.cu_seqlens, expected.cu_seqlens)
        assert batch.packed.key == tuple(s.key for s in samples)
        assert batch.packed.label.tolist() == [s.label for s in samples]
        assert batch.text is None


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_state_ignores_prefetched_batches(folder, batches, steps):
    _, stream = streamed(folder)
    for _ in range(steps):
        keys(batches, 2)
        stream.next()
        stream.next()
    assert batches.state_dict() == stream.state_dict()


def test_resuming_ignores_prefetched_batches(batches):
    keys(batches, 2)
    state = json.loads(json.dumps(batches.state_dict()))
    straight = keys(batches, 6)
    keys(batches, 1)
    batches.load_state_dict(state)
    assert keys(batches, 6) == straight


@pytest.mark.parametrize("steps", [1, 3])
def test_put_back_restores_the_state_before_take(folder, batches, steps):
    for _ in range(steps - 1):
        keys(batches, 2)
    before = batches.state_dict()
    keys(batches, 2)
    assert batches.state_dict() != before
    batches.put_back()
    assert batches.state_dict() == before
    keys(batches, 2)  # the state of a later step counts again
    assert batches.state_dict() != before


def test_unreadable_latent_is_raised_when_its_batch_is_taken(folder, batches, monkeypatch):
    _, stream = streamed(folder)
    first, second = set(stream.next()), set(stream.next())
    lost = (second - first).pop()
    read = LatentDataset.__getitem__

    def read_all_but_one(self, index):
        if index == lost:
            raise UserError("shard-00000.safetensors cannot be read")
        return read(self, index)

    monkeypatch.setattr(LatentDataset, "__getitem__", read_all_but_one)
    keys(batches, 1)
    with pytest.raises(UserError, match="cannot be read"):
        keys(batches, 1)


def test_captions_are_encoded_by_the_thread_ahead_of_the_step(folder):
    latents, stream = streamed(folder)
    encoded = []

    def encode(captions):
        encoded.append((threading.current_thread().name, list(captions)))
        return len(encoded)

    batches = PackedBatches(
        latents, stream, patch_size=2, prefetch=2, device=torch.device("cpu"), encode=encode
    )
    taken = [batch for _ in range(3) for batch in batches.take(2)[0]]
    batches.close()
    assert [batch.text for batch in taken] == [1, 2, 3, 4, 5, 6]
    assert all(name.startswith("latents") for name, _ in encoded)
    assert encoded[0][1] == [""] * len(taken[0].packed)
