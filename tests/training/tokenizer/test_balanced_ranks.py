"""Two ranks with unequal batches match plain torch on all their images, and the predicted memory."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cat_fast.data.image_batch import ImageBatch
from cat_fast.models.build import build_model
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.losses import TokenizerObjective
from cat_fast.training.runtime.seeding import seed_step
from cat_fast.training.tokenizer.image_source import make_source
from cat_fast.training.tokenizer.predict_memory import plan_memory
from tests.training.rank_processes import run_ranks
from tests.training.thread_ranks import on_thread_ranks
from tests.training.tokenizer.balanced_worker import STEPS, settings

WORKER = "tests.training.tokenizer.balanced_worker:main"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run on two ranks."""
    folder = tmp_path_factory.mktemp("balanced")
    settings(folder)
    run_ranks(WORKER, 2, folder)
    return folder


def drawn(config) -> list[list[ImageBatch]]:
    """Return the batches of both ranks for each step."""
    sources = on_thread_ranks(2, lambda ranks: make_source(config, ranks))
    return [[source.batch().on(torch.device("cpu")) for source in sources] for _ in range(STEPS)]


def reference(config):
    """Train in plain torch, with equal weights for all images of both ranks; return weights and losses."""
    torch.manual_seed(config.seed)
    model = build_model(NestedAutoencoderKL, config.model)
    objective = TokenizerObjective(config.loss)
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay
    )
    losses = []
    for step, batches in enumerate(drawn(config)):
        total = sum(batch.count for batch in batches)
        optimizer.zero_grad()
        loss_of_step = 0.0
        for rank, batch in enumerate(batches):
            seed_step(config.seed, step, rank)
            reconstructions, posterior = model.reconstruct(batch.images, batch.ratio, ghost_pass=True)
            loss = objective(batch.images, reconstructions, posterior).total * batch.count / total
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


def test_ranks_with_unequal_batches_equal_plain_torch_on_all_images(run, one_thread):
    config = settings(run)
    assert any(a.count != b.count for a, b in drawn(config)), "the batches must be unequal for this test"
    expected, losses = reference(config)
    trained = load_file(run / "weights.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(
            trained[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for rank in (0, 1):
        metrics = json.loads((run / f"rank{rank}.json").read_text())["metrics"]
        assert [record["loss"] for record in metrics] == pytest.approx(losses, rel=1e-5)


def test_peak_memory_of_a_rank_equals_the_prediction(run):
    """Profiler's peak of torch's allocator, under ZeRO 2 on two ranks, including the optimizers' state."""
    config = settings(run)
    predicted = plan_memory(config, ranks=2)
    expected = max(predicted.peak(batch.ratio, batch.count) for batch, _ in drawn(config))
    measured = json.loads((run / "rank0.json").read_text())["peak"]
    assert expected == pytest.approx(measured, rel=0.1)
