"""PackedEngine: packing of steps, admission, failures, accounting and threads."""

import asyncio
import dataclasses
import gc
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.errors import UserError
from cat_fast.generator import DiT, SampleRequest
from cat_fast.generator.step_pack import SHORTEST
from cat_fast.inference.engine import (
    Cancelled,
    CostAware,
    DeadlineUnreachable,
    Draining,
    EngineRequest,
    FifoPacked,
    PackedEngine,
    QueueFull,
    admission,
)
from cat_fast.inference.engine.forecast import finish_seconds
from cat_fast.inference.engine.stages import Stages
from tests.inference.engine.mixes import alone

GRID = {8: (4, 4), 16: (2, 2), 32: (1, 1)}


def request(ratio=16, seed=0, **changes):
    sample = SampleRequest(label=1, ratio=ratio, grid=GRID[ratio], seed=seed)
    values = {"sample": sample, "num_inference_steps": 3, "scheduler": "ddim", "guidance_scale": 2.0}
    return EngineRequest(**values | {"decode": False} | changes)


@pytest.fixture
def passes(monkeypatch):
    """The packed sequences of every forward pass."""
    seen, forward = [], DiT.forward

    def recorded(self, packed, *arguments, **options):
        if packed.device.type != "meta":  # FLOPs are counted there
            seen.append(packed)
        return forward(self, packed, *arguments, **options)

    monkeypatch.setattr(DiT, "forward", recorded)
    return seen


def test_one_pass_mixes_ratios_steps_schedulers_and_guidance(pipeline, passes):
    engine = PackedEngine(pipeline, 100)
    handles = [
        engine.submit(request(8, num_inference_steps=2, scheduler="ddpm")),
        engine.submit(request(16, guidance_scale=1.0, num_inference_steps=4)),
        engine.submit(request(32, scheduler="dpm++")),
    ]
    report = engine.step()
    assert {place.id for place in report.requests} == {handle.id for handle in handles}  # in order of cost
    assert (report.rows, len(passes)) == (2 * 16 + 4 + 2, 1)
    engine.run()
    assert [handle.result().record.steps_done for handle in handles] == [2, 4, 3]
    assert len(passes) == 4


@pytest.mark.parametrize(("buckets", "bound"), [(False, 16), (True, SHORTEST)])
def test_the_longest_sequence_of_a_pack_is_not_its_total(pipeline, passes, buckets, bound):
    """It is an integer of the host: the exact length, or the smallest bucket of lengths that has room."""
    engine = PackedEngine(pipeline, 400, stages=Stages(pipeline, buckets=buckets))
    for ratio in (8, 8, 8, 8, 16, 32):
        engine.submit(request(ratio))
    engine.run()
    assert len(passes) == 3
    for packed in passes:
        assert type(packed.max_seqlen) is int
        assert int(packed.cu_seqlens[: 2 * 6 + 1].diff().max()) == 16
        assert int(packed.cu_seqlens.diff().max()) <= packed.max_seqlen == bound < packed.num_tokens


def test_a_request_joins_the_next_step(pipeline):
    engine = PackedEngine(pipeline, 100)
    first = engine.submit(request(8, num_inference_steps=4))
    engine.step()
    second = engine.submit(request(32))
    assert engine.step().handles == (first, second)


def test_images_too_large_for_the_budget_are_refused(pipeline):
    engine = PackedEngine(pipeline, 16)
    engine.submit(request(8, guidance_scale=1.0))
    with pytest.raises(UserError, match=r"max_tokens 16 is too small: .* 32 with the unconditional copy"):
        engine.submit(request(8))
    with pytest.raises(UserError, match="at least 1, got 0"):
        PackedEngine(pipeline, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 0}, "expected at least 1, got 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale inf"),
        ({"deadline": 0.0}, "deadline: expected a positive"),
        ({"preview_every": -1}, "preview_every"),
    ],
)
def test_invalid_requests(changes, message):
    with pytest.raises(UserError, match=message):
        request(**changes)


def test_more_steps_than_the_scheduler_has_are_refused_at_submission(pipeline):
    engine = PackedEngine(pipeline, 100)
    with pytest.raises(UserError, match=r"expected 1 \.\. 1000, got 1001"):
        engine.submit(request(num_inference_steps=1001))
    with pytest.raises(UserError, match="got 'euler'"):
        engine.submit(request(scheduler="euler"))
    assert engine.statistics.submitted == engine.unfinished == 0


