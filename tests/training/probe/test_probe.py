"""The probe: its gradients at mixed ratios, and runs that equal plain torch and survive an interruption."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cat_fast.errors import UserError
from cat_fast.evaluation.classification.arrays import writing
from cat_fast.training.config.settings import ProbeRun
from cat_fast.training.probe.model import Probe
from cat_fast.training.probe.task import PREDICTIONS, ProbeTask
from cat_fast.training.runtime.engine import learning_rate
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import epoch_order
from tests.cli.conftest import tiny_tokenizer
from tests.training.rank_processes import run_ranks

COUNT, WIDTH = 20, 6


@pytest.fixture
def arrays(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        with writing(tmp_path / split, COUNT, (WIDTH,), np.float32, {"split": split}) as writer:
            writer.classes = ["a", "b", "c"]
            for number in range(COUNT):
                writer.add(random.normal(size=WIDTH) + number % 3, number % 3, 16)
    return tmp_path


def arguments(arrays, out, *more):
    return [
        "configs/probe/linear.yaml",
        f"output_dir={out}",
        f"data.train={arrays / 'train'}",
        f"data.test={arrays / 'test'}",
        "data.batch_size=8",
        "optimizer.lr=0.05",
        "schedule.warmup_steps=2",
        "schedule.total_steps=6",
        *more,
    ]


def by_hand(arrays, steps):
    """The same training in plain torch."""
    inputs, labels = (
        torch.from_numpy(np.load(arrays / "train" / f"{name}.npy")) for name in ("inputs", "labels")
    )
    torch.manual_seed(0)
    head = Probe(WIDTH, 3, None, pooled=False).head
    config = ProbeRun(task="probe", output_dir="x")
    config.schedule.total_steps, config.schedule.warmup_steps = 6, 2
    config.schedule.kind, config.schedule.min_ratio = "cosine", 0.0
    adamw = torch.optim.AdamW(head.parameters(), lr=0.05, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(steps):
        order = np.random.default_rng([0, step // 3]).permutation(COUNT)
        rows = order[step % 3 * 8 : (step % 3 + 1) * 8]
        adamw.param_groups[0]["lr"] = learning_rate(0.05, config.schedule, step)
        adamw.zero_grad()
        F.cross_entropy(head(inputs[rows]), labels[rows]).backward()
        adamw.step()
    return head


def test_a_run_equals_plain_torch_on_one_and_two_ranks_and_after_resuming(arrays, tmp_path):
    expected = by_hand(arrays, 6)
    test = torch.from_numpy(np.load(arrays / "test" / "inputs.npy"))
    for name, ranks in (("one", 1), ("two", 2)):
        run_ranks("tests.training.runs:train_as_rank", ranks, *arguments(arrays, tmp_path / name))
        head = load_file(tmp_path / name / "model" / "head.safetensors")
        torch.testing.assert_close(head["weight"], expected.weight.detach(), rtol=1e-4, atol=1e-6)
        predictions = np.load(tmp_path / name / "model" / PREDICTIONS)
        np.testing.assert_array_equal(predictions, expected(test).argmax(1).numpy())
    halfway = arguments(arrays, tmp_path / "three", "checkpoint.every_steps=1")
    run_ranks("tests.training.runs:train_as_rank", 1, *halfway, "schedule.total_steps=3")
    run_ranks("tests.training.runs:train_as_rank", 1, *halfway)
    assert (tmp_path / "three" / "model" / PREDICTIONS).is_file()


def test_fine_tuning_gives_every_ratio_gradients(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    probe = Probe(4 * 8 * 8, 3, tmp_path, pooled=False)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    logits = probe(images, torch.tensor([8, 32, 8]))
    logits.sum().backward()
    trained = {name for name, p in probe.named_parameters() if p.requires_grad}
    assert {name for name, p in probe.named_parameters() if p.grad is not None} == trained
    alone = probe(images[1:2], torch.tensor([32]))
    torch.testing.assert_close(alone[0], logits[1], rtol=1e-4, atol=1e-5)


def test_fine_tuning_changes_the_encoder_and_not_the_decoder(tmp_path):
    model = tiny_tokenizer()
    model.save_pretrained(tmp_path / "tokenizer")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        with writing(tmp_path / split, 6, (3, 64, 64), np.uint8, {"split": split}) as writer:
            writer.classes = ["a", "b"]
            for number in range(6):
                writer.add(random.integers(0, 256, (3, 64, 64)), number % 2, (8, 16)[number % 2])
    run_ranks(
        "tests.training.runs:train_as_rank", 1, *arguments(tmp_path, tmp_path / "run"),
        f"finetune={tmp_path / 'tokenizer'}", "optimizer.lr=0.001", "schedule.total_steps=2",
    )  # fmt: skip
    after = type(model).from_pretrained(tmp_path / "run" / "model" / "tokenizer")
    assert not torch.equal(after.encoder.conv_in.weight, model.encoder.conv_in.weight)
    assert torch.equal(after.decoder.conv_in.weight, model.decoder.conv_in.weight)


def test_unusable_arrays_are_refused(arrays, tmp_path):
    run = ProbeRun(task="probe", output_dir=str(tmp_path / "run"))
    run.data.train, run.data.test = str(arrays / "train"), str(tmp_path / "missing")
    with pytest.raises(UserError, match="no labelled arrays"):
        ProbeTask(run, Ranks())
    with writing(tmp_path / "other", 1, (WIDTH + 1,), np.float32, {}) as writer:
        writer.classes = ["a", "b", "c"]
        writer.add(np.zeros(WIDTH + 1), 0, 8)
    run.data.test = str(tmp_path / "other")
    with pytest.raises(UserError, match="same classes and sizes"):
        ProbeTask(run, Ranks())


def test_the_rehearsal_runs_in_the_precision_of_the_run():
    task, seen = ProbeTask.__new__(ProbeTask), []
    task.config = ProbeRun(task="probe", output_dir="unused", precision="bf16")
    task.ranks, task.train, task.model = Ranks(), range(4), torch.nn.Linear(2, 2)

    def loss(model, batch):
        logits = model(torch.ones(len(batch), 2))
        seen.append(logits.dtype)
        return logits.float().sum(), torch.zeros(())

    task._loss = loss
    task.largest_step().run()
    assert seen == [torch.bfloat16]


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch):
    task = ProbeTask.__new__(ProbeTask)
    task.config = ProbeRun(task="probe", output_dir="unused", seed=11)
    task.config.data.batch_size = 8
    task.ranks, task.train = Ranks(), range(COUNT)
    orders = [np.random.default_rng([11, epoch]).permutation(COUNT) for epoch in (0, 1)]
    drawn, default_rng = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or default_rng(seed))
    epoch_order.cache_clear()
    for step in range(6):
        task.draw(step)
        rows = orders[step // 3][step % 3 * 8 : (step % 3 + 1) * 8]
        np.testing.assert_array_equal(task._batch, np.sort(rows))
    assert drawn == [[11, 0], [11, 1]]
