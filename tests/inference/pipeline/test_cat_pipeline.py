"""CATPipeline: ratios, token budgets, batches and reproducibility."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from cat_fast.complexity import Description, RatioThresholds
from cat_fast.errors import UserError
from cat_fast.generator import DiT, SampleRequest, paper_schedule
from cat_fast.generator.sampling import SamplingState
from cat_fast.inference import CATPipeline
from cat_fast.inference.pipeline import assembly
from tests.fake_compiler import compile_to
from tests.inference.pipeline.conftest import DESCRIPTIONS, LABELS

FAST = {"num_inference_steps": 4, "scheduler": "ddim"}


def pixels(output):
    return [np.asarray(image).astype(int) for image in output.images]


def seeded(first, count):
    """Generators that draw what a run of `cat-fast sample --seed FIRST` draws."""
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def test_every_ratio_gives_an_image_of_the_requested_size(pipeline):
    for ratio, tokens in ((8, 16), (16, 4), (32, 1)):
        output = pipeline(["village street"], ratio=ratio, **FAST)
        assert (output.images[0].size, output.images[0].mode) == ((64, 64), "RGB")
        assert (output.ratios, output.tokens) == ([ratio], [tokens])


@pytest.mark.parametrize("ratio", [8, 16, 32])
@pytest.mark.parametrize(("height", "width"), [(64, 128), (192, 64), (128, None)])
def test_non_square_images(pipeline, ratio, height, width):
    output = pipeline(["village street"], ratio=ratio, height=height, width=width, **FAST)
    width = width or 64
    assert output.images[0].size == (width, height)
    assert output.tokens == [height * width // (2 * ratio) ** 2]
    (request,) = pipeline.plan(1, ratio=ratio, height=height, width=width)
    assert request.grid == (height // (2 * ratio), width // (2 * ratio))


def test_a_wide_image_is_not_a_transposed_tall_one(pipeline):
    wide, tall = (
        pixels(pipeline("village street", ratio=8, height=h, width=w, generator=seeded(0, 1), **FAST))[0]
        for h, w in ((64, 128), (128, 64))
    )
    assert np.abs(wide - tall.transpose(1, 0, 2)).max() > 1


def test_the_decode_tier_changes_the_decoder_only(pipeline, monkeypatch):
    def draw(output_type):
        generator = seeded(0, 1)
        return pipeline(1, ratio=16, generator=generator, output_type=output_type, **FAST).images[0]

    latent, exact = draw("latent"), draw("pt")
    compile_to(monkeypatch, lambda images: images + 1e-3)
    try:
        assert pipeline.use_decode_tier("fast") == pipeline.decode_tier == "fast"
        assert torch.equal(draw("latent"), latent)
        inside = (exact > 0) & (exact < 0.99)
        assert (draw("pt") - exact)[inside].mean().item() == pytest.approx(5e-4, rel=1e-2)
    finally:
        assert pipeline.use_decode_tier("exact") == pipeline.decode_tier == "exact"
    assert torch.equal(draw("pt"), exact)


def test_auto_spends_more_tokens_on_complex_images(pipeline):
    output = pipeline(LABELS, **FAST)
    assert output.ratios[0] == 32
    assert output.ratios[2] == 8
    assert output.tokens[0] <= output.tokens[1] <= output.tokens[2]


def test_an_image_depends_on_its_generator_and_not_on_its_neighbours(pipeline):
    together = pixels(pipeline(LABELS * 2, generator=seeded(10, 6), guidance_scale=2.0, **FAST))
    for i, label in enumerate(LABELS * 2):
        (alone,) = pixels(pipeline([label], generator=seeded(10 + i, 1), guidance_scale=2.0, **FAST))
        assert np.array_equal(alone, together[i])
    split = pixels(pipeline(LABELS * 2, generator=seeded(10, 6), guidance_scale=2.0, max_tokens=32, **FAST))
    assert all(np.array_equal(one, other) for one, other in zip(together, split, strict=True))
    assert np.abs(together[2] - together[5]).max() > 1


def test_requests_are_drawn_from_their_seeds(pipeline):
    requests = pipeline.plan(LABELS, ratio=16, seed=3)
    assert [request.seed for request in requests] == [3, 4, 5]
    drawn = pipeline.draw(requests, **FAST)
    given = pipeline(LABELS, ratio=16, generator=seeded(3, 3), **FAST).images
    assert all(np.array_equal(one, other) for one, other in zip(drawn, given, strict=True))


def test_latents_are_rescaled_before_decoding(pipeline, monkeypatch):
    seen = []
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, ratio: seen.append(z) or decode(z, ratio))
    monkeypatch.setattr(SamplingState, "latent", lambda *_: torch.full((4, 4, 4), 2.0))
    pipeline(["village street"], ratio=16, **FAST)
    expected = torch.tensor([2 / 0.5 + 0.3, 2 / 1.0 - 0.1, 2 / 2.0 + 0.0, 2 / 0.8 + 0.2])
    torch.testing.assert_close(seen[0], expected.view(1, 4, 1, 1).expand(1, 4, 4, 4))


def test_a_scale_per_ratio_is_undone_before_decoding(parts, monkeypatch, tmp_path):
    tokenizer, transformer = parts
    factors = {
        "shift_factor": {"8": [0.1] * 4, "16": [0.2, 0.3, 0.4, 0.5], "32": [0.0] * 4},
        "scaling_factor": {"8": [2.0] * 4, "16": [0.5, 1.0, 2.0, 4.0], "32": [1.0] * 4},
    }
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    scaled = DiT(**config | factors)
    scaled.load_state_dict(transformer.state_dict())
    CATPipeline(tokenizer, scaled, paper_schedule(), resolution=64).save_pretrained(tmp_path)
    pipeline = CATPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert {name: pipeline.transformer.config[name] for name in factors} == factors
    seen = {}
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, ratio: seen.update({ratio: z}) or decode(z, ratio))
    for ratio in (8, 16, 32):
        (latent,) = pipeline(1, ratio=ratio, generator=seeded(0, 1), output_type="latent", **FAST).images
        pipeline(1, ratio=ratio, generator=seeded(0, 1), **FAST)
        shift, scale = (torch.tensor(factors[name][str(ratio)]).view(4, 1, 1) for name in factors)
        torch.testing.assert_close(seen[ratio][0], latent / scale + shift)


def test_models_saved_before_decode_as_they_did(saved, tmp_path, pipeline):
    """Their configs hold one shift and scale per channel, and no betas."""
    folder = shutil.copytree(saved, tmp_path / "before")
    config = json.loads((folder / "transformer/config.json").read_text())
    assert isinstance(config["scaling_factor"], list)
    del config["beta_schedule"]
    (folder / "transformer/config.json").write_text(json.dumps(config))
    again = CATPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    expected, found = (pixels(made(LABELS, generator=seeded(0, 3), **FAST)) for made in (pipeline, again))
    assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))


def test_a_published_checkpoint_is_assembled_with_the_betas_of_the_original(parts, tmp_path, monkeypatch):
    tokenizer, transformer = parts
    transformer = DiT(
        **{key: value for key, value in transformer.config.items() if not key.startswith("_")}
        | {"beta_schedule": "linear"}
    )
    monkeypatch.setattr(assembly, "load_model", lambda *_: transformer)
    (tmp_path / "DiT.pt").touch()
    made = assembly.assemble(tokenizer, tmp_path / "DiT.pt", LABELS, resolution=64)
    assert made.scheduler.config.beta_schedule == "linear"
    with pytest.raises(UserError, match="trained with linear betas, the scheduler has squaredcos_cap_v2"):
        CATPipeline(tokenizer, transformer, paper_schedule(), labels=LABELS, resolution=64)
    with pytest.raises(UserError, match="training saves it next to the model"):
        assembly.assemble(tokenizer, tmp_path, LABELS, resolution=64)


@pytest.mark.parametrize("force", [True, False])
def test_a_tokenizer_in_float16_decodes_in_float32_if_its_config_asks_for_it(parts, monkeypatch, force):
    pipeline = CATPipeline(*copy.deepcopy(parts), paper_schedule(), labels=LABELS, resolution=64)
    pipeline.vae.register_to_config(force_upcast=force)
    decode, seen = pipeline.vae.decode, []

    def recorded(z, ratio):
        seen.append((z.dtype, pipeline.vae.dtype))
        return decode(z, ratio)

    monkeypatch.setattr(pipeline.vae, "decode", recorded)
    pipeline.to(torch.float16)
    pipeline(1, ratio=16, **FAST)
    dtype = torch.float32 if force else torch.float16
    assert seen == [(dtype, dtype)]
    assert pipeline.vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": ["newspaper pag"]}, r"the closest are \['newspaper page'"),
        ({"prompts": [3]}, r"class 3: expected 0 \.\. 2"),
        ({"prompts": ["village street"], "ratio": 4}, "ratio 4: expected 'auto' or one of 8, 16, 32"),
        (
            {"prompts": ["village street"], "ratio": 32, "height": 100},
            "height of 100 px: expected a multiple of 64 px at 32x .*, such as 64 or 128",
        ),
        ({"prompts": [1], "ratio": 8, "width": 72}, "width of 72 px: .*multiple of 16 px.* 64 or 80"),
        ({"prompts": [1], "height": 0}, "height of 0 px"),
        ({"prompts": [1], "mean_tokens": 9, "width": 96}, "width of 96 px: .* at 32x"),
        ({"prompts": ["village street"], "scheduler": "euler"}, "got 'euler'"),
        ({"prompts": ["a cat asleep"]}, "none of the 3 classes; .* trained without text"),
        ({"prompts": [Description("a cat asleep")]}, "'a cat asleep' is none of the 3 classes"),
        ({"prompts": [1, 0], "ratio": 8, "max_tokens": 31}, "image 0 at 8x has 16 tokens, 32 with"),
        ({"prompts": [0], "mean_tokens": 0.5}, "expected at least 1: images of 64 px cost 1 tokens"),
        ({"prompts": [0], "mean_tokens": 4, "ratio": 8}, "expected ratio or mean_tokens"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [0, 1], "generator": [torch.Generator()]}, "one per image, 2 in all, got 1"),
        ({"prompts": [0], "output_type": "jpeg"}, "output_type 'jpeg': expected 'pil' or 'np'"),
        ({"prompts": [0], "guidance_channels": 9}, r"guidance_channels: expected 1 \.\. 4, .*, got 9"),
        ({"prompts": [0], "num_inference_steps": 1001}, r"expected 1 \.\. 1000, got 1001"),
    ],
)
def test_invalid_calls_are_refused(pipeline, call, message):
    with pytest.raises(UserError, match=message):
        pipeline(**FAST | call)


@pytest.mark.parametrize("mean_tokens", [1, 2.5, 6, 7, 16, 100])
def test_a_budget_is_kept_and_complex_images_get_more_of_it(pipeline, mean_tokens):
    requests = pipeline.plan(LABELS * 4, mean_tokens=mean_tokens, seed=5)
    tokens = [request.num_tokens for request in requests]
    assert [request.seed for request in requests] == list(range(5, 17))
    best = max(
        16 * a + 4 * b + (12 - a - b)
        for a in range(13)
        for b in range(13 - a)
        if 16 * a + 4 * b + (12 - a - b) <= 12 * mean_tokens
    )
    assert sum(tokens) == best
    by_label = [sum(tokens[i::3]) for i in range(3)]
    assert by_label == sorted(by_label)


def test_a_budget_counts_the_tokens_of_non_square_images(pipeline):
    requests = pipeline.plan(LABELS, mean_tokens=18, height=64, width=192)  # 48, 12 or 3 tokens each
    assert [request.num_tokens for request in requests] == [3, 3, 48]


def test_the_budget_that_auto_spends_gives_the_ratios_of_auto(pipeline):
    auto = [request.ratio for request in pipeline.plan(LABELS)]
    spent = sum(request.num_tokens for request in pipeline.plan(LABELS)) / 3
    assert [request.ratio for request in pipeline.plan(LABELS, mean_tokens=spent)] == auto


def test_a_transformer_of_one_ratio_draws_at_that_ratio(parts):
    tokenizer, _ = parts
    transformer = DiT(
        in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=3, position_frame=4, ratios=(16,)
    )
    fixed = CATPipeline(tokenizer, transformer, paper_schedule(), labels=LABELS, resolution=64)
    assert [request.ratio for request in fixed.plan(LABELS)] == [16] * 3
    assert [request.ratio for request in fixed.plan(LABELS, mean_tokens=9)] == [16] * 3
    with pytest.raises(UserError, match="expected at least 4"):
        fixed.plan(LABELS, mean_tokens=3)


def test_a_batch_drawn_again_gives_the_same_bits(pipeline):
    requests = pipeline.plan(LABELS * 3, seed=3)
    batches = pipeline.batches(requests, max_tokens=64)
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    assert len(batches) > 1
    assert all(2 * sum(requests[i].num_tokens for i in batch) <= 64 for batch in batches)
    expected = pixels(pipeline(LABELS * 3, generator=seeded(3, 9), max_tokens=64, **FAST))
    for batch in reversed(batches):
        for i, image in zip(batch, pipeline.draw([requests[i] for i in batch], **FAST), strict=True):
            assert np.array_equal(np.asarray(image), expected[i])


def test_an_image_without_guidance_needs_room_for_its_own_tokens_only(pipeline):
    large = SampleRequest(label=0, ratio=8, grid=(16, 16), seed=0)
    small = SampleRequest(label=0, ratio=32, grid=(4, 4), seed=1)
    options = {"guidance_scale": {8: 1.0, 16: 3.0, 32: 3.0}, "max_tokens": 256}
    assert sorted(pipeline.batches([large, small], **options)) == [[0], [1]]
    with pytest.raises(UserError, match="image 0 at 8x has 256 tokens; raise it to at least 256"):
        pipeline.batches([large, small], **options | {"max_tokens": 255})
    with pytest.raises(UserError, match="image 0 at 32x has 16 tokens, 32 with the unconditional copy"):
        pipeline.batches([small], **options | {"max_tokens": 31})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": LABELS[:2]}, "3 classes: expected as many different labels, got 2"),
        ({"labels": [1, 2, 3]}, "labels: expected a sequence of strings"),
        ({"thresholds": (1, 2, 3)}, "thresholds: expected two scores"),
        ({"resolution": "big"}, "resolution 'big': expected a number of pixels"),
        ({"descriptions": DESCRIPTIONS[:2]}, "one description per label, 3 in all, got 2"),
        ({"descriptions": [{"words": "sky"}] * 3}, "descriptions: expected caption"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected at least 1, got 0"),
        ({"guidance_scale": {8: 2.0}}, "guidance"),
        ({"guidance_scale": {"all": 2.0}}, "expected a number, or one per ratio"),
    ],
)
def test_invalid_settings_are_refused(parts, settings, message):
    with pytest.raises(UserError, match=message):
        CATPipeline(*parts, paper_schedule(), **{"labels": LABELS} | settings)


def test_settings_have_defaults(parts):
    """Class numbers as labels, and the resolution that fills the frame of positions: 4 x 8 x 2 px."""
    made = CATPipeline(*parts, paper_schedule())
    assert (made.labels, made.resolution) == (["0", "1", "2"], 64)
    assert isinstance(made.thresholds, RatioThresholds)
    assert made.descriptions[1] == Description.from_label("1")
    assert (made.default_steps, made.default_guidance) == (250, 1.5)


def test_a_saved_pipeline_keeps_its_own_steps_and_guidance(parts, tmp_path):
    guidance = {8: 1.0, 16: 2.0, 32: 4.0}
    settings = {"labels": LABELS, "num_inference_steps": 2, "guidance_scale": guidance}
    CATPipeline(*parts, paper_schedule(), **settings).save_pretrained(tmp_path)
    loaded = CATPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.default_steps, loaded.default_guidance) == (2, guidance)
    steps = []
    options = {
        "generator": seeded(0, 3),
        "callback_on_step_end": lambda *given: steps.append(given[1]) or {},
    }
    drawn = loaded(LABELS, **options)
    assert steps == [0, 1]
    given = loaded(LABELS, generator=seeded(0, 3), num_inference_steps=2, guidance_scale=guidance)
    assert np.array_equal(pixels(drawn), pixels(given))
    other = loaded(LABELS, generator=seeded(0, 3), num_inference_steps=2, guidance_scale=6.0)
    assert not np.array_equal(pixels(drawn), pixels(other))


def test_decoded_images_that_overflow_are_refused(pipeline, monkeypatch):
    overflow = DecoderOutput(sample=torch.full((1, 3, 64, 64), float("inf")))
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, ratio: overflow)
    with pytest.raises(UserError, match=r"NaN or infinite values in torch\.float32"):
        pipeline(["village street"], ratio=16, **FAST)