def test_a_full_queue_refuses_and_frees_up(pipeline):
    engine = PackedEngine(pipeline, 100, max_queue=2)
    handles = [engine.submit(request(seed=seed)) for seed in range(2)]
    with pytest.raises(QueueFull) as caught:
        engine.submit(request())
    assert caught.value.retry_after >= 1
    engine.run()
    engine.submit(request())
    assert all(handle.done() for handle in handles)
    assert engine.statistics.refusals == {"queue_full": 1}


def test_a_full_queue_has_room_once_as_many_images_are_complete_as_arrive(pipeline):
    engine = PackedEngine(pipeline, 32, max_queue=3)  # one of them per step
    engine.cost.assume(1e9)
    seconds = engine.predict_seconds(request(8))
    engine.cost.assume(1e9 * seconds / 10)
    for seed in range(3):
        engine.submit(request(8, seed=seed))
    for places in (1, 2, 3):
        with pytest.raises(QueueFull) as caught:
            engine.submit_all([request(8)] * places)
        assert caught.value.retry_after == pytest.approx(10 * places)


def test_requests_submitted_together_are_queued_all_or_none(pipeline):
    engine = PackedEngine(pipeline, 100, max_queue=2)
    engine.submit(request())
    with pytest.raises(QueueFull, match="1 requests are unfinished, the limit is 2"):
        engine.submit_all([request(seed=seed) for seed in range(2)])
    with pytest.raises(UserError, match="3 images at once can never fit the queue, which holds 2"):
        engine.submit_all([request(seed=seed) for seed in range(3)])
    assert engine.unfinished == engine.statistics.submitted == 1
    assert engine.statistics.refusals == {"queue_full": 2}
    engine.run()
    handles = engine.submit_all([request(seed=seed) for seed in range(2)])
    engine.run()
    assert [handle.id for handle in handles] == [1, 2]
    assert all(
        torch.equal(handle.result().latent, alone(pipeline, handle.request).latent) for handle in handles
    )


def test_the_earliest_time_of_requests_submitted_together_is_that_of_the_last(pipeline):
    engine = PackedEngine(pipeline, 32)  # one of them per step
    engine.cost.assume(1e9)
    seconds = engine.predict_seconds(request(8))
    with pytest.raises(DeadlineUnreachable) as caught:
        engine.submit_all([request(8, seed=seed, deadline=2.5 * seconds) for seed in range(3)])
    assert caught.value.earliest == pytest.approx(3 * seconds)
    assert engine.statistics.refusals == {"deadline": 3}
    brief = request(8, num_inference_steps=1)
    with pytest.raises(DeadlineUnreachable) as caught:  # it goes first, although it comes last
        engine.submit_all([request(8, deadline=1.2 * seconds), brief])
    assert caught.value.earliest == pytest.approx(4 / 3 * seconds)
    assert engine.unfinished == engine.statistics.submitted == 0
    handles = engine.submit_all([request(8, deadline=1.4 * seconds), brief])
    engine.run()
    assert all(handle.status == "finished" for handle in handles)


@pytest.mark.parametrize("order", [CostAware(), FifoPacked()])
def test_requests_submitted_together_move_to_coarser_ratios_to_meet_a_deadline(pipeline, monkeypatch, order):
    simulations = []

    def counted(*arguments):
        simulations.append(arguments)
        return finish_seconds(*arguments)

    monkeypatch.setattr(admission, "finish_seconds", counted)
    coarser = tuple(request(ratio).sample for ratio in (16, 32))

    def submit(deadline):
        engine = PackedEngine(pipeline, 32, order=order)  # one image at 8x per step
        engine.cost.assume(1e9)
        simulations.clear()
        alone = engine.predict_seconds(request(8))
        return engine.submit_all(
            [request(8, seed=seed, deadline=deadline * alone, coarser=coarser) for seed in range(8)]
        ), alone

    handles, alone = submit(6.9)
    assert {handle.record.ratio for handle in handles} > {8}
    assert max(handle.record.predicted_seconds for handle in handles) <= 6.9 * alone
    with pytest.raises(DeadlineUnreachable) as caught:
        submit(1e-6)
    assert len(simulations) == 3  # one per ratio
    handles, _ = submit(1.0001 * caught.value.earliest / alone)
    assert {handle.record.ratio for handle in handles} == {32}


