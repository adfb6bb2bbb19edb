"""Files that a sampling run writes once all its images are drawn."""

import numpy as np
import pytest
from PIL import Image

from cat_fast.inference.sampling_run import run as module
from cat_fast.inference.sampling_run.run import SampleRun, SampleSettings
from tests.inference.pipeline.test_text_pipeline import make_pipeline
from tests.inference.tiny_encoder import save_encoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline with the classes "sky" and "page" that also takes descriptions, and its folder."""
    folder = tmp_path_factory.mktemp("saved")
    pipeline = make_pipeline(save_encoder(folder / "encoder"))
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline, folder / "pipeline"


def drawn(saved, prompts, folder):
    """Return a run whose image i is of colour i."""
    run = SampleRun(saved[0], prompts, SampleSettings(ratio=16), folder, saved[1])
    (folder / "images").mkdir(parents=True)
    for i in range(len(prompts)):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(run.path(i))
    return run


def test_labels_are_stored_only_if_every_image_has_one(saved, tmp_path):
    labelled = np.load(drawn(saved, ["page", "sky"], tmp_path / "labelled").write_npz())
    assert labelled["arr_1"].tolist() == [1, 0]
    described = np.load(drawn(saved, ["a blue house", "sky"], tmp_path / "described").write_npz())
    assert described.files == ["arr_0"]
    assert described["arr_0"][:, 0, 0].tolist() == [[0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(("names", "columns"), [(1, 1), (2, 2), (103, 10)])
def test_the_grid_shows_the_first_hundred_images(saved, tmp_path, monkeypatch, names, columns):
    prompts = [f"house {i}" for i in range(names)] if names > 2 else ["sky", "page"][:names] * 103
    sheets = []
    monkeypatch.setattr(module, "contact_sheet", lambda rows: sheets.append(rows) or Image.new("RGB", (1, 1)))
    assert drawn(saved, prompts[:103], tmp_path).write_grid().is_file()
    cells = [cell for row in sheets[0] for cell in row]
    assert [cell.open().getpixel((0, 0))[0] for cell in cells] == list(range(100))
    assert [cell.notes for cell in cells] == [(prompt, "16x, 4 tokens") for prompt in prompts[:100]]
    assert len(sheets[0][0]) == columns
