"""CATPipeline with a generator that takes text: descriptions become pictures, labels still do."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cat_fast.complexity import Description, RatioThresholds
from cat_fast.errors import UserError
from cat_fast.generator import DiT, paper_schedule
from cat_fast.inference import CATPipeline
from tests.cli.conftest import tiny_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "house", "sky", "newspaper", "page"]
LABELS = ["sky", "page"]
DESCRIPTIONS = [Description("a blue sky"), Description("a newspaper page", has_text=True)]
FAST = {"steps": 3, "scheduler": "ddim", "ratio": 16, "guidance": 3.0}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a BERT with random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(WORDS), **config)).save_pretrained(folder)
    return str(folder)


def make_parts(**changes):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    sizes = {"in_channels": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "position_frame": 4}
    generator = DiT(**sizes, num_classes=2, **{"text_dim": 16} | changes)
    with torch.no_grad():
        for parameter in generator.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return tokenizer, generator, paper_schedule(), LABELS, RatioThresholds(3, 7)


@pytest.fixture(scope="module")
def pipeline(encoder):
    return CATPipeline(*make_parts(), resolution=64, descriptions=DESCRIPTIONS, text_encoder=encoder)


def picture(pipeline, prompt):
    return np.asarray(pipeline(prompt, **FAST).images[0]).astype(int)


def test_what_is_drawn_follows_the_description(pipeline):
    house = picture(pipeline, "a red house")
    assert np.array_equal(picture(pipeline, Description("a red house")), house)
    assert np.abs(picture(pipeline, "a blue house") - house).max() > 1
    assert np.abs(picture(pipeline, LABELS[0]) - house).max() > 1


def test_a_label_brings_its_class_and_its_caption(pipeline):
    (by_name,), (by_number,) = pipeline.plan("page"), pipeline.plan(1)
    assert by_name == by_number
    assert (by_name.label, by_name.text) == (1, "a newspaper page")
    (free,) = pipeline.plan("a newspaper page")
    assert (free.label, free.text) == (2, "a newspaper page")  # 2 is the null class
    assert np.abs(picture(pipeline, "page") - picture(pipeline, "a newspaper page")).max() > 1


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
    assert np.array_equal(picture(loaded, "a red house"), picture(pipeline, "a red house"))


def test_parts_that_do_not_fit_are_refused(encoder, tmp_path):
    with pytest.raises(UserError, match="text_encoder must name"):
        CATPipeline(*make_parts(), resolution=64)
    with pytest.raises(UserError, match="of no use"):
        CATPipeline(*make_parts(text_dim=None), resolution=64, text_encoder=encoder)
    with pytest.raises(UserError, match="of width 16, the generator was trained on 24"):
        CATPipeline(*make_parts(text_dim=24), resolution=64, text_encoder=encoder)
    with pytest.raises(UserError, match="text encoder"):
        CATPipeline(*make_parts(), resolution=64, text_encoder=str(tmp_path))
