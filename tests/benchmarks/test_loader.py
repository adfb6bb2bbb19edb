"""The loader's benchmark: all rivals give the same crops, on toy sizes."""

from benchmarks import loader
from benchmarks.shared import harness


def test_every_rival_gives_the_same_crops(tmp_path):
    case = loader.case(tmp_path, workers=1, images=24, side=32)
    truth = case.truth()
    assert truth[0].shape == (24, 3, 32, 32)
    assert len({crop.sum().item() for crop in truth[0]}) == 24
    for contestant in (case.ours, *case.baselines.values()):
        assert harness.error_of(contestant.outputs(contestant.run()), truth) == 0
    assert case.details["images_per_second"] > 0
