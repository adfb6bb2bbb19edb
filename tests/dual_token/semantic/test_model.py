"""`SemanticModel`: both stages, what they train, loading, and weights of a BLIP-2 folder."""

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2VisionConfig, OPTConfig

from cat_fast.dual_token.semantic.blip2 import blip2_settings, load_blip2
from cat_fast.dual_token.semantic.model import MEAN, STD, SemanticModel
from cat_fast.errors import UserError
from tests.dual_token.semantic.test_causal_qformer import SMALL

VISION = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
Q_FORMER = {key: value for key, value in SMALL.items() if key != "encoder_hidden_size"}


def tiny_semantic(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "vision": VISION, "qformer": Q_FORMER, "reverse": Q_FORMER, "num_queries": 4, "code_channels": 3,
        "codebook_size": 8, "decoder_layers": 1, "decoder_heads": 2, "num_states": 6, "text_width": 10,
        "variable_length": True, "projection": 5,
    }  # fmt: skip
    return SemanticModel(**(settings | changes)).eval()


def pairs(count=3):
    torch.manual_seed(1)
    return torch.rand(count, 3, 48, 40) * 2 - 1, [torch.randn(2 + i, 10) for i in range(count)]


def test_codes_are_causal():
    """Code i is a function of embedding i, which ignores later queries."""
    model, (images, _) = tiny_semantic(), pairs()
    before = model.encode(images)
    with torch.no_grad():
        model.causal.query_tokens[:, 2:] += 5.0
    assert torch.equal(model.encode(images)[:, :2], before[:, :2])


def test_images_are_normalised_as_blip2s():
    model = tiny_semantic()
    white = torch.ones(1, 3, 32, 32)
    expected = torch.stack([torch.full((32, 32), (1 - m) / s) for m, s in zip(MEAN, STD, strict=True)])
    direct = model.vision_model(pixel_values=expected[None]).last_hidden_state
    torch.testing.assert_close(model.image_features(white), direct)
    assert model.image_features(white).shape == (1, 17, 12)


def test_features_of_an_untrained_vit_depend_on_the_image():
    model, (images, _) = tiny_semantic(), pairs()
    assert model.image_features(images).std(0).mean() > 1e-3
    assert (
        tiny_semantic(vision=VISION | {"initializer_range": 0.5}).config["vision"]["initializer_range"] == 0.5
    )


@pytest.mark.parametrize("stage", ["contrastive", "codes"])
def test_a_stage_reaches_its_own_parameters_only(stage):
    model, (images, texts) = tiny_semantic(codebook="gradient"), pairs()
    output = model(stage, images, texts, torch.arange(3))
    if stage == "contrastive":
        output.loss.backward()
        assert 0 <= output.accuracy <= 1
    else:
        terms = output.cosine + output.states + output.lengths
        (terms + output.quantized.commitment + output.quantized.codebook).backward()
    trained = {id(p) for part in model.trained_parts(stage, with_vision=True) for p in part.parameters()}
    reached = {id(p) for p in model.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached <= trained
    names = {name for name, p in model.named_parameters() if id(p) in trained - reached}
    # The class token's output, and keys' biases, which softmax cancels, have no gradient.
    assert all("key.bias" in name or "qkv.bias" in name or "codebook" in name for name in names), names


def test_decoded_states_have_the_predicted_length():
    model, (images, _) = tiny_semantic(), pairs()
    codes = model.encode(images)
    assert codes.shape == (3, 4)
    states = model.decode(codes)
    assert all(1 <= len(own) <= 6 and own.shape[1] == 10 for own in states)
    fixed = tiny_semantic(variable_length=False)
    assert [len(own) for own in fixed.decode(codes)] == [6, 6, 6]


def test_save_and_load(tmp_path):
    model, (images, _) = tiny_semantic(), pairs()
    model.save_pretrained(tmp_path)
    loaded = SemanticModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert loaded.fingerprint() == model.fingerprint()
    assert tiny_semantic(seed=2).fingerprint() != model.fingerprint()


def test_weights_of_a_blip2_folder(tmp_path):
    torch.manual_seed(3)
    text = OPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8,
        max_position_embeddings=16, word_embed_proj_dim=8,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION).to_dict(),
        qformer_config={**Q_FORMER, "encoder_hidden_size": 12},
        text_config=text.to_dict(),
        num_query_tokens=4,
    )
    published = Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(published.query_tokens)
    published.save_pretrained(tmp_path / "blip2")
    settings = blip2_settings(str(tmp_path / "blip2"))
    assert settings["num_queries"] == 4
    model = tiny_semantic(**settings)
    load_blip2(model, str(tmp_path / "blip2"))
    assert torch.equal(model.causal.query_tokens, published.query_tokens)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = published.vision_model(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(model.vision_model(pixel_values=pixels).last_hidden_state, theirs)
        queries = published.query_tokens.expand(2, -1, -1)
        hidden = published.qformer(query_embeds=queries, encoder_hidden_states=theirs).last_hidden_state
        ours = model.causal.qformer(query_embeds=queries, encoder_hidden_states=theirs).last_hidden_state
    torch.testing.assert_close(ours, hidden)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="not on this machine"):
        blip2_settings("nowhere/blip2")
    OPTConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="got a model of type opt"):
        blip2_settings(str(tmp_path))
