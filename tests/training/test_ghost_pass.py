"""Ranks at different ratios: each produces every gradient, in one order, and ZeRO averages them right."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.ghost_worker import LR, RATIOS, STEPS, loss_of, tiny_model

WORKER = Path(__file__).with_name("ghost_worker.py")


def gradient_order(ratio: int) -> list[str]:
    """Names of parameters in the order in which a backward pass at `ratio` finishes their gradients."""
    model, order = tiny_model(), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    output, _ = model(torch.rand(1, 3, 16, 16), ratio, ghost_pass=True)
    output.square().mean().backward()
    return order


def test_every_ratio_produces_every_gradient_in_the_same_order():
    orders = [gradient_order(ratio) for ratio in RATIOS]
    assert orders[0] == orders[1] == orders[2]
    assert set(orders[0]) == {name for name, _ in tiny_model().named_parameters()}


def test_without_the_ghost_pass_gradients_are_missing():
    model = tiny_model()
    loss_of(model, step=0, rank=0, ghost_pass=False).backward()
    assert any(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_ghost_pass_changes_neither_output_nor_gradients(ratio):
    pictures, results = torch.rand(2, 3, 16, 16), []
    for ghost_pass in (False, True):
        model = tiny_model()
        output, _ = model(pictures, ratio, sample_posterior=False, ghost_pass=ghost_pass)
        output.square().mean().backward()
        gradients = {
            n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()
        }
        results.append((output.detach(), gradients))
    (plain, plain_gradients), (ghost, ghost_gradients) = results
    assert torch.equal(plain, ghost)
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradient, ghost_gradients[name]), name


def reference() -> dict[str, torch.Tensor]:
    """Plain torch: the mean of both ranks' gradients, one AdamW; on one thread, as the ranks compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in (0, 1):
            (loss_of(model, step, rank) / 2).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model.state_dict()


@pytest.mark.parametrize(("stage", "bucket"), [(1, 5_000_000), (2, 5_000_000), (2, 2_000)])
def test_two_ranks_that_never_draw_the_same_ratio_equal_plain_torch(stage, bucket, tmp_path):
    out = tmp_path / "weights.safetensors"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    base = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(stage), str(bucket), str(out)],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [worker.communicate(timeout=500)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    # AdamW moves each weight by about LR a step, so a gradient averaged wrongly shows at 1e-3.
    trained, expected = load_file(out), reference()
    for name, value in expected.items():
        torch.testing.assert_close(
            trained[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