def test_a_deadline_that_later_requests_break_is_recorded(pipeline):
    now = [0.0]

    def slow(_):
        now[0] += 10.0

    engine = PackedEngine(pipeline, 100, clock=lambda: now[0], on_step=slow)
    engine.cost.assume(1e12)
    handles = [engine.submit(request(deadline=deadline)) for deadline in (29.0, 31.0, None)]
    engine.run()
    assert [handle.result().record.deadline_missed for handle in handles] == [True, False, False]
    assert engine.statistics.deadlines_missed == 1


def test_cancellation_takes_effect_at_the_next_step(pipeline):
    engine = PackedEngine(pipeline, 100)
    kept, dropped = engine.submit(request(8)), engine.submit(request(16))
    engine.step()
    assert dropped.cancel()
    assert engine.step().handles == (kept,)
    with pytest.raises(Cancelled, match="cancelled after 1 of 3 steps"):
        dropped.result()
    engine.run()
    assert kept.result().latent.shape == (4, 8, 8)
    assert not kept.cancel()
    totals = engine.statistics
    assert (totals.submitted, totals.finished, totals.cancelled, totals.failed) == (2, 1, 1, 0)


def test_a_request_cancelled_while_another_is_dropped_ends_too(pipeline):
    engine = PackedEngine(pipeline, 100)
    first, second = engine.submit(request()), engine.submit(request())
    second.add_done_callback(lambda _: first.cancel())
    second.cancel()
    engine.run()
    for handle in (first, second):
        with pytest.raises(Cancelled):
            handle.result(timeout=0)
    assert engine.statistics.cancelled == 2


def test_callbacks_may_call_the_engine(pipeline):
    """At every stage at which a request is cancelled, without a deadlock."""
    engine = PackedEngine(pipeline, 100, on_step=lambda report: [one.cancel() for one in report.handles])
    seen = []
    for steps in (1, 2):  # cancelled before its decoding, and before its second step
        handle = engine.submit(request(num_inference_steps=steps, decode=True))
        handle.add_done_callback(lambda one: seen.append((one.status, engine.predict_seconds(request()))))
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert [status for status, _ in seen] == ["cancelled"] * 2


def test_a_request_that_cannot_be_prepared_fails_alone(pipeline):
    class Broken(Stages):
        def prepare(self, request):
            if request.sample.seed == 13:
                raise UserError("no such text")
            return super().prepare(request)

    engine = PackedEngine(pipeline, 100, stages=Broken(pipeline))
    good, bad = engine.submit(request(seed=1)), engine.submit(request(seed=13))
    engine.run()
    with pytest.raises(UserError, match="no such text"):
        bad.result()
    assert good.result().record.steps_done == 3
    assert (bad.status, engine.statistics.failed) == ("failed", 1)


def test_a_latent_with_nan_fails_alone(pipeline):
    class Broken(Stages):
        def scheduler_step(self, state, prediction):
            super().scheduler_step(state, prediction)
            if state.request.seed == 13:
                state.tokens = state.tokens * float("nan")

    engine = PackedEngine(pipeline, 100, stages=Broken(pipeline))
    good, bad = engine.submit(request(seed=1)), engine.submit(request(seed=13))
    engine.run()
    with pytest.raises(UserError, match="a latent contains NaN"):
        bad.result()
    assert torch.isfinite(good.result().latent).all()


def test_noise_that_cannot_be_drawn_together_is_drawn_one_by_one(pipeline):
    class Broken(Stages):
        def draw_noise(self, states):
            raise torch.OutOfMemoryError("CUDA out of memory")

    drawn = []
    for stages in (Stages(pipeline), Broken(pipeline)):
        engine = PackedEngine(pipeline, 100, stages=stages)
        handles = [engine.submit(request(seed=seed, scheduler="ddpm")) for seed in range(2)]
        engine.run()
        drawn.append([handle.result().latent for handle in handles])
    assert all(map(torch.equal, *drawn))


def test_a_pass_that_fails_is_narrowed_down_to_the_request_at_fault(pipeline):
    class Broken(Stages):
        def denoise_step(self, states):
            if any(state.request.seed == 13 for state in states):
                raise RuntimeError("index out of range")
            return super().denoise_step(states)

    engine = PackedEngine(pipeline, 100, stages=Broken(pipeline))
    handles = [engine.submit(request(seed=seed)) for seed in (1, 2, 13, 4)]
    engine.run()
    assert [handle.status for handle in handles] == ["finished", "finished", "failed", "finished"]


