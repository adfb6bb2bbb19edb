"""CATPipeline: a label becomes an image at the ratio its complexity earns, the same one each time."""

import json
import shutil
import socket

import numpy as np
import pytest
import torch

from cat_fast.complexity import Description, RatioThresholds
from cat_fast.errors import UserError
from cat_fast.generator import DiT, paper_schedule
from cat_fast.inference import CATPipeline
from cat_fast.tokenizer import NestedAutoencoderKL

LABELS = ["clear blue sky", "village street", "newspaper page"]
DESCRIPTIONS = [
    Description("a clear blue sky"),
    Description("several people walking down a village street past shops and parked bicycles"),
    Description("a newspaper page with columns of text, tables and many photographs", True, True),
]
FAST = {"steps": 4, "scheduler": "ddim"}


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = NestedAutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_num_layers=1,
        mid_block_attention_head_dim=8,
    )
    generator = DiT(
        in_channels=4, hidden_size=48, depth=1, num_heads=2, num_classes=3, position_frame=4,
        shift_factor=[0.3, -0.1, 0.0, 0.2], scaling_factor=[0.5, 1.0, 2.0, 0.8],
        tokenizer_fingerprint=tokenizer.fingerprint(),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in generator.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return tokenizer, generator


@pytest.fixture
def pipeline(parts):
    return CATPipeline(
        *parts, paper_schedule(), LABELS, RatioThresholds(3, 7), resolution=64, descriptions=DESCRIPTIONS
    )


def pixels(output):
    return [np.asarray(image).astype(int) for image in output.images]


def test_every_ratio_gives_an_image_of_the_asked_size(pipeline):
    for ratio, tokens in ((8, 16), (16, 4), (32, 1)):
        output = pipeline(["village street"], ratio=ratio, **FAST)
        assert (output.images[0].size, output.images[0].mode) == ((64, 64), "RGB")
        assert (output.ratios, output.tokens) == ([ratio], [tokens])
    assert pipeline("village street", ratio=16, size=128, **FAST).images[0].size == (128, 128)


def test_auto_spends_more_tokens_on_what_is_complex(pipeline):
    output = pipeline(LABELS, **FAST)
    assert output.ratios[0] == 32
    assert output.ratios[2] == 8
    assert output.tokens[0] <= output.tokens[1] <= output.tokens[2]


def test_an_image_depends_on_its_seed_and_not_on_its_neighbours(pipeline):
    together = pixels(pipeline(LABELS * 2, seed=10, guidance=2.0, **FAST))
    for i, label in enumerate(LABELS * 2):
        (alone,) = pixels(pipeline([label], seed=10 + i, guidance=2.0, **FAST))
        assert np.abs(alone - together[i]).max() <= 1  # one level of rounding
    cut_up = pixels(pipeline(LABELS * 2, seed=10, guidance=2.0, max_tokens=32, **FAST))
    for one, other in zip(together, cut_up, strict=True):
        assert np.abs(one - other).max() <= 1
    assert np.abs(together[2] - together[5]).max() > 1


def test_latents_are_put_back_into_the_tokenizers_scale(pipeline, monkeypatch):
    seen = []
    decode = pipeline.tokenizer.decode
    monkeypatch.setattr(pipeline.tokenizer, "decode", lambda z, ratio: seen.append(z) or decode(z, ratio))
    monkeypatch.setattr(
        "cat_fast.inference.pipeline.cat_pipeline.sample", lambda *_, **__: [torch.full((4, 4, 4), 2.0)]
    )
    pipeline(["village street"], ratio=16, **FAST)
    expected = torch.tensor([2 / 0.5 + 0.3, 2 / 1.0 - 0.1, 2 / 2.0 + 0.0, 2 / 0.8 + 0.2])
    torch.testing.assert_close(seen[0], expected.view(1, 4, 1, 1).expand(1, 4, 4, 4))


def test_a_saved_pipeline_draws_the_same_images(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = CATPipeline.from_pretrained(tmp_path)
    assert (loaded.labels, loaded.thresholds, loaded.resolution) == (LABELS, RatioThresholds(3, 7), 64)
    assert loaded.descriptions == DESCRIPTIONS
    for one, other in zip(pixels(pipeline(LABELS, **FAST)), pixels(loaded(LABELS, **FAST)), strict=True):
        assert np.array_equal(one, other)


def test_progress_counts_the_steps_of_all_batches(pipeline):
    seen = []
    pipeline(
        [1, 1, 1], ratio=8, max_tokens=32, on_step=lambda done, total: seen.append((done, total)), **FAST
    )
    assert seen == [(i, 12) for i in range(1, 13)]


def test_a_folder_that_is_no_pipeline_is_refused(pipeline, tmp_path):
    with pytest.raises(UserError, match=r"is no pipeline: pipeline\.json is missing"):
        CATPipeline.from_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "generator" / "config.json").unlink()
    with pytest.raises(UserError, match="is no whole pipeline"):
        CATPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["tokenizer", "generator", "scheduler"])
