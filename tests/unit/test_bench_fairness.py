"""What the fairness benchmark computes, and its first-come stand-in, from made-up runs whose answer is known."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts" / "bench"))

import first_come
import light_tenant
import neighbours
import shares

from node.kernel.types import EventSchema
from tenants.manifest import parse_manifest

amounts = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20)


@given(amounts)
def test_jain_is_between_one_of_n_and_one_and_knows_no_unit(values: list[float]) -> None:
    index = shares.jain(values)
    assert 1 / len(values) - 1e-9 <= index <= 1 + 1e-9
    assert shares.jain([7 * value for value in values]) == pytest.approx(index)


def test_jain_of_equal_shares_is_one_of_one_taker_one_of_n_and_of_nothing_unknown() -> None:
    assert shares.jain([3.0] * 10) == pytest.approx(1.0)
    assert shares.jain([5.0] + [0.0] * 9) == pytest.approx(0.1)
    assert math.isnan(shares.jain([0.0, 0.0]))


def test_windows_see_what_the_whole_run_hides() -> None:
    """Two tenants take turns of 10 s: equal over 20 s, and all for one in a window of 10 s."""
    times = [float(second) for second in range(41)]
    first = np.cumsum([0] + [1.0 if second // 10 % 2 == 0 else 0.0 for second in range(40)])
    totals = np.stack([first, np.array(times) - first], axis=1)
    assert min(shares.jain_by_window(times, totals, [1, 1], 10.0)) == pytest.approx(0.5)
    assert shares.jain_by_window(times, totals, [1, 1], 20.0) == pytest.approx([1.0] * 21)


def test_a_window_starts_at_every_sample_and_is_never_shorter_than_stated() -> None:
    times = [0.0, 4.0, 9.9, 10.1, 14.5, 20.5]
    totals = np.array([[0.0, 0.0], [4, 8], [9, 18], [10, 20], [14, 28], [20, 40]])
    assert shares.jain_by_window(times, totals, [1, 2], 10.0) == pytest.approx([1.0, 1.0, 1.0, 1.0])
    assert shares.jain_by_window(times, totals, [1, 1], 10.0)[0] == pytest.approx(0.9)


def test_percentiles_and_ratios() -> None:
    assert shares.percentile(list(range(101)), 99) == pytest.approx(99.0)
    assert math.isnan(shares.percentile([], 99))
    rounds = {"alone": [10.0, 20.0, 10.0], "heavy": [11.0, 24.0, 30.0], "crash": [10.0, 20.0, 11.0]}
    assert shares.median_ratios(rounds, "alone") == pytest.approx({"heavy": 1.2, "crash": 1.0})
    assert shares.worst({"heavy": 1.2, "crash": 1.0}) == 1.2
    assert math.isnan(shares.worst({"heavy": 1.2, "crash": math.nan}))


def test_the_rows_of_equal_work_take_each_tenants_share_of_the_time() -> None:
    rows = shares.rows_for(10.0, {"cheap": 1.0, "dear": 4.0}, {"cheap": 1e-6, "dear": 5e-3})
    assert rows == {"cheap": 2_000_000, "dear": 1600}


def test_first_come_runs_whole_tickets_in_the_order_they_came_whatever_the_weights() -> None:
    scheduler = first_come.FirstCome(1)
    for tenant, weight in (("ads", 1.0), ("fraud", 5.0)):
        scheduler.add_tenant(tenant, weight)
        scheduler.add_model(tenant, "a")
    order = ["ads", "ads", "fraud", "ads", "fraud", "fraud"]
    for number, tenant in enumerate(order):
        scheduler.enqueue(number, tenant, "a", 10)
    came = []
    while (dispatch := scheduler.next()) is not None:
        assert scheduler.next() is None
        came.append((dispatch.parts[0].ticket, dispatch.tenant, dispatch.rows))
        scheduler.complete(dispatch, 0.5)
    assert came == [(number, tenant, 10) for number, tenant in enumerate(order)]


@pytest.mark.parametrize("arm", ["alone", "heavy", *light_tenant.BROKEN])
def test_neighbours_ask_for_more_than_there_is_and_the_light_tenant_for_the_same_in_every_arm(arm: str) -> None:
    rates = light_tenant.rates(arm)
    assert rates["light"] == light_tenant.LIGHT_PER_S
    assert rates.keys() <= set(light_tenant.TYPES)
    costs = dict(zip(light_tenant.HEAVY, light_tenant.HEAVY_COSTS_S, strict=True))
    asked = sum(rates[name] * cost for name, cost in costs.items() if name in rates)
    assert len(rates) == (1 if arm == "alone" else 10)
    assert arm == "alone" or asked > 1.0


def test_manifests_are_valid_and_fit_the_models() -> None:
    schema = EventSchema(light_tenant.TYPES, {"amount": "number"})
    for name in light_tenant.TYPES:
        parsed = parse_manifest("score.toml", name, "score", light_tenant.manifest(name).encode(), schema)
        assert tuple(feature.name for feature in parsed.features) == neighbours.COLUMNS


def test_broken_models_are_harmless_until_their_row_comes() -> None:
    class Told(neighbours.Broken):
        def misbehave(self) -> None:
            raise RuntimeError("broken")

    rows = np.zeros((4, len(neighbours.COLUMNS)))
    assert Told().predict(rows).tolist() == [0.0] * 4
    rows[2, 0] = neighbours.TRIGGER
    with pytest.raises(RuntimeError, match="broken"):
        Told().predict(rows)
