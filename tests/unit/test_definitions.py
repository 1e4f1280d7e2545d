"""Shared features: what a features.toml may say, who may use it, and that nobody loses what he uses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.kernel import limits
from node.kernel.errors import ManifestError
from node.kernel.types import Aggregate, EventColumns, EventSchema, FeatureRows, ModelName, StoredOutput
from tenants.definitions import NOTHING_SHARED, Definitions, compile_definitions, replaced
from tenants.features import compile_plan
from tenants.manifest import Manifest, parse_manifest
from tenants.shared_names import SharedName

SCHEMA = EventSchema(("buy", "view"), {"amount": "number", "shop": "text"})


def entry(name: str, expression: str, version: int = 1, **more: str) -> str:
    lines = [f"[features.{name}]", f"version = {version}", f'expression = "{expression}"', 'description = "x"']
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in more.items())]) + "\n"


def model(tenant: str, *features: str, name: str = "m", shared: Definitions = NOTHING_SHARED) -> Manifest:
    lines = [f'f{place} = "{feature}"' for place, feature in enumerate(features)]
    text = "\n".join(['on = ["buy"]', "[features]", *lines])
    return parse_manifest(f"{name}.toml", tenant, name, text.encode(), SCHEMA, shared.resolver(tenant))


def problems(files: dict[str, str]) -> list[str]:
    return [line for lines in compile_definitions(files, SCHEMA).problems.values() for line in lines]


def test_a_file_of_more_mistakes_than_anybody_reads_is_refused_at_once() -> None:
    """Each costs a guess at what was meant, while the node's loop waits."""
    text = "".join(entry(f"f{number}", "features.growth.g + features.growth.h") for number in range(200))
    with pytest.raises(ManifestError) as refused:
        replaced(NOTHING_SHARED, "growth", text, [], SCHEMA)
    assert len(refused.value.problems) == 101
    assert refused.value.problems[-1] == "features.toml: there may be more mistakes; mend these first"
    assert len(problems({"growth": text})) == 400, "of what is in force, each feature is looked at"


SPEND = entry("spend", "sum(buy.amount, '30d')")
MEAN = entry("mean", "features.growth.spend / count(buy, '30d')")


def test_a_model_sees_what_other_tenants_share_newest_or_by_version() -> None:
    text = entry("spend", "sum(buy.amount, '7d')", 2, earlier="{ 1 = \"sum(buy.amount, '30d')\" }")
    shared = compile_definitions({"gro-wth": text}, SCHEMA)
    assert shared.problems == {}
    user = model("ads", "features.gro_wth.spend", "features['gro-wth'].spend.v1", shared=shared)
    day_ms = 86_400_000
    assert shared.aggregates(user) == {
        Aggregate("sum", "buy", "amount", 7 * day_ms),
        Aggregate("sum", "buy", "amount", 30 * day_ms),
    }


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("features.growth.spent", "did you mean 'spend'"),
        ("features.other.spend", "no tenant shares features.other.spend"),
        ("features.growth.spend.v3", "there is v1"),
        ("features.growth.secret", "not shared with tenant ads"),
        ("features.growth", "features.<tenant>.<name>"),
        ("features.growth.spend.two", "features.<tenant>.<name>"),
        ("features.growth.shop + 1", "text"),
    ],
)
def test_what_can_not_be_used_is_refused_with_the_reason(expression: str, told: str) -> None:
    text = SPEND + entry("secret", "event.amount", shared_with='["fraud"]') + entry("shop", "event.shop")
    shared = compile_definitions({"growth": text}, SCHEMA)
    with pytest.raises(ManifestError, match="feature 'f0'") as caught:
        model("ads", expression, shared=shared)
    assert told in str(caught.value)
    model("fraud", "features.growth.secret", shared=shared)
    model("growth", "features.growth.secret", shared=shared)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[features", "not TOML"),
        ("spend = 1", "unknown key 'spend'"),
        ("[features.spend]\nversion = 1\n", "expression"),
        (entry("spend", "event.nothing"), "unknown event field"),
        (entry("9lives", "event.amount"), "not starting with a digit"),
        (entry("spend", "event.amount", earlier='{ 1 = "event.amount" }'), "earlier takes versions from 1 to 0"),
        (entry("spend", "features.growth.spend + 1"), "needs itself"),
        (entry("a", "features.growth.b") + entry("b", "features.growth.a"), "growth.a.v1 -> features.growth.b.v1 ->"),
    ],
)
def test_a_file_is_refused_with_each_mistake(text: str, told: str) -> None:
    assert told in "\n".join(problems({"growth": text}))
    with pytest.raises(ManifestError):
        replaced(NOTHING_SHARED, "growth", text, [], SCHEMA)


def test_a_chain_is_bounded_and_tenants_that_read_alike_are_refused() -> None:
    most = limits.SHARED_FEATURE_CHAIN_MAX + 3
    chain = entry("f0", "event.amount") + "".join(
        entry(f"f{place}", f"features.growth.f{place + 1} + 1") for place in range(1, most)
    )
    chain += entry(f"f{most}", "event.amount")
    assert "a chain of more than" in "\n".join(problems({"growth": chain}))
    assert "rename one" in "\n".join(problems({"a-b": SPEND, "a_b": SPEND}))


