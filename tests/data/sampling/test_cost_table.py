"""Cost tables: fitting, reading and writing, and rejection of invalid ones."""

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


def test_the_error_of_the_fit_is_recorded():
    bent = fit(measured(noise=lambda f, n: 1.3 if (f, n) == (8, 2) else 1.0), {})
    assert 0.05 < bent.fit_error < 0.3


def test_superlinear_costs_get_no_negative_fixed_part():
    table = fit([Measurement(8, n, s, s, s, 1) for n, s in ((1, 1.0), (2, 2.2), (4, 4.8))], {})
    assert table.costs[8].fixed == 0
    assert 1.0 < table.costs[8].per_image < 1.2


@given(
    st.floats(0, 100, allow_subnormal=False),
    st.floats(1e-3, 100, allow_subnormal=False),
    st.integers(1, 500),
)
def test_images_within_a_budget(fixed, per_image, images):
    cost = Cost(fixed, per_image)
    assert cost.images_within(cost(images)) == images
    assert cost.images_within(cost(images) - 0.01 * per_image) == images - 1
    assert Cost(fixed, per_image).images_within(0.0) == 0


def test_a_table_makes_the_round_trip(tmp_path):
    table = fit(measured(), {"side": 128, "cpu": {"threads": 2}})
    table.write(tmp_path / "costs.json")
    assert CostTable.read(tmp_path / "costs.json") == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(costs={}), "expected costs in"),
        (lambda v: v.update(unit="eur"), "seconds or flops"),
        (lambda v: v.pop("costs"), "expected the output of cat-fast plan cost"),
        (lambda v: v["costs"]["8"].update(per_image=0), "invalid cost of ratio 8"),
        (lambda v: v["costs"]["8"].update(fixed=-1), "invalid cost of ratio 8"),
        (lambda v: v["costs"]["8"].update(per_image=float("nan")), "invalid cost of ratio 8"),
        (lambda v: v["costs"]["8"].update(slope=1), "expected the output of cat-fast plan cost"),
    ],
)
def test_an_invalid_table_is_rejected(tmp_path, change, message):
    path = tmp_path / "costs.json"
    fit(measured(), {}).write(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        CostTable.read(path)


def test_the_error_for_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"none\.json.*cat-fast plan cost"):
        CostTable.read(tmp_path / "none.json")


def test_a_missing_ratio_is_reported():
    with pytest.raises(UserError, match=r"ratio 4 is missing \(it has 8, 16, 32\)"):
        CostTable(costs=COSTS).require([4, 8])


@pytest.mark.parametrize(
    ("measurements", "message"),
    [
        ([(1, 1.0), (1, 1.1)], "at least two batch sizes"),
        ([(1, 2.0), (2, 1.0), (4, 0.5)], "did not take longer"),
    ],
)
def test_measurements_without_a_positive_slope_are_rejected(measurements, message):
    with pytest.raises(UserError, match=message):
        fit([Measurement(8, n, s, s, s, 1) for n, s in measurements], {})
