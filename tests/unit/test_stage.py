"""Stages: what a manifest may ask for, whom a canary serves, what is seen of a version, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel.errors import ManifestError
from node.kernel.limits import STAGES_MAX
from node.kernel.types import EventSchema, ModelName, ModelOutputs
from node.staging import of_canary
from tenants.comparison import Comparison, Figures, Sketch, merged
from tenants.judge import judge
from tenants.manifest import Manifest, parse_manifest
from tenants.stage import Stage

SCHEMA = EventSchema(("transaction",), {"amount": "number"})
MODEL = ModelName("shop", "spend")


def parsed(stages: str, head: str = 'on = ["transaction"]') -> Manifest:
    text = f'{head}\n[rollout]\nstages = {stages}\n[features]\nx = "count(transaction)"\n'
    return parse_manifest("spend.toml", "shop", "spend", text.encode(), SCHEMA)


def test_a_manifest_says_what_a_version_goes_through() -> None:
    manifest = parsed(
        '[{ stage = "shadow", rows_min = 9, agreement_min = 0.9, tolerance = 0.1, drift_max = 0.2 },'
        ' { stage = "canary", share = 0.25, time_min = "10m", error_rate_max = 0, p99_ms_max = 5, cost_ratio_max = 2 }]'
    )
    shadow, canary = manifest.rollout
    assert shadow == Stage("shadow", rows_min=9, agreement_min=0.9, tolerance=0.1, drift_max=0.2)
    assert canary == Stage("canary", 0.25, time_min_ms=600_000, error_rate_max=0.0, p99_ms_max=5.0, cost_ratio_max=2.0)
    assert [str(stage) for stage in manifest.rollout] == ["shadow", "canary 0.25"]
    assert parse_manifest("m.toml", "t", "m", b'on="any"\n[features]\nx="event.amount"', SCHEMA).rollout == ()


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        ("[]", f"1 to {STAGES_MAX}"),
        ('[{ stage = "dark" }]', 'stage = "shadow" or "canary"'),
        ('[{ stage = "shadow", rows_mim = 1 }]', "did you mean 'rows_min'"),
        ('[{ stage = "shadow", share = 0.1 }]', "only a canary has it"),
        ('[{ stage = "canary", share = 0.1, agreement_min = 0.9 }]', "only a shadow has it"),
        ('[{ stage = "canary" }]', "share must be a number"),
        ('[{ stage = "canary", share = 0.5 }, { stage = "canary", share = 0.1 }]', "must not be below 0.5"),
        ('[{ stage = "shadow", time_min = "soon" }]', "is not a duration"),
        ('[{ stage = "shadow", error_rate_max = 2 }]', "from 0 to 1"),
        ('"shadow"', "must hold one list"),
    ],
)
def test_mistakes_are_told_with_their_place(stages: str, why: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parsed(stages)
    assert why in str(caught.value.problems)
    assert all(problem.startswith("spend.toml: rollout") for problem in caught.value.problems)


def test_interval_models_have_no_stages() -> None:
    with pytest.raises(ManifestError, match="leave it out of an interval model"):
        parsed('[{ stage = "shadow" }]', 'every = "1d"')


# Whom a canary serves


@settings(deadline=None)
@given(st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.lists(st.text(min_size=1, max_size=20), unique=True))
def test_a_customer_stays_with_the_canary_whatever_others_do_and_as_its_share_grows(
    one: float, other: float, customers: list[str]
) -> None:
    small, large = sorted((one, other))
    few, many = of_canary(customers, MODEL, small), of_canary(customers, MODEL, large)
    assert not (few & ~many).any()
    assert [bool(of_canary([customer], MODEL, small)[0]) for customer in customers] == few.tolist()
    assert of_canary(customers, MODEL, 1.0).all()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("form", ["{}", "customer-{}", "{:010d}", "{}@example.org"])
def test_a_canary_serves_about_its_share_however_customers_are_named(share: float, form: str) -> None:
    count = 40_000
    customers = [form.format(number) for number in range(count)]
    found = int(of_canary(customers, MODEL, share).sum())
    assert abs(found - count * share) < 5 * (count * share * (1 - share)) ** 0.5, "five standard deviations"
    others = of_canary(customers, ModelName("shop", "risk"), share)
    both = int((of_canary(customers, MODEL, share) & others).sum())
    assert both < count * share * (share + 0.05) + 50, "not the same customers for every model"


# What is seen


def outputs(
    values: list[float] | np.ndarray, errors: Mapping[int, str] | None = None, cpu: float = 0.0
) -> ModelOutputs:
    column = np.asarray(values, np.float64).reshape(-1, 1)
    return ModelOutputs(column, errors or {}, cpu, call_seconds=0.002)


def test_rows_agree_within_the_tolerance_and_failures_of_the_live_version_are_not_compared() -> None:
    comparison = Comparison(3, tolerance=0.1)
    comparison.both_gave(
        outputs([1.0, 100.0, 0.5, np.nan, 7.0, np.nan], {5: "live fails"}, cpu=1.0),
        outputs([1.05, 109.0, 0.7, np.nan, 7.0, 1.0], {4: "shadow fails"}, cpu=3.0),
    )
    comparison.dropped(4)
    seen = comparison.figures()
    assert (seen.stage, seen.rows, seen.errors, seen.live_rows, seen.live_errors) == (3, 6, 1, 6, 1)
    assert (seen.compared, seen.agreed, seen.dropped) == (5, 3, 4)
    assert seen.cost_ratio == 3.0
    assert 2.0 <= seen.p99_ms <= 2.0 * 2 ** (1 / 8)


@given(st.lists(st.floats(1e-5, 1e8), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_is_at_most_nine_per_cent_high(values: list[float], share: float) -> None:
    sketch = Sketch()
    sketch.add(np.array(values))
    exact = float(np.quantile(values, share, method="inverted_cdf"))
    assert exact * (1 - 1e-9) <= sketch.quantile(share) <= exact * 2 ** (1 / 8) * (1 + 1e-9)


def test_drift_is_none_between_equal_and_all_between_distant_outputs() -> None:
    one, other = Sketch(), Sketch()
    random = np.random.default_rng(1)
    one.add(random.normal(size=5000))
    assert one.distance(other) == 0.0, "nothing is known yet"
    other.add(random.normal(size=5000))
    assert one.distance(other) < 0.05
    distant = Sketch()
    distant.add(100 + random.normal(size=5000))
    assert one.distance(distant) > 0.99
    endless = Sketch()
    endless.add(np.array([np.nan, np.inf, -np.inf, 1e300]))
    assert endless.total == 4


def test_figures_of_nodes_add_up_and_the_worst_latency_counts() -> None:
    one = Figures(1, rows=10, errors=1, cpu_seconds=0.5, p99_ms=3.0, drift=0.5)
    other = Figures(1, rows=30, errors=0, cpu_seconds=1.5, p99_ms=9.0, drift=0.1)
    found = merged([one, Figures(0, rows=999), other], 1)
    assert (found.rows, found.errors, found.cpu_seconds, found.p99_ms, found.drift) == (40, 1, 2.0, 9.0, 0.2)
    assert merged([], 2) == Figures(2)


def test_a_node_that_saw_next_to_nothing_tells_next_to_nothing_of_drift_and_latency() -> None:
    many = Figures(1, rows=1000, live_rows=1000, drift=0.02, p99_ms=5.0, live_p99_ms=4.0)
    found = merged([many, Figures(1, rows=1, live_rows=1, drift=1.0, p99_ms=900.0, live_p99_ms=800.0)], 1)
    assert found.drift == pytest.approx(0.02, abs=0.001)
    assert (found.p99_ms, found.live_p99_ms) == (5.0, 4.0)
    few = [Figures(1, rows=rows, p99_ms=p99) for rows, p99 in ((3, 7.0), (5, 2.0))]
    assert merged(few, 1).p99_ms == 7.0, "of few rows in all, the worst"


# What follows

STAGE = Stage("shadow", rows_min=100, time_min_ms=5000, agreement_min=0.9, error_rate_max=0.05, drift_max=0.3)
GOOD = Figures(0, rows=100, live_rows=100, compared=100, agreed=95, cpu_seconds=1.0, live_cpu_seconds=1.0)


def changed(**fields: Any) -> Figures:
    return Figures(**{**{name: getattr(GOOD, name) for name in Figures.__struct_fields__}, **fields})


def decision(figures: Figures, seconds: float = 9.0, stage: Stage = STAGE) -> tuple[str, str]:
    verdict = judge(stage, figures, seconds)
    return verdict.decision, verdict.reason


def test_a_version_that_holds_every_condition_goes_on_once_time_has_passed() -> None:
    assert decision(GOOD) == (
        "promote",
        "stage shadow held: 100 rows, error rate 0, agreement 0.95, cost ratio 1, drift 0, p99 0 ms a call",
    )
    assert decision(GOOD, 4.0) == ("keep", "4 of 5 s passed")
    assert decision(changed(rows=99)) == ("keep", "99 of 100 rows seen")
    assert decision(changed(compared=0, agreed=0))[0] == "keep"
    assert decision(changed(compared=1, agreed=1)) == ("keep", "1 of 100 rows compared"), (
        "the live one failed on others"
    )
    assert decision(changed(compared=1, agreed=0))[0] == "keep", "one row says nothing"
    assert decision(changed(compared=40, agreed=29))[0] == "roll back", "though all the rest agreed"


@pytest.mark.parametrize(
    ("figures", "stage", "why"),
    [
        (changed(errors=6), STAGE, "error rate 0.06 is over error_rate_max 0.05"),
        (changed(agreed=89), STAGE, "agreement 0.89 is under agreement_min 0.9"),
        (changed(drift=0.31), STAGE, "drift 0.31 is over drift_max 0.3"),
        (changed(p99_ms=8.0), Stage("canary", 0.1, rows_min=1, p99_ms_max=7), "p99 of 8 ms a call is over"),
        (changed(cpu_seconds=3.0), Stage("canary", 0.1, rows_min=1, cost_ratio_max=2), "a row costs 3 times"),
        (changed(rows=10, errors=6), STAGE, "6 of the first 10 rows failed"),
        (changed(rows=20, compared=20, agreed=9), STAGE, "11 of the first 20 rows disagree"),
    ],
)
def test_a_version_that_breaks_a_condition_is_rolled_back_with_the_reason(
    figures: Figures, stage: Stage, why: str
) -> None:
    said, reason = decision(figures, stage=stage)
    assert said == "roll back"
    assert reason.startswith(f"in stage {stage}: ")
    assert why in reason


def test_drift_of_a_canary_counts_as_far_as_it_is_not_chance_since_others_are_its_customers() -> None:
    stage = Stage("canary", 0.9, rows_min=100, drift_max=0.1)
    assert decision(changed(live_rows=2, drift=0.8), stage=stage)[0] == "promote"
    assert decision(changed(rows=9000, live_rows=1000, drift=0.12), stage=stage)[0] == "promote"
    assert decision(changed(rows=9000, live_rows=1000, drift=0.2), stage=stage)[0] == "roll back"


@settings(deadline=None, max_examples=30, derandomize=True)  # one in a thousand may differ
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1000))
def test_equal_versions_drift_by_chance_alone(mine: int, others: int, seed: int) -> None:
    random, one, other = np.random.default_rng(seed), Sketch(), Sketch()
    one.add(random.normal(size=mine))
    other.add(random.normal(size=others))
    seen = Figures(0, rows=mine, live_rows=others, drift=one.distance(other))
    assert judge(Stage("canary", 0.5, rows_min=1, drift_max=0.0), seen, 1).decision == "promote"


def test_what_can_not_be_known_is_no_reason_against_a_version() -> None:
    stage = Stage("canary", 1.0, rows_min=10, cost_ratio_max=1.0)
    assert decision(Figures(0, rows=10, cpu_seconds=9.0), stage=stage)[0] == "promote"


@st.composite
def seen(draw: st.DrawFn) -> Figures:
    rows = draw(st.integers(0, 300))
    errors, compared = draw(st.integers(0, rows)), draw(st.integers(0, rows))
    agreed = draw(st.integers(0, compared))
    return Figures(0, rows, errors, rows, 0, compared, agreed, drift=draw(st.floats(0, 1)))


@given(seen(), st.floats(0, 20))
def test_worse_figures_never_promote_what_better_ones_did_not(figures: Figures, seconds: float) -> None:
    ranks = {"roll back": 0, "keep": 1, "promote": 2}
    best = ranks[judge(STAGE, figures, seconds).decision]
    worse = [
        {"errors": figures.errors + 1} if figures.errors < figures.rows else {},
        {"agreed": figures.agreed - 1} if figures.agreed else {},
        {"drift": min(1.0, figures.drift + 0.1)},
    ]
    for change in worse:
        fields = {name: getattr(figures, name) for name in Figures.__struct_fields__}
        assert ranks[judge(STAGE, Figures(**{**fields, **change}), seconds).decision] <= best


@given(seen(), st.integers(0, 200), st.integers(0, 200))
def test_what_is_rolled_back_early_could_not_have_been_promoted_by_the_rows_that_were_asked_for(
    figures: Figures, agreeing: int, more: int
) -> None:
    if figures.rows >= STAGE.rows_min or judge(STAGE, figures, 0).decision != "roll back":
        return
    left = STAGE.rows_min - figures.rows
    whole = Figures(
        0, STAGE.rows_min, figures.errors, STAGE.rows_min, 0, figures.compared + left, figures.agreed + left
    )
    assert judge(STAGE, whole, 1e9).decision == "roll back", "though all the rest was right"


def test_what_a_condition_just_allows_is_not_rolled_back_early() -> None:
    for hundredth in range(101):
        stage = Stage("shadow", rows_min=100, agreement_min=(100 - hundredth) / 100, error_rate_max=hundredth / 100)
        failed = Figures(0, rows=hundredth, errors=hundredth)
        apart = Figures(0, rows=hundredth, compared=hundredth, agreed=0)
        early = {judge(stage, figures, 0).decision for figures in (failed, apart) if hundredth < 100}
        assert "roll back" not in early, hundredth
        more = Figures(0, rows=hundredth + 1, errors=hundredth + 1)
        assert hundredth >= 99 or judge(stage, more, 0).decision == "roll back", hundredth