def test_what_others_use_is_not_taken_away() -> None:
    shared = compile_definitions({"growth": SPEND, "ads": MEAN}, SCHEMA)
    assert shared.problems == {}
    user = model("fraud", "features.growth.spend", name="coupon", shared=shared)
    for text in ("", entry("other", "event.amount")):
        with pytest.raises(ManifestError) as caught:
            replaced(shared, "growth", text, [user], SCHEMA)
        assert "features.growth.spend is used by features.ads.mean.v1, fraud/coupon" in str(caught.value)
    narrowed = SPEND + 'shared_with = ["ads"]\n'
    with pytest.raises(ManifestError, match=r"used by fraud/coupon.*not shared with tenant fraud"):
        replaced(shared, "growth", narrowed, [user], SCHEMA)
    with pytest.raises(ManifestError, match="it would be a text, no number"):
        replaced(shared, "growth", entry("spend", "event.shop", 2), [user], SCHEMA)
    without_mean = replaced(shared, "ads", "", [user], SCHEMA)
    assert replaced(without_mean, "growth", "", [], SCHEMA).features == {}


def test_a_version_never_means_something_else_and_a_ring_over_tenants_is_refused() -> None:
    shared = compile_definitions({"growth": SPEND, "ads": MEAN}, SCHEMA)
    with pytest.raises(ManifestError, match="version 1 would mean something else"):
        replaced(shared, "growth", entry("spend", "sum(buy.amount, '7d')"), [], SCHEMA)
    newer = entry("spend", "sum(buy.amount, '7d')", 2)
    after = replaced(shared, "growth", newer, [], SCHEMA)
    found = after.find(SharedName("growth", "spend"))
    assert found is not None
    assert found.name.version == 2
    with pytest.raises(ManifestError, match="needs itself"):
        replaced(shared, "growth", entry("spend", "features.ads.mean + 1", 2), [], SCHEMA)


class Reads:
    """Counts how often each column is asked for."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked: list[object] = []

    def aggregate(self, aggregate: Aggregate) -> np.ndarray:
        self.asked.append(aggregate)
        return np.arange(self.count, dtype=np.float64)

    def stored(self, output: StoredOutput) -> np.ndarray:
        self.asked.append(output)
        return np.full(self.count, 0.5)


def events(count: int) -> EventColumns:
    zeros, numbers = np.zeros(count, np.int64), np.arange(count)
    shop = np.array([f"s{number % 3}" for number in range(count)], object)
    fields = {"amount": np.arange(count, dtype=np.float64), "shop": shop}
    customers = [str(number) for number in range(count)]
    return EventColumns(zeros, numbers, numbers, customers, zeros, numbers, fields)


def test_what_is_shared_is_computed_once_for_all_and_is_what_each_would_compute() -> None:
    shared = compile_definitions({"growth": SPEND + entry("shop", "event.shop"), "ads": MEAN}, SCHEMA)
    users = [
        model(tenant, "features.ads.mean * 2", "features.growth.spend", "features.growth.shop", shared=shared)
        for tenant in ("ads", "fraud", "zoo")
    ]
    own = model("own", "(sum(buy.amount, '30d') / count(buy, '30d')) * 2", "sum(buy.amount, '30d')", "event.shop")
    every = [*users, own]
    ticks = iter(range(10_000))
    plan = compile_plan([(one.version("ab" * 32), one) for one in every], SCHEMA, shared, lambda: float(next(ticks)))
    reads, batch = Reads(7), events(7)
    rows = plan.rows(batch, reads, {one.name: np.ones(7, np.bool_) for one in every})
    assert len(reads.asked) == len(set(reads.asked)) == 2
    expected = rows[own.name]
    for user in users:
        found: FeatureRows = rows[user.name]
        assert found.numbers.tobytes() == expected.numbers.tobytes()
        assert found.texts == expected.texts
    costs = plan.shared_costs()
    assert {str(name) for name in costs} == {
        "features.ads.mean.v1",
        "features.growth.spend.v1",
        "features.growth.shop.v1",
    }
    assert {cost.values for cost in costs.values()} == {7}
    assert costs[SharedName("ads", "mean", 1)].seconds > costs[SharedName("growth", "spend", 1)].seconds


def test_what_is_not_shared_any_more_is_missing_where_a_version_is_fallen_back_to() -> None:
    shared = compile_definitions({"growth": SPEND + entry("shop", "event.shop")}, SCHEMA)
    user = model("ads", "features.growth.spend + 1", "features.growth.shop", shared=shared)
    plan = compile_plan([(user.version("ab" * 32), user)], SCHEMA)
    rows = plan.rows(events(2), Reads(2), {user.name: np.ones(2, np.bool_)})[ModelName("ads", "m")]
    assert np.isnan(rows.numbers).all()
    assert rows.texts == {"f1": [None, None]}


@given(st.permutations(["growth", "ads", "fraud"]), st.integers(0, 5))
def test_what_is_in_force_follows_from_the_texts_alone(tenants: list[str], uses: int) -> None:
    texts = {
        "growth": SPEND + (entry("deep", "features.fraud.base") if uses & 1 else ""),
        "ads": MEAN,
        "fraud": entry("base", "features.growth.deep" if uses & 4 else "event.amount"),
    }
    one = compile_definitions({tenant: texts[tenant] for tenant in tenants}, SCHEMA)
    other = compile_definitions(texts, SCHEMA)
    assert (one.features, one.problems) == (other.features, other.problems)
    for feature in one.features.values():
        for value in feature.uses:
            found = one.find(value.feature)
            assert found is not None
            assert found.place < feature.place
