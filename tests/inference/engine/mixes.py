"""Tiny pipelines, and random mixes of requests that differ in everything."""

import itertools
import random

import torch

from cat_fast.generator import DiT, SampleRequest, make_schedule
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.inference import CATPipeline
from cat_fast.inference.engine import Cancelled, CostAware, EngineRequest, FifoPacked, PackedEngine
from tests.cli.conftest import tiny_tokenizer
from tests.inference.tiny_encoder import WIDTH

GRIDS = {8: [(4, 4), (2, 4), (4, 2)], 16: [(2, 2), (1, 2)], 32: [(1, 1), (2, 1)]}
TEXTS = ("", "a red house", "a blue sky", "page a red newspaper page a blue house sky")


def tiny_pipeline(encoder=None, *, prediction="epsilon", **changes):
    """Return a pipeline at 64 px with random weights; head dimension 32 runs the C++ kernels."""
    torch.manual_seed(1)
    transformer = DiT(
        **{"in_channels": 4, "hidden_size": 64, "depth": 2, "num_heads": 2, "position_frame": 4}
        | {"num_classes": 3, "text_dim": None if encoder is None else WIDTH}
        | changes
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    made = CATPipeline(
        tiny_tokenizer(),
        transformer,
        make_schedule(prediction),
        None if encoder is None else TextEncoder(encoder),
        resolution=64,
    )
    made.set_progress_bar_config(disable=True)
    return made


def random_request(rng, *, text=False, flow=False, decode=False):
    """Return a request with random ratio, shape, label, steps, guidance, scheduler and text."""
    ratio = rng.choice([8, 16, 32])
    return EngineRequest(
        sample=SampleRequest(
            label=rng.randrange(4),
            ratio=ratio,
            grid=rng.choice(GRIDS[ratio]),
            seed=rng.randrange(2**40),
            text=rng.choice(TEXTS) if text else "",
        ),
        num_inference_steps=rng.choice([1, 2, 3, 4]),
        guidance_scale=rng.choice([1.0, 1.5, 4.0, 0.0, -1.0]),
        guidance_channels=rng.choice([None, None, 3]),
        scheduler="euler" if flow else rng.choice([None, "ddpm", "ddim", "dpm++"]),
        decode=decode,
        priority=rng.choice([0, 0, 0, 1]),
    )


def alone(pipeline, request):
    """Return the output of a request that has an engine to itself."""
    engine = PackedEngine(pipeline, 64)
    handle = engine.submit(request)
    engine.run()
    return handle.result()


def mismatches(pipeline, pool, expected, rng):
    """Run one random mix of requests of a pool; return those whose bits differ from `expected`.

    Requests arrive at random steps, some are cancelled, and the row budget is random.
    """
    order = rng.choice([FifoPacked(), CostAware(), FifoPacked(patience=1)])
    engine = PackedEngine(pipeline, rng.choice([32, 40, 64, 200]), order=order)
    arrivals = sorted((rng.randrange(5), rng.randrange(len(pool))) for _ in range(rng.randint(2, 7)))
    handles = []
    for step in itertools.count():
        while arrivals and arrivals[0][0] <= step:
            _, member = arrivals.pop(0)
            handles.append((member, engine.submit(pool[member])))
        if handles and rng.random() < 0.1:
            rng.choice(handles)[1].cancel()
        if engine.step() is None and not arrivals:
            break
    wrong = []
    for member, handle in handles:
        try:
            got = handle.result(timeout=0)
        except Cancelled:
            continue
        want = expected[member]
        same = torch.equal(got.latent, want.latent)
        if want.image is not None:
            same &= got.image is not None and torch.equal(got.image, want.image)
        if not same:
            wrong.append(pool[member])
    return wrong


def check_mixes(pipeline, count, seed, *, pool, **options):
    """Run `count` mixes of `pool` random requests; compare every image with the one drawn alone."""
    rng = random.Random(seed)
    requests = [random_request(rng, **options) for _ in range(pool)]
    expected = [alone(pipeline, request) for request in requests]
    for i in range(count):
        wrong = mismatches(pipeline, requests, expected, rng)
        assert not wrong, f"mix {i}: {len(wrong)} images differ from those drawn alone, such as {wrong[0]}"
