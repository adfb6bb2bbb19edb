"""Costs of a step: what is fitted, what is kept, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_fast.data.sampling.cost_table import Cost, CostTable, Measurement, fit
from cat_fast.errors import UserError

COSTS = {8: Cost(0.5, 1.153), 16: Cost(0.5, 0.592), 32: Cost(0.25, 0.497)}


def measured(costs=COSTS, images=(1, 2, 4), noise=lambda f, n: 1.0):
    return [
        Measurement(f, n, cost(n) * noise(f, n), cost(n), cost(n), 5)
        for f, cost in costs.items()
        for n in images
    ]


def test_affine_costs_are_found_exactly():
    table = fit(measured(), {"side": 128})
    for ratio, cost in COSTS.items():
        assert table.costs[ratio].fixed == pytest.approx(cost.fixed)
        assert table.costs[ratio].per_image == pytest.approx(cost.per_image)
    assert table.fit_error < 1e-9
    assert table.about == {"side": 128}


def test_the_error_of_the_fit_is_told():
    bent = fit(measured(noise=lambda f, n: 1.3 if (f, n) == (8, 2) else 1.0), {})
    assert 0.05 < bent.fit_error < 0.3


def test_a_step_whose_time_grows_faster_than_its_images_gets_no_negative_fixed_part():
    table = fit([Measurement(8, n, s, s, s, 1) for n, s in ((1, 1.0), (2, 2.2), (4, 4.8))], {})
    assert table.costs[8].fixed == 0
    assert 1.0 < table.costs[8].per_image < 1.2


@given(
    st.floats(0, 100, allow_subnormal=False),
    st.floats(1e-3, 100, allow_subnormal=False),
    st.integers(1, 500),
)
def test_as_many_images_fit_a_time_as_cost_no_more(fixed, per_image, images):
    cost = Cost(fixed, per_image)
    assert cost.images_within(cost(images)) == images
    assert cost.images_within(cost(images) - 0.01 * per_image) == images - 1
    assert Cost(fixed, per_image).images_within(0.0) == 0


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = fit(measured(), {"side": 128, "cpu": {"threads": 2}})
    table.write(tmp_path / "costs.json")
    assert CostTable.read(tmp_path / "costs.json") == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(costs={}), "no costs"),
        (lambda v: v.update(unit="eur"), "seconds or flops"),
        (lambda v: v.pop("costs"), "not what cat-fast plan cost writes"),
        (lambda v: v["costs"]["8"].update(per_image=0), "no cost of ratio 8"),
        (lambda v: v["costs"]["8"].update(fixed=-1), "no cost of ratio 8"),
        (lambda v: v["costs"]["8"].update(per_image=float("nan")), "no cost of ratio 8"),
        (lambda v: v["costs"]["8"].update(slope=1), "not what cat-fast plan cost writes"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, change, message):
    path = tmp_path / "costs.json"
    fit(measured(), {}).write(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        CostTable.read(path)


def test_a_missing_file_says_what_writes_one(tmp_path):
    with pytest.raises(UserError, match=r"none\.json.*cat-fast plan cost"):
        CostTable.read(tmp_path / "none.json")


def test_a_missing_ratio_is_named():
    with pytest.raises(UserError, match=r"lacks ratio 4 \(it has 8, 16, 32\)"):
        CostTable(costs=COSTS).require([4, 8])


@pytest.mark.parametrize(
    ("measurements", "message"),
    [
        ([(1, 1.0), (1, 1.1)], "at least two batch sizes"),
        ([(1, 2.0), (2, 1.0), (4, 0.5)], "did not take longer"),
    ],
)
def test_measurements_that_tell_no_cost_are_refused(measurements, message):
    with pytest.raises(UserError, match=message):
        fit([Measurement(8, n, s, s, s, 1) for n, s in measurements], {})
