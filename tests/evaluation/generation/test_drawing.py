"""Samples drawn from a pipeline, of classes and of COCO captions."""

import json
from pathlib import Path

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.evaluation.generation.drawing import Drawing, draw_samples, read_first_captions
from tests.inference.pipeline.test_text_pipeline import make_pipeline
from tests.inference.tiny_encoder import save_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    make_pipeline(save_encoder(root / "encoder")).save_pretrained(root / "text")
    make_pipeline(text_dim=None).save_pretrained(root / "classes")
    return root


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions_val2017.json"
    annotations = [
        {"id": 9, "image_id": 2, "caption": "a later caption"},
        {"id": 3, "image_id": 2, "caption": " a red house "},
        {"id": 5, "image_id": 1, "caption": "a blue sky"},
    ]
    path.write_text(json.dumps({"images": [{"id": 2}, {"id": 1}], "annotations": annotations}))
    return path


def test_the_first_caption_of_each_image(captions):
    assert read_first_captions(captions) == ["a blue sky", "a red house"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected COCO's captions_val2017.json"),
        ({"images": [{"id": 1}], "annotations": []}, "image 1 has no caption"),
        ({"images": [], "annotations": []}, "has no images"),
    ],
)
def test_other_annotation_files_are_refused(captions, content, message):
    captions.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_first_captions(captions)


def test_coco_draws_one_image_per_caption_and_names_the_open_protocol(folders, captions, tmp_path):
    drawing = Drawing(pipeline=folders / "text", steps=2, ratio="16", coco=captions)
    progress = []
    entries = draw_samples(
        drawing, tmp_path / "out", CPU, on_progress=lambda *given: progress.append(given[1])
    )
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 2
    assert entries["pipeline"]["count"] == 2
    assert entries["pipeline"]["latent_scale"] == {"shift_factor": 0.0, "scaling_factor": 1.0}
    assert "leaves open how" in entries["note"]
    assert sum(progress) == 2


def test_coco_needs_a_text_conditioned_model(folders, captions, tmp_path):
    with pytest.raises(UserError, match="conditioned on classes only"):
        draw_samples(Drawing(pipeline=folders / "classes", coco=captions), tmp_path / "out", CPU)


def test_classes_take_turns_and_machines_share(folders, tmp_path):
    drawing = Drawing(pipeline=folders / "classes", count=3, steps=1, ratio="16", guidance=1.0)
    shares = [draw_samples(drawing, tmp_path / "out", CPU, rank, 2) for rank in range(2)]
    assert shares[-1] is not None
    plan = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert [image["label"] for image in plan["images"]] == [0, 1, 0]


def test_a_shipped_pipeline_is_drawn_from_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawing = Drawing(pipeline=Path("nano"), count=1, steps=1, ratio="32", guidance=1.0)
    entries = draw_samples(drawing, tmp_path / "out", CPU)
    assert entries["pipeline"]["pipeline"] == "nano"
    assert set(entries["pipeline"]["latent_scale"]) == {"shift_factor", "scaling_factor"}


def test_a_pipeline_without_the_scale_of_its_latents_is_refused(folders, tmp_path):
    config = folders / "classes" / "transformer" / "config.json"
    content = json.loads(config.read_text())
    del content["scaling_factor"]
    before = config.read_text()
    config.write_text(json.dumps(content))
    try:
        with pytest.raises(UserError, match="lacks scaling_factor"):
            draw_samples(Drawing(pipeline=folders / "classes", count=1), tmp_path / "out", CPU)
    finally:
        config.write_text(before)
