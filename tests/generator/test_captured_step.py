"""Steps on fixed buffers: bits of eager steps, few sizes, no synchronization, and a fallback to eager."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.shared.host_device import NoSynchronization
from cat_fast.generator import SampleRequest, make_schedule
from cat_fast.generator.captured_step import MAX_SIZES, CapturedStep, StepBuffers, captured_step, predict
from cat_fast.generator.dit import DiT
from cat_fast.generator.sampling import denoise_step, pack_step, prepare
from cat_fast.generator.solvers import set_steps
from cat_fast.generator.step_pack import Filling, StepSize
from tests.generator.conftest import TEXT_DIM
from tests.generator.sampling_loop import sample
from tests.generator.test_host_device import MODEL, OPTIONS, on_device

BUCKETS = Filling(16, buckets=True)
GRIDS = {8: (8, 8), 16: (4, 4), 32: (2, 2)}


class OnBuffers:
    """Stand-in for a CUDA graph: the same pass on the same buffers."""

    def __init__(self, model, packed, text, pool):
        self.model, self.buffers = model, StepBuffers(packed, text)

    def replay(self, packed, text):
        self.buffers.load(packed, text)
        return predict(self.model, self.buffers.packed, self.buffers.text)


def states(model, seed, count=5, **options):
    generator = torch.Generator().manual_seed(seed)
    scheduler = set_steps(make_schedule(), "ddpm", 5)
    made = []
    for i in range(count):
        ratio = (8, 16, 32)[int(torch.randint(3, (), generator=generator))]
        text = None
        if model.config.text_dim is not None:
            length = int(torch.randint(9, (), generator=generator))
            text = torch.randn(length, model.config.text_dim, generator=generator)
        request = SampleRequest(label=i % 3, ratio=ratio, grid=GRIDS[ratio], seed=seed + i)
        guidance = (1.0, 3.0)[int(torch.randint(2, (), generator=generator))]
        made.append(prepare(model, request, scheduler, guidance=guidance, text=text, **options))
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"text_dim": TEXT_DIM, "pooled_text": True}, {"rope": True, "qk_norm": True, "shared_adaln": True}],
    ids=str,
)
def test_buckets_and_buffers_keep_the_bits(make_dit, options):
    model = make_dit(**options)
    forward = CapturedStep(model, OnBuffers)
    for seed in range(6):
        step = states(model, seed)
        plain = denoise_step(model, step, filling=Filling(16))
        bucketed = denoise_step(model, step, filling=BUCKETS)
        buffered = denoise_step(model, step, filling=BUCKETS, forward=forward)
        assert all(map(torch.equal, bucketed, plain))
        assert all(map(torch.equal, buffered, plain))
    assert forward.report.replayed > 0
    assert forward.report.failure is None


def test_one_graph_serves_steps_of_one_size_and_its_predictions_stay(make_dit):
    model = make_dit()
    forward = CapturedStep(model, OnBuffers)
    pairs = []
    for seed in range(4):
        step = states(model, seed, count=2)
        pairs.append((denoise_step(model, step, filling=BUCKETS, forward=forward), step))
    report = forward.report
    assert (report.eager, report.graphs, report.replayed) == (1, 1, 3)
    for got, step in pairs:  # later replays have not overwritten them
        assert all(map(torch.equal, got, denoise_step(model, step, filling=Filling(16))))


def test_images_are_those_without_buckets(make_dit):
    model = make_dit()
    requests = [state.request for state in states(model, 3)]
    forward = CapturedStep(model, OnBuffers)
    options = {"steps": 4, "guidance": 2.0}
    plain = sample(model, requests, make_schedule(), filling=Filling(16), **options)
    captured = sample(model, requests, make_schedule(), filling=BUCKETS, forward=forward, **options)
    assert all(map(torch.equal, captured, plain))
    assert (forward.report.graphs, forward.report.replayed) == (1, 3)


def test_a_failed_capture_falls_back_to_eager_steps_and_says_why(make_dit, caplog):
    def capture(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    model = make_dit()
    forward = CapturedStep(model, capture)
    step = states(model, 0)
    with caplog.at_level(logging.WARNING, "cat_fast.generator"):
        results = [denoise_step(model, step, filling=BUCKETS, forward=forward) for _ in range(4)]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    reason = "capture failed: operation not permitted when stream is capturing"
    assert [record.getMessage() for record in caplog.records] == [
        f"CUDA graphs are not used for sampling: {reason}"
    ]
    assert forward.report.to_json() == {"graphs": 0, "replayed": 0, "eager": 4, "failure": reason}


def test_moved_weights_are_captured_again(make_dit):
    model = make_dit()
    forward, step = CapturedStep(model, OnBuffers), states(model, 0)
    for _ in range(2):
        denoise_step(model, step, filling=BUCKETS, forward=forward)
    model.to(torch.bfloat16)
    for _ in range(2):
        denoise_step(model, step, filling=BUCKETS, forward=forward)
    assert (forward.report.graphs, forward.report.eager) == (2, 2)


def test_rarely_used_sizes_are_dropped(make_dit):
    model = make_dit()
    forward, step = CapturedStep(model, OnBuffers), states(model, 0, count=1)
    for rows in range(1, MAX_SIZES + 2):
        packed, text, _ = pack_step(model, step, Filling(200 + rows))
        for _ in range(2):
            with torch.no_grad():
                forward(packed, text)
    assert len(forward._by_size) == MAX_SIZES


def test_a_model_has_one_captured_step_and_an_offloaded_one_none(make_dit):
    model, offloaded = make_dit(), make_dit()
    assert captured_step(model) is captured_step(model)
    offloaded._hf_hook = SimpleNamespace()
    assert captured_step(offloaded).report.failure == "the transformer is offloaded"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_captured_neither_waits_nor_copies_from_the_host(options):
    """Fake CUDA tensors need no GPU; the kernels are those that a GPU would run."""
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model = DiT(**MODEL, **options).eval()
        packed, text = on_device(torch.device("cuda"), options.get("text_dim"))
        packed = packed.replace(timestep=torch.empty(3, device="cuda"), max_seqlen=64)
        buffers = StepBuffers(packed, text)
        with NoSynchronization("cuda") as loading:
            buffers.load(packed, text)
        with NoSynchronization("cuda") as watched:
            out = predict(model, buffers.packed, buffers.text)
    assert (out.device.type, out.dtype, out.shape) == ("cuda", torch.float32, (21, 16))
    # a replay launches only these copies and the graph
    assert sum(loading.launches.values()) == (8 if text is not None else 6)
    assert sum(watched.launches.values()) > 60


def test_sizes_are_few():
    filling, sizes = Filling(16, buckets=True), set()
    for sequences in range(1, 129):
        for length in (4, 16, 64, 256, 1024):
            size = StepSize(sequences, sequences * length, length, None, 0)
            target = filling.target(size)
            assert target.tokens <= max(256, 1.5 * size.tokens)
            assert all(a % 16 == 0 for a in (target.sequences, target.tokens))
            fillers = target.sequences - sequences
            assert fillers * target.max_seqlen >= target.tokens - size.tokens
            assert target.max_seqlen >= length
            sizes.add(target)
    assert len(sizes) < 60
