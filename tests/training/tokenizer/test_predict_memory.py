"""Live bytes counted on fake tensors equal those of real tensors at any batch size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from cat_fast.config import fill, read_yaml
from cat_fast.hardware import GIB, MEMORY_BYTES
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.tokenizer.live_bytes import LiveBytes
from cat_fast.training.tokenizer.predict_memory import (
    MemoryPlan,
    StepMemory,
    Zero,
    plan_memory,
    trace,
)
from cat_fast.training.tokenizer.synthetic_step import Workload
from tests.training.tokenizer.balanced_worker import ROOT, live_bytes

MIB = 2**20
SMALL = [
    "model.block_out_channels=[16,16,32,32,64,64]",
    "model.norm_num_groups=4",
    "model.mid_block_attention_head_dim=64",
    "data.image_size=64",
    "loss.r1_weight=1.0",
]


def settings(*overrides):
    return fill(TokenizerRun, read_yaml(ROOT / "configs/tokenizer/nano.yaml"), [*SMALL, *overrides])


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_tensors_count_until_they_are_freed_and_views_do_not():
    weight = torch.ones(512, 512)
    with LiveBytes([weight]) as counter:
        first = torch.ones(512, 512)
        product = first @ weight.t()
        view = product.view(-1)
        view.add_(1)
        assert counter.live == 2 * MIB
        del product
        assert counter.live == 2 * MIB, "the view keeps it alive"
        del view, first
        assert counter.live == 0
        counter.hold(MIB)
        torch.ones(4, 512, 512)
        counter.hold(-MIB)
    assert counter.peak == 5 * MIB
    assert counter.live == 0


def test_tensors_for_the_backward_pass_are_alive_until_it_ran():
    x = torch.rand(1, 4, 128, 128)
    weight = torch.rand(8, 4, 3, 3, requires_grad=True)
    with LiveBytes([x, weight]) as counter:
        y = F.conv2d(x, weight, padding=1)
        loss = y.square().sum()
        del y
        assert counter.live == 8 * 128 * 128 * 4 + 4, "the square's backward pass needs y"
        loss.backward()
        assert counter.live == weight.grad.nbytes + 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_have_the_live_bytes_of_real_ones(checkpointing):
    config = settings(f"gradient_checkpointing={checkpointing}")
    real = trace(Workload(config, "cpu"), 16, 2)
    with FakeTensorMode():
        fake = trace(Workload(config, "cpu"), 16, 2)
    assert max(fake) == max(real)
    assert fake[-1] == real[-1]


def test_prediction_equals_the_allocator_peak_of_a_real_step(tmp_path):
    """The reference is torch's profiler on a step of plain torch, without ZeRO."""
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 0}}')
    config = settings("data.image_size=96", f"deepspeed={tmp_path / 'zero.json'}")
    predicted = plan_memory(config)
    workload = Workload(config, "cpu")
    assert predicted.steps.keys() == {8, 16, 32}
    for ratio, step in predicted.steps.items():
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile:
            batch = workload.batch(ratio, 4)
            reconstructions = workload.reconstruct(batch)
            workload.model.zero_grad()
            workload.discriminate(batch, reconstructions, r1=True)
            workload.discriminator.zero_grad()
            del batch, reconstructions
        assert step.peak(4) == pytest.approx(max(live_bytes(profile)), rel=0.01)


@pytest.mark.slow
def test_two_small_batches_determine_larger_ones():
    config = settings("model.ratios=[8,16]")
    predicted = plan_memory(config).steps[8]
    zero = Zero.of_run(config, ranks=1)
    with FakeTensorMode():
        counted = trace(Workload(config, "cpu"), 8, 7, zero)
    assert predicted.peak(7) == max(counted)


@pytest.mark.slow
def test_checkpointing_and_bf16_reduce_memory():
    plain, checkpointed, bf16 = (
        plan_memory(settings("model.ratios=[8]", *setting)).steps[8]
        for setting in ([], ["gradient_checkpointing=true"], ["precision=bf16"])
    )
    assert checkpointed.slope.max() < 0.8 * plain.slope.max()
    assert bf16.slope.max() < 0.8 * plain.slope.max()


@pytest.mark.slow
def test_zero_partitions_optimizer_states():
    config = settings("model.ratios=[8]")
    single, shared = plan_memory(config, ranks=1).at_rest, plan_memory(config, ranks=8).at_rest
    workload = Workload(config, "cpu")
    trained = parameters(workload.model) + parameters(workload.discriminator)
    assert single["weights"] == shared["weights"] == 4 * trained
    assert single["optimizer"] == 8 * trained
    assert shared["optimizer"] == pytest.approx(trained, abs=16)
    assert shared["master weights"] == pytest.approx(trained / 2, abs=16)
    assert single["EMA"] == 4 * parameters(workload.model)
    assert single["frozen networks, buffers"] == sum(tensor.nbytes for tensor in workload.frozen)


@pytest.mark.slow
def test_a_frozen_encoder_has_no_gradients_and_no_optimizer_state():
    config = settings("model.ratios=[8]", "initial_weights=model", "train_only=decoder")
    plan, full = plan_memory(config), plan_memory(settings("model.ratios=[8]"))
    model = Workload(config, "cpu").model
    fixed = parameters(model.encoder) + parameters(model.quant_conv)
    assert full.at_rest["optimizer"] - plan.at_rest["optimizer"] == 8 * fixed
    assert plan.at_rest["EMA"] == full.at_rest["EMA"]
    assert plan.steps[8].slope.max() < full.steps[8].slope.max()  # the encoder keeps no activations


@pytest.mark.parametrize(
    ("stage", "rest", "kept"),
    [(0, 4 + 8, 4), (1, 4 + (4 + 8) / 4, 4), (2, 4 + (4 + 8) / 4, 1)],
)
def test_each_zero_stage_holds_less(stage, rest, kept):
    zero = Zero.from_config({"zero_optimization": {"stage": stage, "reduce_bucket_size": 10}}, ranks=4)
    assert sum(zero.at_rest(1000).values()) == rest * 1000
    assert zero.gradient_bytes(1000) == kept * 1000
    assert zero.bucket_bytes == (40 if stage else 0)
    overlapping = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 10, "overlap_comm": True}}
    assert Zero.from_config(overlapping, ranks=4).bucket_bytes == (80 if stage else 0)


def test_largest_batch_is_the_last_that_fits():
    steps = {8: StepMemory(np.array([0.0, GIB]), np.array([2.0 * GIB, GIB]), minimum=3 * GIB)}
    predicted = MemoryPlan(at_rest={"weights": 5 * GIB}, steps=steps)
    assert predicted.peak(8, 1) == 8 * GIB
    assert predicted.peak(8, 4) == 13 * GIB
    for size in MEMORY_BYTES.values():
        n = predicted.largest_batch(8, size)
        assert (5 + 2 * n) * GIB <= 0.9 * size < (5 + 2 * (n + 1)) * GIB
    assert predicted.largest_batch(8, 5 * GIB) == 0
