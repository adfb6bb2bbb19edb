"""The loader's benchmark: all rivals give the same crops, on toy sizes."""

from benchmarks import loader
from benchmarks.shared import harness
from cat_fast.data.streams.pool import WorkerPool
from cat_fast.data.streams.source import StreamSource


def test_every_rival_gives_the_same_crops(tmp_path):
    case = loader.case(tmp_path, workers=1, images=24, side=32)
    truth = case.truth()
    assert truth[0].shape == (24, 3, 32, 32)
    assert len({crop.sum().item() for crop in truth[0]}) == 24
    for contestant in (case.ours, *case.baselines.values()):
        assert harness.error_of(contestant.outputs(contestant.run()), truth) == 0
    assert case.rates == {"images": 24, "images_per_worker": 24}


def test_nothing_is_decoded_between_epochs(tmp_path, monkeypatch):
    submitted, batches = [], []
    submit, batch = WorkerPool.submit, StreamSource.batch
    monkeypatch.setattr(WorkerPool, "submit", lambda *task: submitted.append(1) or submit(*task))
    monkeypatch.setattr(StreamSource, "batch", lambda source: batches.append(1) or batch(source))
    case = loader.case(tmp_path, workers=1, images=24, side=32)
    for epoch in (1, 2):
        case.baselines["one_process"].run()
        assert (len(submitted), len(batches)) == (24 * epoch, 3 * epoch)


def test_every_process_of_webdataset_has_a_shard():
    assert max(loader.WORKERS) <= loader.IMAGES // loader.IMAGES_PER_SHARD