def test_a_missing_part_is_named_and_asked_of_nobody(pipeline, tmp_path, monkeypatch, part):
    """`pipe/generator` could be the name of a model on a hub."""
    monkeypatch.chdir(tmp_path)
    for target, name in ((socket, "getaddrinfo"), (socket.socket, "connect")):
        monkeypatch.setattr(target, name, lambda *_, **__: pytest.fail("asked the network"))
    pipeline.save_pretrained("pipe")
    shutil.rmtree(f"pipe/{part}")
    with pytest.raises(UserError, match=f"pipe is no whole pipeline: pipe/{part}"):
        CATPipeline.from_pretrained("pipe")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("generator/config.json", '"hidden_size": 48', '"hidden_size": 32'),
        ("generator/config.json", '"num_heads": 2', '"num_heads": 5'),
        ("generator/config.json", '"depth": 1', '"depth": 2'),  # half of the weights are not there
        ("tokenizer/config.json", '"latent_channels": 4', '"latent_channels": 6'),
        ("scheduler/scheduler_config.json", "squaredcos_cap_v2", "no such schedule"),
        ("pipeline.json", '"thresholds": [', '"thresholds": [1, '),
        ("pipeline.json", '"resolution": 64', '"resolution": null'),
    ],
)
def test_parts_that_do_not_fit_their_settings_are_refused(pipeline, tmp_path, file, old, new):
    pipeline.save_pretrained(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    with pytest.raises(UserError, match="is no whole pipeline") as caught:
        CATPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_refused(pipeline, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        pipeline.save_pretrained(tmp_path / "file")


def test_a_generator_of_another_tokenizer_is_refused(parts, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    config = tmp_path / "generator" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_fingerprint": "another"}))
    with pytest.raises(UserError, match="trained on latents of tokenizer another"):
        CATPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": ["newspaper pag"]}, r"near it are \['newspaper page'"),
        ({"prompts": [3]}, r"class 3: expected 0 \.\. 2"),
        ({"prompts": ["village street"], "ratio": 4}, "ratio 4: expected 'auto' or one of 8, 16, 32"),
        ({"prompts": ["village street"], "ratio": 32, "size": 96}, "multiple of 64"),
        ({"prompts": ["village street"], "scheduler": "euler"}, "got 'euler'"),
        ({"prompts": ["a cat asleep"]}, "none of the 3 classes; .* trained without text"),
        ({"prompts": [Description("a cat asleep")]}, "'a cat asleep' is none of the 3 classes"),
        ({"prompts": [1, 0], "ratio": 8, "max_tokens": 31}, "image 0 at 8x has 16 tokens, 32 with"),
        ({"prompts": [0], "mean_tokens": 0.5}, "expected at least 1: the cost of an image of 64 px"),
        ({"prompts": [0], "mean_tokens": 4, "ratio": 8}, "one of them is enough"),
        ({"prompts": []}, "no label"),
    ],
)
def test_calls_that_cannot_be_met_are_refused(pipeline, call, message):
    with pytest.raises(UserError, match=message):
        pipeline(**FAST | call)


@pytest.mark.parametrize("mean_tokens", [1, 2.5, 6, 7, 16, 100])
def test_a_budget_is_kept_and_the_complex_get_more_of_it(pipeline, mean_tokens):
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


def test_the_budget_that_auto_spends_gives_autos_ratios(pipeline):
    auto = [request.ratio for request in pipeline.plan(LABELS)]
    spent = sum(request.num_tokens for request in pipeline.plan(LABELS)) / 3
    assert [request.ratio for request in pipeline.plan(LABELS, mean_tokens=spent)] == auto


def test_a_generator_of_one_ratio_draws_at_that(parts):
    tokenizer, _ = parts
    generator = DiT(
        in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=3, position_frame=4, ratios=(16,)
    )
    fixed = CATPipeline(tokenizer, generator, paper_schedule(), LABELS, RatioThresholds(3, 7), resolution=64)
    assert [request.ratio for request in fixed.plan(LABELS)] == [16] * 3
    assert [request.ratio for request in fixed.plan(LABELS, mean_tokens=9)] == [16] * 3
    with pytest.raises(UserError, match="expected at least 4"):
        fixed.plan(LABELS, mean_tokens=3)


def test_a_batch_is_drawn_to_the_same_bits_again(pipeline):
    requests = pipeline.plan(LABELS * 3, seed=3)
    batches = pipeline.batches(requests, max_tokens=64)
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    assert len(batches) > 1
    assert all(2 * sum(requests[i].num_tokens for i in batch) <= 64 for batch in batches)
    whole = pixels(pipeline(LABELS * 3, seed=3, max_tokens=64, **FAST))
    for batch in reversed(batches):
        for i, image in zip(batch, pipeline.draw([requests[i] for i in batch], **FAST), strict=True):
            assert np.array_equal(np.asarray(image), whole[i])


def test_labels_must_match_the_generator(parts):
    with pytest.raises(UserError, match="3 classes: expected as many different labels, got 2"):
        CATPipeline(*parts, paper_schedule(), LABELS[:2], RatioThresholds(3, 7), resolution=64)
