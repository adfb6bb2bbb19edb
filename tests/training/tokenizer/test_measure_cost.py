"""Cost of a step, measured or counted, and the choice of the table for balanced runs."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cat_fast.config import fill, read_yaml
from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.errors import UserError
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.tokenizer import measure_cost
from cat_fast.training.tokenizer.synthetic_step import Workload
from tests.training.thread_ranks import on_thread_ranks
from tests.training.tokenizer.balanced_worker import ROOT

TINY = [
    "model.block_out_channels=[4,4,8,8,8,8]",
    "model.norm_num_groups=2",
    "model.mid_block_attention_head_dim=8",
    "data.image_size=64",
]


def settings(*overrides, name="nano"):
    return fill(TokenizerRun, read_yaml(ROOT / f"configs/tokenizer/{name}.yaml"), list(overrides))


def test_every_ratio_and_batch_is_timed_and_fitted(monkeypatch):
    done, reported = [], []

    def timed(workload, ratio, count):
        done.append((ratio, count))
        return 0.5 + count / ratio

    monkeypatch.setattr(measure_cost, "_time", timed)
    config = settings(*TINY)
    table = measure_cost.measure(config, [1, 3], 2, on_step=reported.append)
    cells = [(f, n) for f in (8, 16, 32) for n in (1, 3)]
    assert done == cells * 3
    assert len(reported) == measure_cost.num_timed_steps(config, [1, 3], 2) == 18
    for ratio in (8, 16, 32):
        assert table.costs[ratio].fixed == pytest.approx(0.5)
        assert table.costs[ratio].per_image == pytest.approx(1 / ratio)
    assert [(m.ratio, m.images, m.repeats) for m in table.measured] == [(f, n, 2) for f, n in cells]
    assert table.unit == "seconds"


def test_a_measured_step_trains_both_models():
    torch.manual_seed(0)
    workload = Workload(settings(*TINY, "loss.r1_weight=1.0"), "cpu")
    models = (workload.model, workload.discriminator)
    first_layers = (workload.model.encoder.conv_in.weight, workload.discriminator.b32.conv0.weight)
    before = [weight.detach().clone() for weight in first_layers]
    workload.step(workload.batch(32, 2))
    assert not any(map(torch.equal, before, first_layers))
    for model in models:
        # The ghost pass also gives parameters of other ratios a gradient.
        assert len(workload.optimizers[model].state) == len(list(model.parameters()))
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("batches", "side", "message"),
    [
        ([2], 64, "at least two"),
        ([0, 1], 64, "at least two"),
        ([1, 2], 40, "not a multiple of the ratio 32"),
    ],
)
def test_invalid_batches_and_image_sizes_are_refused(batches, side, message):
    with pytest.raises(UserError, match=message):
        measure_cost.measure(settings(*TINY, f"data.image_size={side}"), batches, 1)


def test_counted_operations_are_affine_in_the_number_of_images():
    config = settings(*TINY)
    table = measure_cost.count_operations(config)
    assert table.unit == "flops"
    with FakeTensorMode():
        workload = Workload(config, "cpu")
        assert table.costs[16](5) == measure_cost._operations(workload, 16, 5)
    assert all(one.fixed > 0 for one in table.costs.values()), "the ghost pass, whatever the batch"


@pytest.mark.slow
@pytest.mark.slow
def test_counted_operations_are_about_three_forward_passes():
    """The paper's model only; its forward multiply-accumulates are in docs/models.md."""
    without = ["loss.perceptual_weight=0", "loss.features_weight=0", "loss.gan_weight=0"]
    table = measure_cost.count_operations(settings(*without, name="cat_c16"))
    for ratio, gmac in {8: 1154, 16: 592, 32: 497}.items():
        assert table.costs[ratio].per_image == pytest.approx(3 * 2 * gmac * 1e9, rel=0.06)


def test_balanced_run_uses_its_table_or_reports_counted_operations(tmp_path, capsys):
    assert measure_cost.load_costs(settings(*TINY), Ranks()) is None
    given = CostTable(costs={f: Cost(0.0, 1 / f) for f in (8, 16, 32)})
    given.write(tmp_path / "costs.json")
    measured = settings(*TINY, "sampler.mode=balanced", f"sampler.cost_table={tmp_path / 'costs.json'}")
    assert measure_cost.load_costs(measured, Ranks()) == given
    assert capsys.readouterr().out == ""
    counted = measure_cost.load_costs(settings(*TINY, "sampler.mode=balanced"), Ranks())
    assert counted is not None
    assert counted.unit == "flops"
    assert "counted operations, not by time" in capsys.readouterr().out


def test_all_ranks_use_the_table_of_rank_0(tmp_path):
    given = CostTable(costs={f: Cost(0.0, 1 / f) for f in (8, 16, 32)})
    given.write(tmp_path / "costs.json")

    def table_of(ranks: Ranks) -> CostTable | None:
        name = "not_there.json" if ranks.rank else "costs.json"
        return measure_cost.load_costs(
            settings(*TINY, "sampler.mode=balanced", f"sampler.cost_table={tmp_path / name}"), ranks
        )

    assert on_thread_ranks(2, table_of) == [given, given]


def test_default_batches_surround_the_configured_size():
    assert measure_cost.default_batches(8) == [4, 8, 12]
    assert measure_cost.default_batches(1) == [1, 2, 3]