class Small(Stages):
    """Stages that have memory for `limit` rows per step."""

    def __init__(self, pipeline, limit):
        super().__init__(pipeline)
        self.limit, self.seen = limit, []

    def denoise_step(self, states):
        rows = [state.passes * state.request.num_tokens for state in states]
        self.seen.append(rows)
        if sum(rows) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().denoise_step(states)


def test_out_of_memory_halves_the_batch_and_continues(pipeline, monkeypatch):
    stages = Small(pipeline, 20)
    engine = PackedEngine(pipeline, 100, stages=stages)
    engine.cost.assume(1e9)
    monkeypatch.setattr(engine.cost, "step_seconds", lambda flops: 1.0)
    handles = [engine.submit(request(16, seed=seed)) for seed in range(8)]
    big = engine.submit(request(8))
    assert engine.predict_seconds(request(16, seed=8)) == 3 + 3, "after the steps of the others, which share"
    engine.step()
    assert engine.predict_seconds(request(16, seed=8)) == 4 * 2 + 3, "two requests share a step from now on"
    assert sum(stages.seen[0]) == 96
    stages.seen.clear()
    engine.run()
    assert max(map(sum, stages.seen)) <= 20, "later steps must keep to the halved budget"
    assert [handle.status for handle in handles] == ["finished"] * 8
    assert engine.statistics.out_of_memory > 0
    with pytest.raises(UserError, match="out of memory with a single image of 32 tokens per step"):
        big.result()


def test_after_out_of_memory_a_larger_request_has_steps_to_itself(pipeline):
    stages = Small(pipeline, 40)
    engine = PackedEngine(pipeline, 100, stages=stages, order=FifoPacked())
    handles = [engine.submit(request(16, seed=seed)) for seed in range(8)] + [engine.submit(request(8))]
    engine.step()
    stages.seen.clear()
    engine.run()
    assert [handle.status for handle in handles] == ["finished"] * 9
    assert stages.seen.count([32]) == 2
    assert max(sum(rows) for rows in stages.seen if rows != [32]) == 24, "the halved budget"


@pytest.fixture
def decoded(pipeline, monkeypatch):
    """The ratio and the number of images of every call of the decoder."""
    calls, decode = [], pipeline.vae.decode

    def recorded(z, ratio):
        calls.append((ratio, len(z)))
        return decode(z, ratio)

    monkeypatch.setattr(pipeline.vae, "decode", recorded)
    return calls


def test_finished_latents_are_decoded_in_batches_of_one_ratio(pipeline, decoded):
    engine = PackedEngine(pipeline, 400, stages=Stages(pipeline, decode_batch=3))
    requests = [request(ratio, seed, decode=True) for seed, ratio in enumerate((16, 8, 16, 32, 16, 8, 16))]
    handles = [engine.submit(one) for one in requests]
    engine.run()
    assert sorted(decoded) == [(8, 2), (16, 1), (16, 3), (32, 1)]
    for one, handle in zip(requests, handles, strict=True):
        torch.testing.assert_close(handle.result().image, alone(pipeline, one).image, atol=1e-5, rtol=0)


def test_an_image_that_cannot_be_decoded_fails_alone(pipeline):
    class Broken(Stages):
        at_fault = None

        def latent(self, state, tokens=None):
            latent = super().latent(state, tokens)
            if state.request.seed == 13:
                self.at_fault = latent
            return latent

        def decode(self, latents, ratio):
            if any(latent is self.at_fault for latent in latents):
                raise RuntimeError("broken decoder")
            return super().decode(latents, ratio)

    engine = PackedEngine(pipeline, 100, stages=Broken(pipeline, decode_batch=4))
    handles = [engine.submit(request(seed=seed, decode=True)) for seed in (1, 2, 13, 4)]
    engine.run()
    assert [handle.status for handle in handles] == ["finished", "finished", "failed", "finished"]
    with pytest.raises(RuntimeError, match="broken decoder"):
        handles[2].result()
    assert (engine.statistics.finished, engine.statistics.failed, engine.unfinished) == (3, 1, 0)


class SmallDecoder(Stages):
    """Stages whose decoder has memory for `limit` images."""

    def __init__(self, pipeline, limit):
        super().__init__(pipeline, decode_batch=4)
        self.limit, self.activations, self.held = limit, None, []

    def decode(self, latents, ratio):
        if self.activations is not None:
            self.held.append(self.activations() is not None)
        if len(latents) > self.limit:
            activations = torch.zeros(1)
            self.activations = weakref.ref(activations)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().decode(latents, ratio)


