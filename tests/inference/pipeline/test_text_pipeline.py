"""CATPipeline with a generator that takes text: descriptions become images, labels still do."""

import json

import numpy as np
import pytest
import torch

from cat_fast.complexity import Description, RatioThresholds
from cat_fast.errors import UserError
from cat_fast.generator import DiT, paper_schedule
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.inference import CATPipeline
from tests.cli.conftest import tiny_tokenizer
from tests.inference.tiny_encoder import WIDTH, save_encoder

LABELS = ["sky", "page"]
DESCRIPTIONS = [Description("a blue sky"), Description("a newspaper page", has_text=True)]
FAST = {"steps": 3, "scheduler": "ddim", "ratio": 16, "guidance": 3.0}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a BERT with random weights."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def make_parts(**changes):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    sizes = {"in_channels": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "position_frame": 4}
    generator = DiT(**sizes, num_classes=2, **{"text_dim": WIDTH} | changes)
    with torch.no_grad():
        for parameter in generator.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return tokenizer, generator, paper_schedule(), LABELS, RatioThresholds(3, 7)


@pytest.fixture(scope="module")
def pipeline(encoder):
    return CATPipeline(*make_parts(), resolution=64, descriptions=DESCRIPTIONS, text_encoder=encoder)


def image(pipeline, prompt):
    return np.asarray(pipeline(prompt, **FAST).images[0]).astype(int)


def test_what_is_drawn_follows_the_description(pipeline):
    house = image(pipeline, "a red house")
    assert np.array_equal(image(pipeline, Description("a red house")), house)
    assert np.abs(image(pipeline, "a blue house") - house).max() > 1
    assert np.abs(image(pipeline, LABELS[0]) - house).max() > 1


def test_a_label_brings_its_class_and_its_caption(pipeline):
    (by_name,), (by_number,) = pipeline.plan("page"), pipeline.plan(1)
    assert by_name == by_number
    assert (by_name.label, by_name.text) == (1, "a newspaper page")
    (free,) = pipeline.plan("a newspaper page")
    assert (free.label, free.text) == (2, "a newspaper page")  # 2 is the null class
    assert np.abs(image(pipeline, "page") - image(pipeline, "a newspaper page")).max() > 1


def test_without_guidance_the_text_counts_too(pipeline):
    one, other = (
        np.asarray(pipeline(text, **FAST | {"guidance": 1}).images[0]).astype(int)
        for text in ("a red house", "a blue house")
    )
    assert np.abs(one - other).max() > 1


def test_a_description_earns_its_tokens(pipeline):
    plain = Description("a blue sky")
    page = Description("a newspaper page with columns of text, tables and many photographs", True, True)
    assert [request.ratio for request in pipeline.plan([plain, page])] == [32, 8]
    assert [request.ratio for request in pipeline.plan([plain, page], mean_tokens=8.5)] == [32, 8]
    assert [request.ratio for request in pipeline.plan([plain, page], mean_tokens=4)] == [16, 16]


def test_neighbours_do_not_matter(pipeline):
    prompts = ["a red house", "sky", "a blue sky a newspaper page"]
    together = pipeline(prompts, seed=4, **FAST).images
    for i, prompt in enumerate(prompts):
        (alone,) = pipeline(prompt, seed=4 + i, **FAST).images
        assert np.abs(np.asarray(alone).astype(int) - np.asarray(together[i]).astype(int)).max() <= 1


def test_a_saved_pipeline_remembers_its_encoder(pipeline, encoder, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "pipeline.json").read_text())["text_encoder"] == encoder
    loaded = CATPipeline.from_pretrained(tmp_path)
    assert np.array_equal(image(loaded, "a red house"), image(pipeline, "a red house"))


def test_parts_that_do_not_fit_are_refused(encoder, tmp_path):
    with pytest.raises(UserError, match="text_encoder must name"):
        CATPipeline(*make_parts(), resolution=64)
    with pytest.raises(UserError, match="of no use"):
        CATPipeline(*make_parts(text_dim=None), resolution=64, text_encoder=encoder)
    with pytest.raises(UserError, match="of width 16, the generator was trained on 24"):
        CATPipeline(*make_parts(text_dim=24), resolution=64, text_encoder=encoder)
    with pytest.raises(UserError, match="text encoder"):
        CATPipeline(*make_parts(), resolution=64, text_encoder=str(tmp_path))


def test_another_encoder_of_the_same_width_is_refused(encoder, tmp_path):
    other, own = save_encoder(tmp_path / "other", seed=1), TextEncoder(encoder).fingerprint()
    assert TextEncoder(save_encoder(tmp_path / "same")).fingerprint() == own
    parts = make_parts(text_encoder_fingerprint=own)
    CATPipeline(*parts, resolution=64, text_encoder=encoder)
    with pytest.raises(UserError, match=f"trained with text encoder {own}, '{other}' is "):
        CATPipeline(*parts, resolution=64, text_encoder=other)


def test_a_saved_pipeline_refuses_an_encoder_that_has_changed(tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    CATPipeline(*make_parts(), resolution=64, text_encoder=encoder).save_pretrained(tmp_path / "pipe")
    CATPipeline.from_pretrained(tmp_path / "pipe")
    save_encoder(tmp_path / "encoder", seed=1)
    with pytest.raises(UserError, match="use the text encoder it was trained with"):
        CATPipeline.from_pretrained(tmp_path / "pipe")


def test_an_encoder_given_by_a_relative_path_is_found_from_elsewhere(pipeline, tmp_path, monkeypatch):
    save_encoder(tmp_path / "here" / "encoder")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    CATPipeline(*make_parts(), resolution=64, text_encoder="encoder").save_pretrained(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path / "there")
    loaded = CATPipeline.from_pretrained(tmp_path / "pipe")
    assert np.array_equal(image(loaded, "a red house"), image(pipeline, "a red house"))
