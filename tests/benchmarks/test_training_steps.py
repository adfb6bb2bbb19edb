"""Training steps from end to end: rates follow from images, tokens and FLOPs; MFU only with a known peak."""

import json

import pytest
import torch

from benchmarks import packing, training_steps
from benchmarks.shared import steps
from benchmarks.shared.steps import Generation, Step, TransformerTraining
from benchmarks.training_steps import Group
from cat_fast import hardware
from tests.tokenizer.test_autoencoder import tiny


def step(run=lambda: None, images=1, tokens=1.0, flops=1.0):
    return Step(run=run, images=images, tokens=tokens, flops=flops, precision="fp32")


def test_rates_follow_from_the_seconds_of_a_step(monkeypatch):
    one = Step(run=lambda: None, images=4, tokens=1024, flops=8e12, precision="bf16")
    found = training_steps.figures(one, [2.0, 1.0, 4.0])
    assert found["rates"] == {"images": 2.0, "tokens": 512.0}
    assert found["flops_per_image"] == 2e12
    assert found["gflops_per_second"] == pytest.approx(4000)
    assert found["mfu"] is None
    monkeypatch.setattr(training_steps.hardware, "gpu_in_use", lambda: hardware.GPUS["A100-SXM4-80GB"])
    assert training_steps.figures(one, [2.0])["mfu"] == pytest.approx(8e12 / 2 / 312e12)


def test_an_image_takes_the_seconds_of_its_steps():
    made = {"denoise": step(images=4, flops=8e9), "decode": step(flops=1e9)}
    taken = {"denoise": [8.0, 4.0], "decode": [1.0, 1.0]}
    found = training_steps.total({"denoise": 10, "decode": 1}, made, taken)
    assert found["seconds"]["ours"]["median"] == pytest.approx((21 + 11) / 2)
    assert found["rates"] == {"images": pytest.approx(1 / 16)}
    assert found["flops_per_image"] == pytest.approx(21e9)


def test_rounds_alternate_after_one_that_measures_memory(monkeypatch):
    order = []

    def make(name):
        return lambda shared: step(run=lambda: order.append(name + shared))

    peaks = iter((10, 30))
    monkeypatch.setattr(training_steps.machine, "peak_bytes", lambda run: run() or next(peaks))
    group = Group(setup=lambda: "!", steps={"a": make("a"), "b": make("b")}, totals={"ab": {"a": 1, "b": 2}})
    *_, found = training_steps.measure(group, rounds=2)
    assert order == ["a!", "b!", "b!", "a!", "a!", "b!"]
    assert found["a"]["seconds"]["ours"].keys() == {"median", "low", "high"}
    assert [found[name]["peak_bytes"]["ours"] for name in ("a", "b", "ab")] == [10, 30, 30]
    assert found["ab"]["composed_of"] == {"a": 1, "b": 2}


def test_the_file_of_a_run_that_failed_has_its_rounds_and_names_the_missing_cases(tmp_path, monkeypatch):
    def fail():
        if calls.append(1) or len(calls) == 3:
            raise RuntimeError("out of memory")

    calls = []
    groups = [Group(setup=lambda: None, steps={name: lambda _: step(run=fail)}) for name in "ab"]
    monkeypatch.setattr(training_steps, "groups", lambda quick: groups)
    out = tmp_path / "steps.json"
    with pytest.raises(RuntimeError):
        training_steps.main(["--json", str(out)])
    written = json.loads(out.read_text())
    assert written["cases"]["a"]["images"] == 1
    assert written["about"]["missing"] == ["a", "b"]
    assert training_steps.main(["--json", str(out), "--only", "a"]) == 0
    about = json.loads(out.read_text())["about"]
    assert (about["missing"], "quick" in about) == (["b"], False)
    assert training_steps.main(["--json", str(out), "--quick"]) == 0
    about = json.loads(out.read_text())["about"]
    assert ("missing" in about, about["quick"]) == (False, True)


def test_fixed_ratios_and_the_mix_are_compared_in_training_and_generation():
    names = {name for group in training_steps.groups(False) for name in (*group.steps, *group.totals)}
    for use in ("train.tokenizer", "train.transformer", "generate"):
        assert {f"{use}.{kind}" for kind in ("fixed_8x", "fixed_16x", "fixed_32x", "mix")} <= names
    assert {sum(lengths) for lengths in training_steps.batches(4096).values()} == {4096}
    chosen = [group.only("generate.mix") for group in training_steps.groups(False)]
    assert {*chosen[-1].steps} == {"denoise.mix", "decode.8x", "decode.16x", "decode.32x"}
    assert not any(group.steps for group in chosen[:-1])


def test_an_unknown_case_is_an_error(capsys):
    assert training_steps.main(["--only", "nothing"]) == 2
    assert "expected part of one of tokenizer.nano.8x" in capsys.readouterr().err


def test_steps_of_training_and_generation_run_at_toy_size(monkeypatch):
    toy = packing.MODEL | {"in_channels": 4, "hidden_size": 32, "num_heads": 2, "depth": 1}
    monkeypatch.setattr(steps, "transformer_arguments", lambda config: toy)
    monkeypatch.setattr(steps, "cat_tokenizer", lambda: tiny().eval())
    monkeypatch.setattr(steps, "SIDE", 64)
    lengths = [16, 4, 4]
    trained = TransformerTraining("toy").step(lengths, side=64)
    generation = Generation("toy")
    denoised, decoded = generation.denoise(lengths, side=64), generation.decode(16)
    for one in (trained, denoised, decoded):
        one.run()
    assert trained.images == denoised.images == 3
    assert trained.tokens == denoised.tokens == 24
    assert trained.flops == pytest.approx(1.5 * denoised.flops, rel=0.05)  # 3 passes against 2
    # torch counts no attention on CPUs: 16 positions, twice a product of 16 x 16 x 16
    assert decoded.flops == steps.count_flops(decoded.run) + 2 * 2 * 16**3


def test_decoding_with_heads_of_one_dimension_counts_what_is_executed(monkeypatch):
    monkeypatch.setattr(steps, "cat_tokenizer", lambda: tiny(mid_block_attention_head_dim=1).eval())
    monkeypatch.setattr(steps, "SIDE", 128)
    monkeypatch.setattr(steps.Generation, "__init__", lambda self: None)
    decoded = Generation().decode(8)
    with steps.META:
        literal, one_head, latent = steps.cat_tokenizer(), tiny().eval(), torch.empty(1, 4, 16, 16)
    products = steps.count_flops(lambda: literal.decode(latent, 8))
    # 256 positions of 16 heads attend to 64 nodes, with two products
    assert products - decoded.flops == 2 * 2 * 16 * 256 * (256 - 64)
    one_head_products = steps.count_flops(lambda: one_head.decode(latent, 8))
    assert steps.decoder_flops(one_head, latent, 8) == one_head_products