def test_a_decoder_out_of_memory_halves_its_batch_and_holds_no_tensors_of_the_failed_call(pipeline):
    stages = SmallDecoder(pipeline, 1)
    engine = PackedEngine(pipeline, 100, stages=stages)
    handles = [engine.submit(request(seed=seed, decode=True)) for seed in range(4)]
    engine.run()
    assert [handle.status for handle in handles] == ["finished"] * 4
    assert stages.held == [False] * 6


def test_an_image_that_the_decoder_has_no_memory_for_fails_with_its_size(pipeline):
    engine = PackedEngine(pipeline, 100, stages=SmallDecoder(pipeline, 0))
    handle = engine.submit(request(decode=True))
    engine.run()
    with pytest.raises(UserError, match="out of memory while decoding a single image of 64 x 64 pixels"):
        handle.result()


def test_a_preview_that_cannot_be_decoded_is_left_out(pipeline):
    class Broken(Stages):
        calls = 0

        def decode(self, latents, ratio):
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("broken decoder")
            return super().decode(latents, ratio)

    engine, seen = PackedEngine(pipeline, 100, stages=Broken(pipeline)), []
    handle = engine.submit(request(preview_every=1, decode=True), on_preview=seen.append)
    engine.run()
    assert ([preview.step for preview in seen], handle.status) == ([2], "finished")


def test_previews_come_every_k_steps_and_change_no_bits(pipeline):
    engine, seen = PackedEngine(pipeline, 100), []
    handles = [
        engine.submit(
            request(scheduler=scheduler, num_inference_steps=6, preview_every=2, decode=True),
            on_preview=seen.append,
        )
        for scheduler in ("ddim", "dpm++")
    ]
    engine.run()
    assert [preview.step for preview in seen] == [2, 2, 4, 4]
    assert all(preview.image.shape == (3, 64, 64) for preview in seen)
    other = PackedEngine(pipeline, 100)
    plain = other.submit(request(num_inference_steps=6, decode=True))
    other.run()
    assert torch.equal(plain.result().image, handles[0].result().image)


def test_previews_of_a_cancelled_request_are_not_decoded(pipeline):
    class Counting(Stages):
        decoded = 0

        def decode(self, latents, ratio):
            self.decoded += len(latents)
            return super().decode(latents, ratio)

    stages = Counting(pipeline)
    engine = PackedEngine(
        pipeline, 100, stages=stages, on_step=lambda report: [one.cancel() for one in report.handles]
    )
    handle = engine.submit(request(decode=True, preview_every=1), on_preview=pytest.fail)
    engine.run()
    assert (handle.status, stages.decoded) == ("cancelled", 0)


def test_accounting(pipeline):
    engine = PackedEngine(pipeline, 36)
    handles = [engine.submit(request(8, decode=True)), engine.submit(request(16)), engine.submit(request(16))]
    engine.run()
    records = [handle.result().record for handle in handles]
    assert [record.tokens for record in records] == [16, 4, 4]
    for record in records:
        assert record.seconds_denoising > 0
        assert record.seconds_queued >= 0
    assert records[0].seconds_decoding > 0
    totals = engine.statistics
    assert totals.rows == 3 * (32 + 8 + 8)
    assert totals.tokens_finished == 24
    assert 0 < totals.fill <= 1
    assert records[2].longest_wait_steps + records[1].longest_wait_steps + records[0].longest_wait_steps > 0


def test_flops_are_those_of_the_forward_passes(pipeline):
    stages = Stages(pipeline, rows=1)  # padding does not count
    engine = PackedEngine(pipeline, 100, stages=stages)
    handle = engine.submit(request(8))
    with FlopCounterMode(display=False) as counter:
        engine.run()
    assert handle.result().record.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_deadlines_need_a_calibrated_engine_and_are_answered_at_once(pipeline):
    engine = PackedEngine(pipeline, 64)
    with pytest.raises(UserError, match="calibrated"):
        engine.submit(request(deadline=1.0))
    engine.cost.calibrate([[request(32, guidance_scale=1.0)], [request(8)]], repeats=1)
    engine.submit(request(deadline=60.0))
    with pytest.raises(DeadlineUnreachable) as caught:
        engine.submit(request(8, num_inference_steps=900, deadline=1e-3))
    assert caught.value.earliest > 1e-3
    assert engine.statistics.refusals == {"deadline": 1}
    engine.run()


