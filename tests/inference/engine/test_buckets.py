"""Steps in buckets, as on a GPU: the same bits, few graphs, and padding that counts against fill."""

import random

import pytest
import torch

from cat_fast.generator.captured_step import CapturedStep
from cat_fast.inference.engine import PackedEngine
from cat_fast.inference.engine.stages import Stages
from tests.generator.test_captured_step import OnBuffers
from tests.inference.engine.mixes import alone, random_request, tiny_pipeline
from tests.inference.engine.test_engine import request
from tests.inference.tiny_encoder import save_encoder


def captured_stages(pipeline):
    stages = Stages(pipeline, buckets=True)
    stages.captured = CapturedStep(pipeline.transformer, OnBuffers)
    return stages


@pytest.mark.parametrize("text", [False, True])
def test_images_have_the_bits_of_steps_without_buckets(tmp_path, text):
    pipeline = tiny_pipeline(save_encoder(tmp_path) if text else None)
    rng = random.Random(4)
    requests = [random_request(rng, text=text) for _ in range(12)]
    stages = captured_stages(pipeline)
    engine = PackedEngine(pipeline, 64, stages=stages)
    handles = [engine.submit(one) for one in requests]
    engine.run()
    for one, handle in zip(requests, handles, strict=True):
        assert torch.equal(handle.result().latent, alone(pipeline, one).latent)
    report = stages.captured.report
    assert report.failure is None
    assert report.replayed > report.graphs > 0


def test_equal_requests_stay_in_one_bucket(pipeline):
    stages = captured_stages(pipeline)
    engine = PackedEngine(pipeline, 64, stages=stages)
    handles = [engine.submit(request(8, seed=seed, num_inference_steps=6)) for seed in range(4)]
    engine.run()
    assert all(handle.done() for handle in handles)
    report = stages.captured.report
    assert (report.graphs, report.eager) == (1, 1)
    assert report.replayed == engine.statistics.steps - 1


def test_padding_counts_against_fill(pipeline):
    engine = PackedEngine(pipeline, 128, stages=captured_stages(pipeline))
    engine.submit(request(8))
    reports = [engine.step() for _ in range(3)]
    assert [(report.rows, report.filled_rows) for report in reports] == [(32, 256)] * 3
    totals = engine.statistics
    assert (totals.rows, totals.filled_rows, totals.max_rows) == (96, 768, 768)  # not the budget, 3 * 128
    assert totals.fill == pytest.approx(1 / 8)
    assert totals.padding == pytest.approx(7 / 8)


def test_a_cpu_runs_eagerly_without_buckets(pipeline):
    stages = Stages(pipeline)
    assert (stages.buckets, stages.captured) == (False, None)
