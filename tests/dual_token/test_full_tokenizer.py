"""`DualTokenizer` with all parts: codes of both kinds, folders, and decoding with a tiny diffusion model."""

import json

import pytest
import torch

from cat_fast.dual_token.rerender.open import open_backend
from cat_fast.dual_token.rerender.rerender import RerenderSettings, rerender
from cat_fast.dual_token.resize import resize
from cat_fast.dual_token.tokenizer import DualTokenizer, Renderer
from cat_fast.errors import UserError
from tests.dual_token.conftest import tiny_guide
from tests.dual_token.rerender.conftest import cat_pipelines, stable_diffusion  # noqa: F401 # fixtures
from tests.dual_token.semantic.test_model import tiny_semantic

FAST = RerenderSettings(steps=2)


@pytest.fixture(params=["sd", "flow"])
def full(request, stable_diffusion, cat_pipelines):  # noqa: F811
    """A tokenizer whose semantic codes stand for states of the diffusion model's text encoder."""
    folder = str(stable_diffusion if request.param == "sd" else cat_pipelines["flow"])
    target = open_backend(folder, "cpu").text_target
    semantic = tiny_semantic(
        num_states=target.num_states if request.param == "sd" else 6,
        text_width=target.width,
        variable_length=target.variable_length,
        text_fingerprint=target.fingerprint(),
    )
    return DualTokenizer(tiny_guide(), semantic, Renderer(model=folder), max_side=8)


def image(height=48, width=40):
    torch.manual_seed(0)
    return torch.rand(3, height, width) * 2 - 1


def test_encode_flatten_decode(full):
    tokens = full.encode(image(), 4)
    assert tokens.semantic.shape == (4,)
    assert torch.equal(tokens.semantic, full.semantic.encode(image()[None])[0])
    vocabulary = full.vocabulary
    assert vocabulary.parse(vocabulary.flatten(tokens)) == tokens
    height, width = full.backend.default_size
    drawn = full.decode(tokens, settings=FAST)
    assert drawn.size == (width, height)
    assert full.decode(tokens, (height, 2 * width), FAST).size == (2 * width, height)
    guide = resize(full.decode_guides([tokens])[0][None], (height, width))
    states = [own.float() for own in full.semantic.decode(tokens.semantic[None])]
    expected = rerender(full.backend, guide, states, settings=FAST)
    torch.testing.assert_close(full.decode_batch([tokens], settings=FAST), expected)


def test_mixed_grids_and_ablations(full):
    batch = full.encode_batch([image(), image(32, 64)], [2, (4, 8)])
    images = full.decode_batch(batch, settings=FAST)
    assert len(images) == 2
    for mode in ("semantic", "unconditioned", "guide"):
        other = full.decode_batch(batch, settings=RerenderSettings(steps=2, mode=mode))
        assert (other - images).abs().max() > 1e-4
    alone = [tokens.without_semantic() for tokens in batch]
    with pytest.raises(UserError, match="none to condition on"):
        full.decode_batch(alone, settings=FAST)
    full.decode_batch(alone, settings=RerenderSettings(steps=2, mode="unconditioned"))
    with pytest.raises(UserError, match="guide codes: expected a grid, got none"):
        full.decode_batch([batch[0].without_guide()], settings=FAST)
    full.decode_batch([batch[0].without_guide()], settings=RerenderSettings(steps=2, mode="semantic"))


def test_save_and_load(full, tmp_path):
    full.save_pretrained(tmp_path)
    loaded = DualTokenizer.from_pretrained(tmp_path, "cpu")
    tokens = full.encode(image(), 4)
    assert loaded.encode(image(), 4) == tokens
    assert loaded.fingerprint() == full.fingerprint()
    assert loaded.renderer == full.renderer
    again = loaded.decode_batch([tokens], settings=FAST)
    torch.testing.assert_close(again, full.decode_batch([tokens], settings=FAST))
    index = json.loads((tmp_path / "dual_tokenizer.json").read_text())
    (tmp_path / "dual_tokenizer.json").write_text(json.dumps(index | {"renderer": {"model": ""}}))
    with pytest.raises(UserError, match="renderer: not valid"):
        DualTokenizer.from_pretrained(tmp_path, "cpu")


def test_codes_of_another_text_encoder_are_refused(full):
    full.semantic.register_to_config(text_fingerprint="0" * 16)
    with pytest.raises(UserError, match="trained for 0000000000000000"):
        _ = full.backend


def test_a_tokenizer_without_a_diffusion_model_decodes_guides_only(full):
    tokens = full.encode(image(), 2)
    alone = DualTokenizer(full.guide, full.semantic, max_side=8)
    assert alone.decode_guide(tokens).size == (4, 4)
    with pytest.raises(UserError, match="has no diffusion model"):
        alone.decode(tokens)


def test_a_wrong_size_is_refused_before_decoding(full, monkeypatch):
    tokens = full.encode(image(), 2)
    monkeypatch.setattr(full.guide, "decode", None)
    with pytest.raises(UserError, match="expected a multiple of"):
        full.decode(tokens, (17, 16), FAST)
