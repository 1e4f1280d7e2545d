"""Counters of a partition: bounded however many models there were, and no total falls."""

from __future__ import annotations

from collections import Counter

import pytest

from node.kernel.limits import COUNTERS_FORMER_MAX
from node.kernel.types import ModelName
from node.outgoing import add_up_former

LIVE = (ModelName("ads", "bid"), ModelName("shop", "cart"))
OTHERS = {"events": 7, "dead_letters model_failed": 3, "inferences ads/bid": 11, "shed overload shop/cart": 5}


def totals(counters: Counter[str], tenants: bool) -> Counter[tuple[str, ...]]:
    """By what they count, and by tenant."""
    found: Counter[tuple[str, ...]] = Counter()
    for name, count in counters.items():
        what, _, model = name.rpartition(" ")
        found[(what, model.partition("/")[0]) if tenants else (what,)] += count
    return found


def former(tenants: int, models: int) -> Counter[str]:
    others = [str(number) for number in range(tenants - 1)]
    names = [f"{tenant}/churn_{number}" for tenant in ["ads", *others] for number in range(models)]
    counted = {f"{what} {name}": 1 for name in names for what in ("inferences", "shed overload")}
    return Counter(counted | OTHERS)


def test_few_counters_of_models_that_are_gone_stay_as_they_are() -> None:
    counters = former(5, COUNTERS_FORMER_MAX // 10)
    held = dict(counters)
    add_up_former(counters, LIVE)
    assert counters == held


@pytest.mark.parametrize(("tenants", "models"), [(1, 20_000), (10, 2000), (2000, 2)])
def test_many_are_added_up_by_tenant_or_else_altogether(tenants: int, models: int) -> None:
    counters = former(tenants, models)
    held = Counter(counters)
    add_up_former(counters, LIVE)
    assert len(counters) <= COUNTERS_FORMER_MAX + len(OTHERS) + 4
    assert counters.items() >= OTHERS.items()
    assert totals(counters, tenants=False) == totals(held, tenants=False)
    assert counters["inferences ads/_other"] == models
    if 2 * tenants <= COUNTERS_FORMER_MAX:
        assert totals(counters, tenants=True) == totals(held, tenants=True)
    else:
        assert counters["shed overload _other/_other"] == (tenants - 1) * models
    again = dict(counters)
    add_up_former(counters, LIVE)
    assert counters == again
