"""CATPipeline with a transformer trained with text: descriptions and labels become images."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from cat_fast.complexity import Description, RatioThresholds
from cat_fast.errors import UserError
from cat_fast.generator import DiT, paper_schedule
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.inference import CATPipeline
from tests.cli.conftest import tiny_tokenizer
from tests.inference.tiny_encoder import WIDTH, save_encoder

LABELS = ["sky", "page"]
DESCRIPTIONS = [Description("a blue sky"), Description("a newspaper page", has_text=True)]
FAST = {"num_inference_steps": 3, "scheduler": "ddim", "ratio": 16, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a BERT with random weights."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def make_parts(**changes):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    sizes = {"in_channels": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "position_frame": 4}
    transformer = DiT(**sizes, num_classes=2, **{"text_dim": WIDTH} | changes)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return tokenizer, transformer, paper_schedule()


def make_pipeline(text_encoder=None, **changes):
    encoder = None if text_encoder is None else TextEncoder(text_encoder)
    made = CATPipeline(
        *make_parts(**changes),
        encoder,
        labels=LABELS,
        thresholds=RatioThresholds(3, 7),
        resolution=64,
        descriptions=DESCRIPTIONS,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipeline(encoder):
    return make_pipeline(encoder)


def image(pipeline, prompt, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline(prompt, generator=generator, **FAST | options).images[0]).astype(int)


def test_images_follow_the_description(pipeline):
    house = image(pipeline, "a red house")
    assert np.array_equal(image(pipeline, Description("a red house")), house)
    assert np.abs(image(pipeline, "a blue house") - house).max() > 1
    assert np.abs(image(pipeline, LABELS[0]) - house).max() > 1


def test_a_label_gives_its_class_and_its_caption(pipeline):
    (by_name,), (by_number,) = pipeline.plan("page"), pipeline.plan(1)
    assert by_name == by_number
    assert (by_name.label, by_name.text) == (1, "a newspaper page")
    (free,) = pipeline.plan("a newspaper page")
    assert (free.label, free.text) == (2, "a newspaper page")  # 2 is the null class
    assert np.abs(image(pipeline, "page") - image(pipeline, "a newspaper page")).max() > 1


def test_the_text_also_counts_without_guidance(pipeline):
    one, other = (image(pipeline, text, guidance_scale=1) for text in ("a red house", "a blue house"))
    assert np.abs(one - other).max() > 1


def test_complex_descriptions_get_more_tokens(pipeline):
    plain = Description("a blue sky")
    page = Description("a newspaper page with columns of text, tables and many photographs", True, True)
    assert [request.ratio for request in pipeline.plan([plain, page])] == [32, 8]
    assert [request.ratio for request in pipeline.plan([plain, page], mean_tokens=8.5)] == [32, 8]
    assert [request.ratio for request in pipeline.plan([plain, page], mean_tokens=4)] == [16, 16]


def test_neighbours_do_not_matter(pipeline):
    prompts = ["a red house", "sky", "a blue sky a newspaper page"]
    generators = [torch.Generator().manual_seed(4 + i) for i in range(3)]
    together = pipeline(prompts, generator=generators, **FAST).images
    for i, prompt in enumerate(prompts):
        alone = image(pipeline, prompt, seed=4 + i)
        assert np.array_equal(alone, np.asarray(together[i]))


def test_a_saved_pipeline_refers_to_its_encoder(pipeline, encoder, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["cat_fast.generator.text_encoder", "TextEncoder"]
    assert [path.name for path in (tmp_path / "text_encoder").iterdir()] == ["config.json"]
    saved = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert (saved["name"], saved["fingerprint"]) == (encoder, TextEncoder(encoder).fingerprint())
    for kind in (CATPipeline, DiffusionPipeline):
        loaded = kind.from_pretrained(str(tmp_path))
        assert np.array_equal(image(loaded, "a red house"), image(pipeline, "a red house"))


def test_text_encoder_moves_with_the_pipeline(encoder, tmp_path):
    made = make_pipeline(encoder)
    expected = image(made, "a red house")
    made.save_pretrained(tmp_path)
    for half in (
        made.to("cpu", torch.bfloat16),
        CATPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16),
    ):
        assert (half.text_encoder.dtype, half.transformer.dtype) == (torch.bfloat16, torch.bfloat16)
        assert np.abs(image(half, "a red house") - expected).mean() < 8


def test_offloading_starts_with_the_text_encoder(encoder):
    made = make_pipeline(encoder)
    expected = image(made, "a red house")
    made.enable_model_cpu_offload(device="cpu")
    assert len(made._all_hooks) == 3
    assert all(hasattr(made.components[name], "_hf_hook") for name in ("text_encoder", "transformer", "vae"))
    assert np.array_equal(image(made, "a red house"), expected)


def test_a_pipeline_without_its_encoder_is_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its text_encoder is missing"):
        CATPipeline.from_pretrained(tmp_path, text_encoder=None)
    (tmp_path / "text_encoder" / "config.json").write_text('{"_class_name": "TextEncoder"}')
    with pytest.raises(UserError, match="not a reference to a text encoder"):
        CATPipeline.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "text_encoder")
    with pytest.raises(UserError, match=r"text_encoder/config\.json is missing"):
        CATPipeline.from_pretrained(tmp_path)


def test_components_that_do_not_fit_are_refused(encoder):
    with pytest.raises(UserError, match="its text_encoder is missing"):
        make_pipeline()
    with pytest.raises(UserError, match="trained without text"):
        make_pipeline(encoder, text_dim=None)
    with pytest.raises(UserError, match="of width 16, the transformer was trained with width 24"):
        make_pipeline(encoder, text_dim=24)
    with pytest.raises(UserError, match="text_encoder: expected a TextEncoder, got a str"):
        CATPipeline(*make_parts(), encoder)


def test_another_encoder_of_the_same_width_is_refused(encoder, tmp_path):
    other, own = save_encoder(tmp_path / "other", seed=1), TextEncoder(encoder).fingerprint()
    assert TextEncoder(save_encoder(tmp_path / "same")).fingerprint() == own
    make_pipeline(encoder, text_encoder_fingerprint=own)
    with pytest.raises(UserError, match=f"trained with text encoder {own}, '{other}' is "):
        make_pipeline(other, text_encoder_fingerprint=own)


def test_a_saved_pipeline_refuses_an_encoder_that_has_changed(tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    make_pipeline(encoder).save_pretrained(tmp_path / "pipe")
    CATPipeline.from_pretrained(tmp_path / "pipe")
    save_encoder(tmp_path / "encoder", seed=1)
    with pytest.raises(UserError, match="use the text encoder it was saved with"):
        CATPipeline.from_pretrained(tmp_path / "pipe")


def test_an_encoder_given_by_a_relative_path_is_found_from_elsewhere(pipeline, tmp_path, monkeypatch):
    save_encoder(tmp_path / "here" / "encoder")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_pipeline("encoder").save_pretrained(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path / "there")
    loaded = CATPipeline.from_pretrained(tmp_path / "pipe")
    assert np.array_equal(image(loaded, "a red house"), image(pipeline, "a red house"))
