"""Two ranks with unequal batches train as plain torch on all their pictures, and hold what was predicted."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cat_fast.complexity.image_ratios import load_index
from cat_fast.data.images.crops import CropDataset, load_shrunk
from cat_fast.data.sampling.cost_table import CostTable
from cat_fast.data.sampling.ratio_sampler import RatioSampler
from cat_fast.models.build import build_model
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.losses import TokenizerObjective
from cat_fast.training.runtime.seeding import seed_step, step_rng
from cat_fast.training.tokenizer.predict_memory import plan_memory
from tests.training.rank_processes import run_ranks
from tests.training.tokenizer.balanced_worker import STEPS, settings

WORKER = "tests.training.tokenizer.balanced_worker:main"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run by two ranks."""
    folder = tmp_path_factory.mktemp("balanced")
    settings(folder)
    run_ranks(WORKER, 2, folder)
    return folder


def sampler_of(config):
    ratios = [record.ratio for record in load_index(config.data.index)]
    costs = CostTable.read(config.sampler.cost_table)
    return RatioSampler(ratios, config.data.batch_size, 2, config.seed, config.sampler, costs)


def reference(config):
    """Plain torch: every picture of both ranks weighs the same; on one thread, as the ranks compute."""
    records = load_index(config.data.index)
    data = config.data
    crops = CropDataset(
        [load_shrunk(r.path, data.max_side) for r in records],
        data.image_size,
        data.min_crop,
        mirrored=[not r.has_text for r in records],
        colour_jitter=data.colour_jitter,
    )
    sampler = sampler_of(config)
    torch.manual_seed(config.seed)
    model = build_model(NestedAutoencoderKL, config.model)
    objective = TokenizerObjective(config.loss)
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay
    )
    losses = []
    for step in range(STEPS):
        plan = sampler.plan()
        total = sum(len(batch.indices) for batch in plan)
        optimizer.zero_grad()
        loss_of_step = 0.0
        for rank, batch in enumerate(plan):
            pictures = crops.batch(batch.indices, step_rng(config.seed, step, rank))
            pictures = pictures.to(memory_format=torch.channels_last)
            seed_step(config.seed, step, rank)
            reconstructions, posterior = model(pictures, batch.ratio, ghost_pass=True)
            loss = objective(pictures, reconstructions, posterior).total * len(batch.indices) / total
            loss.backward()
            loss_of_step += loss.item()
        optimizer.step()
        losses.append(loss_of_step)
    return model.state_dict(), losses


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ranks_with_unequal_batches_equal_plain_torch_on_all_pictures(run, one_thread):
    config = settings(run)
    sampler = sampler_of(config)
    plans = [sampler.plan() for _ in range(STEPS)]
    assert any(len(a.indices) != len(b.indices) for a, b in plans), "else nothing is shown"
    expected, losses = reference(config)
    trained = load_file(run / "weights.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(
            trained[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for rank in (0, 1):
        told = json.loads((run / f"rank{rank}.json").read_text())["metrics"]
        assert [metrics["loss"] for metrics in told] == pytest.approx(losses, rel=1e-5)


def test_a_rank_holds_the_memory_that_was_predicted(run):
    """Of torch's allocator, by the profiler: ZeRO 2 on two ranks, weights, gradients, optimiser and all."""
    config = settings(run)
    predicted = plan_memory(config, ranks=2)
    sampler = sampler_of(config)
    plans = [sampler.plan() for _ in range(STEPS)]
    expected = max(predicted.peak(plan[0].ratio, len(plan[0].indices)) for plan in plans)
    measured = json.loads((run / "rank0.json").read_text())["peak"]
    assert expected == pytest.approx(measured, rel=0.1)