def test_simple_images_move_to_a_coarser_ratio_first(pipeline):
    engine = PackedEngine(pipeline, 64, coarser_after=0.01)
    engine.cost.assume(1e9)
    coarser = tuple(request(ratio).sample for ratio in (16, 32))
    idle = engine.submit(request(8, coarser=coarser, num_inference_steps=500))
    assert (idle.record.ratio, idle.record.planned_ratio) == (8, None)
    second = engine.submit(request(8, num_inference_steps=500, seed=1))
    waits = (
        engine.predict_seconds(request(8, seed=2))
        - engine.cost.cost(request(8), request(8).sample, 0).seconds
    )
    engine.admission.coarser_after = waits / 5  # between the patience of a simple and of a complex image
    simple = engine.submit(request(8, coarser=coarser, complexity=1.0, seed=2))
    complex_ = engine.submit(request(8, coarser=coarser, complexity=9.0, seed=2))
    fixed = engine.submit(request(8, complexity=1.0, seed=2))
    assert simple.record.ratio > 8
    assert simple.record.planned_ratio == 8
    assert (complex_.record.ratio, fixed.record.ratio) == (8, 8)
    for handle in (idle, second, complex_, fixed):
        handle.cancel()
    engine.run()
    assert simple.result().latent.shape[1] == 64 // simple.record.ratio


def test_an_image_at_a_coarser_ratio_has_the_guidance_of_that_ratio(pipeline):
    engine = PackedEngine(pipeline, 64, coarser_after=0.0)
    engine.cost.assume(1e9)
    other = engine.submit(request(8))
    wanted = request(16, guidance_scale=4.0)
    moved = engine.submit(
        request(8, guidance_scale=1.0, coarser=(wanted.sample,), coarser_guidance=(4.0,), decode=False)
    )
    assert moved.record.planned_ratio == 8
    assert moved.record.flops == engine.cost.cost(wanted, wanted.sample, 0).flops
    engine.run()
    assert other.done()
    assert torch.equal(moved.result().latent, alone(pipeline, wanted).latent)
    with pytest.raises(UserError, match="coarser_guidance: expected 0 scales, one per coarser ratio, got 1"):
        request(coarser_guidance=(4.0,))


class SlowDecoder(Stages):
    """Stages whose decoder sets `started`, then waits for `released`."""

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.started, self.released = threading.Event(), threading.Event()

    def decode(self, latents, ratio):
        self.started.set()
        self.released.wait(60)
        return super().decode(latents, ratio)


def test_images_that_wait_for_the_decoder_count(pipeline):
    """They take a place in the queue, and time in forecasts."""
    stages = SlowDecoder(pipeline)
    with PackedEngine(pipeline, 64, stages=stages, max_queue=2) as engine:
        engine.cost.assume(1e12)
        engine.cost.measured_decoding(16, (2, 2), 100.0)
        handles = [engine.submit(request(seed=seed, decode=True)) for seed in range(2)]
        while any(handle.status != "decoding" for handle in handles) or engine.waiting:
            time.sleep(0.01)
        try:
            assert engine.unfinished == 2
            assert engine.predict_seconds(request(decode=True)) > 290
            with pytest.raises(QueueFull) as caught:
                engine.submit(request())
            assert 90 < caught.value.retry_after < 110, "one place: the first image"
            with pytest.raises(QueueFull) as caught:
                engine.submit_all([request(seed=seed) for seed in range(2)])
            assert 190 < caught.value.retry_after < 210, "two places: both"
            engine.max_queue = None
            with pytest.raises(DeadlineUnreachable):
                engine.submit(request(decode=True, deadline=200.0))
        finally:
            stages.released.set()
    assert [handle.status for handle in handles] == ["finished"] * 2
    assert engine.unfinished == 0


def test_requests_run_to_their_end_while_the_decoder_is_busy(pipeline):
    stages = SlowDecoder(pipeline)
    with PackedEngine(pipeline, 64, stages=stages) as engine:
        decoded = engine.submit(request(decode=True))
        try:
            assert stages.started.wait(30)
            other = engine.submit(request(seed=1)).result(timeout=30)
            assert other.record.steps_done == 3
            assert decoded.status == "decoding"
        finally:
            stages.released.set()
    assert decoded.status == "finished"


def test_images_that_move_to_the_decoder_count_once(pipeline):
    class Recording(Stages):
        def latent(self, state, tokens=None):
            seen.append(engine.unfinished)
            return super().latent(state, tokens)

    seen = []
    engine = PackedEngine(pipeline, 100, stages=Recording(pipeline))
    for seed in range(3):
        engine.submit(request(seed=seed, decode=True))
    engine.run()
    assert seen == [3, 3, 3]
    assert engine.unfinished == 0


def test_seconds_of_the_decoder_do_not_include_waiting_for_uploads(pipeline, monkeypatch):
    now, decode = [0.0], pipeline.vae.decode

    class HeldByUploads:
        def __enter__(self):
            now[0] += 100.0

        def __exit__(self, *_):
            pass

    def slow(z, ratio):
        now[0] += 1.0
        return decode(z, ratio)

    monkeypatch.setattr("cat_fast.inference.engine.stages.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(pipeline.vae, "decode", slow)
    stages = Stages(pipeline)
    stages.vae_lock = HeldByUploads()
    engine = PackedEngine(pipeline, 100, stages=stages, clock=lambda: now[0])
    engine.cost.calibrate([[request()]], repeats=1)
    assert engine.cost.decode_seconds(request().sample) == 1.0
    handle = engine.submit(request(decode=True))
    engine.run()
    assert engine.cost.decode_seconds(request().sample) == 1.0
    assert engine.statistics.seconds_decoding == 1.0
    assert handle.result().record.seconds_decoding == 101.0


def test_an_idle_engine_keeps_the_numbers_of_its_last_step_and_no_image(pipeline):
    engine = PackedEngine(pipeline, 100)
    handle = engine.submit(request(decode=True))
    engine.run()
    assert engine.last_step.rows == 8
    assert [one.id for one in engine.last_step.requests] == [handle.id]
    kept = weakref.ref(handle)
    del handle
    gc.collect()
    assert kept() is None


def test_threads_decode_and_end(pipeline):
    before = threading.active_count()
    with PackedEngine(pipeline, 64) as engine:
        handles = [engine.submit(request(seed=seed, decode=True)) for seed in range(6)]
        images = [handle.result(timeout=60).image for handle in handles]
    assert all(image.shape == (3, 64, 64) for image in images)
    assert threading.active_count() == before
    with pytest.raises(Draining):
        engine.submit(request())


def test_closing_reports_what_was_lost(pipeline):
    engine = PackedEngine(pipeline, 64).start()
    handle = engine.submit(request(num_inference_steps=1000, scheduler="ddpm"))
    while handle.status == "queued":
        time.sleep(0.01)
    assert engine.close(timeout=0.0) == [handle]
    with pytest.raises(Draining):
        handle.result()
    assert engine.statistics.failed == 1


def test_cancelled_requests_are_not_lost(pipeline):
    engine = PackedEngine(pipeline, 64)
    cancelled, lost = engine.submit(request()), engine.submit(request())
    cancelled.cancel()
    assert engine.close() == [lost]
    assert (engine.statistics.cancelled, engine.statistics.failed) == (1, 1)


def test_a_request_whose_coroutine_is_cancelled_ends_as_cancelled(pipeline):
    engine = PackedEngine(pipeline, 64)
    handle = engine.submit(request())

    async def main():
        task = asyncio.create_task(handle.wait())
        await asyncio.sleep(0)  # it waits now
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    engine.run()
    with pytest.raises(Cancelled, match="cancelled after 0 of 3 steps"):
        handle.result(timeout=0)
    assert (handle.status, engine.statistics.cancelled, engine.unfinished) == ("cancelled", 1, 0)


def test_an_event_loop_waits_and_cancels(pipeline):
    async def main(engine):
        output, other = await asyncio.gather(engine.generate(request()), engine.generate(request(8)))
        task = asyncio.create_task(engine.generate(request(num_inference_steps=1000, scheduler="ddpm")))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return output, other

    with PackedEngine(pipeline, 64, order=FifoPacked()) as engine:
        output, other = asyncio.run(main(engine))
        while engine.unfinished:
            time.sleep(0.01)
    assert output.latent.shape == (4, 4, 4)
    assert other.latent.shape == (4, 8, 8)
    assert engine.statistics.cancelled == 1
    assert dataclasses.asdict(output.record)["steps_done"] == 3
