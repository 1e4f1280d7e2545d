"""The demo's events, labels and training features, on small tables made here: order, ids, and no look ahead."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from demonstration import labels, products, stream
from demonstration.__main__ import parse
from demonstration.data import BASKET, CAMPAIGN, DAY_MS, FIELDS, REDEMPTION, TRANSACTION, Events, Frames, build_events
from demonstration.features import SCHEMA, Ends, observe, plan_of, read_manifests, rows_of, stored_before
from demonstration.figures import Speed
from demonstration.lists import left_out
from demonstration.results import Results, quality
from demonstration.run import problems_of
from demonstration.settings import Settings, Topics, node_config
from demonstration.training import FRAUD, LIST, MODELS, OFFERS, REORDER, TRIGGERS, last_lines

from node.config import parse_config
from node.kernel.types import ModelName

START = pd.Timestamp("2017-03-01 10:00:00")


def shopping(baskets: list[tuple[int, float, list[int]]]) -> pd.DataFrame:
    """(household, days after START, products) of each receipt, numbered from 1 in that order."""
    lines = [
        {
            "household_id": household,
            "store_id": 7,
            "basket_id": number,
            "product_id": product,
            "quantity": 1,
            "sales_value": 1.5,
            "retail_disc": 0.1,
            "coupon_disc": 0.0,
            "coupon_match_disc": 0.0,
            "transaction_timestamp": START + pd.Timedelta(days=days),
        }
        for number, (household, days, products) in enumerate(baskets, start=1)
        for product in products
    ]
    return pd.DataFrame(lines)


def frames(
    baskets: list[tuple[int, float, list[int]]],
    redemptions: Sequence[tuple[int, str]] = (),
    campaigns: Sequence[tuple[int, int]] = (),
) -> Frames:
    return Frames(
        shopping(baskets),
        pd.DataFrame(
            {
                "product_id": [1, 2, 3],
                "department": ["GROCERY", "PRODUCE", "MISCELLANEOUS"],
                "brand": ["National", "Private", "National"],
                "product_category": ["MILK", "FRUIT", None],
            }
        ),
        pd.DataFrame(
            {
                "household_id": [household for household, _ in redemptions],
                "coupon_upc": [10000085207] * len(redemptions),
                "campaign_id": [26] * len(redemptions),
                "redemption_date": pd.to_datetime([day for _, day in redemptions]),
            }
        ),
        pd.DataFrame(list(campaigns), columns=["campaign_id", "household_id"]),
        pd.DataFrame(
            {
                "campaign_id": [26],
                "campaign_type": ["Type A"],
                "start_date": pd.to_datetime(["2017-03-01"]),
                "end_date": pd.to_datetime(["2017-03-20"]),
            }
        ),
    )


FAR_MS = int(pd.Timestamp("2020-01-01").timestamp() * 1000)


def test_events_are_in_order_of_time_and_a_receipt_follows_its_lines() -> None:
    events = build_events(frames([(5, 1, [1, 2]), (4, 0, [2]), (6, 0, [1])], [(4, "2017-03-01")], [(26, 4)]))
    assert events.kinds.tolist() == [CAMPAIGN, TRANSACTION, BASKET, TRANSACTION, BASKET, REDEMPTION,
                                     TRANSACTION, TRANSACTION, BASKET]  # fmt: skip
    assert events.numbers["basket"].tolist()[1:5] == [2, 2, 3, 3]
    assert (np.diff(events.times_ms) >= 0).all()


def test_a_receipt_sums_its_lines_and_a_redemption_becomes_known_at_the_end_of_its_day() -> None:
    events = build_events(frames([(5, 0, [1, 2, 3])], [(5, "2017-03-01")]))
    (basket,) = np.flatnonzero(events.kinds == BASKET)
    assert (events.numbers["amount"][basket], events.numbers["lines"][basket]) == (4.5, 3)
    (redemption,) = np.flatnonzero(events.kinds == REDEMPTION)
    assert events.times_ms[redemption] == pd.Timestamp("2017-03-02").timestamp() * 1000 - 1


def test_an_event_has_the_fields_of_its_type_and_nothing_else() -> None:
    events = build_events(frames([(5, 0, [2, 3])], [(5, "2017-03-01")], [(26, 5)]))
    campaign, fruit, misc, basket, redemption = [orjson.loads(value) for _, value in stream.encode(events)]
    assert fruit == {
        "type": "transaction", "time": int(START.timestamp() * 1000), "household": "5", "basket": 1, "store": 7,
        "product": 2, "category": "FRUIT", "department": "PRODUCE", "brand": "Private", "quantity": 1, "amount": 1.5,
        "retail_discount": 0.1, "coupon_discount": 0.0, "match_discount": 0.0,
    }  # fmt: skip
    assert "category" not in misc
    assert basket["lines"] == 2
    assert "product" not in basket
    assert campaign["kind"] == "Type A"
    assert campaign["ends"] == pd.Timestamp("2017-03-21").timestamp()
    assert redemption["coupon"] == 10000085207
    assert {name for event in (campaign, fruit, misc, basket, redemption) for name in event} <= {
        *FIELDS, "type", "time", "household",
    }  # fmt: skip


def test_ids_as_large_as_those_of_receipts_survive_as_numbers() -> None:
    table = frames([(5, 0, [1])])
    table.transactions["basket_id"] = 40_198_590_616
    events = build_events(table)
    assert orjson.loads(stream.encode(events)[0][1])["basket"] == 40_198_590_616


def reorder_of(baskets: list[tuple[int, float, list[int]]], until_ms: int = FAR_MS) -> list[float]:
    events = build_events(frames(baskets))
    label = labels.reorder_labels(events, until_ms)
    assert np.isnan(label[events.kinds != TRANSACTION]).all()
    return label[events.kinds == TRANSACTION].tolist()


def test_reorder_is_true_only_for_the_same_household_and_category_on_a_later_receipt_soon() -> None:
    assert reorder_of([(5, 0, [1]), (5, 13.9, [1])]) == [1.0, 0.0]
    assert reorder_of([(5, 0, [1]), (5, 14.1, [1])]) == [0.0, 0.0]
    assert reorder_of([(5, 0, [1]), (6, 1, [1])]) == [0.0, 0.0]
    assert reorder_of([(5, 0, [1]), (5, 1, [2])]) == [0.0, 0.0]
    assert reorder_of([(5, 0, [1, 1])]) == [0.0, 0.0]


def test_a_line_without_a_category_has_no_reorder_label() -> None:
    assert np.isnan(reorder_of([(5, 0, [3]), (5, 1, [3])])).all()


def test_a_label_that_reaches_beyond_what_is_known_is_not_told() -> None:
    known_ms = int((START + pd.Timedelta(days=15)).timestamp() * 1000)
    first, second, third = reorder_of([(5, 0, [1]), (5, 0.9, [1]), (5, 2, [1])], known_ms)
    assert (first, second) == (1.0, 1.0)
    assert np.isnan(third)


def test_training_labels_do_not_change_with_what_happens_after_the_cut() -> None:
    known_ms = int((START + pd.Timedelta(days=20)).timestamp() * 1000)
    before = [(5, 0.0, [1]), (5, 7.0, [1]), (5, 18.0, [2])]
    alone = build_events(frames(before))
    longer = build_events(frames([*before, (5, 21.0, [1, 2]), (5, 22.0, [2])], [(5, "2017-03-23")]))
    part = longer.take(slice(0, len(alone)))
    for label in (labels.reorder_labels, labels.offers_labels):
        np.testing.assert_array_equal(label(alone, known_ms), label(longer, known_ms)[: len(alone)])
    limits = labels.abnormal_limits(longer, known_ms)
    assert limits == labels.abnormal_limits(part, known_ms)
    np.testing.assert_array_equal(
        labels.fraud_labels(alone, limits, known_ms), labels.fraud_labels(longer, limits, known_ms)[: len(alone)]
    )


def test_offers_looks_at_later_days_only() -> None:
    def label(day: str) -> float:
        events = build_events(frames([(5, 0, [1])], [(5, day), (6, "2017-03-02")]))
        return float(labels.offers_labels(events, FAR_MS)[events.kinds == BASKET][0])

    assert label("2017-03-01") == 0.0
    assert label("2017-02-28") == 0.0
    assert label("2017-03-02") == 1.0
    assert label("2017-03-15") == 1.0
    assert label("2017-03-16") == 0.0


def test_fraud_is_a_later_abnormal_receipt_and_never_the_receipt_itself() -> None:
    table = frames([(5, 0, [1]), (5, 3, [1]), (6, 0, [1])])
    table.transactions.loc[1, "coupon_disc"] = 20.0
    events = build_events(table)
    label = labels.fraud_labels(events, (5.0, 30.0), FAR_MS)
    assert label[events.kinds == BASKET].tolist() == [1.0, 0.0, 0.0]


times = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 50)), max_size=30)


@given(happened=times, asked=times)
def test_later_times_are_those_that_a_search_through_all_finds(
    happened: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([a for a, _ in pairs], np.int64), np.array([b for _, b in pairs], np.int64)

    found = labels.later_times(*columns(happened), *columns(asked)).tolist()
    never = np.iinfo(np.int64).max // 2
    assert found == [min((t for h, t in happened if h == g and t > at), default=never) for g, at in asked]


@given(households=st.lists(st.integers(1, 3), min_size=1, max_size=40), batch_events=st.integers(1, 12), data=st.data())
def test_a_stored_score_is_the_households_last_of_an_earlier_micro_batch(
    households: list[int], batch_events: int, data: st.DataObject
) -> None:
    every = st.integers(0, len(households) - 1)
    places = sorted(data.draw(st.sets(every)))
    asked = sorted(data.draw(st.sets(every)))
    scores = [place / 100 for place in places]
    found = stored_before(
        np.array(households), np.array(places, np.int64), np.array(scores), np.array(asked, np.int64), batch_events
    )
    for at, score in zip(asked, found.tolist(), strict=True):
        earlier = [
            value
            for place, value in zip(places, scores, strict=True)
            if households[place] == households[at] and place // batch_events < at // batch_events
        ]
        assert (score == earlier[-1]) if earlier else np.isnan(score)


def year_in_small(seed: int = 1) -> Events:
    """Some months of twelve households."""
    random = np.random.default_rng(seed)
    days = np.sort(random.uniform(0, 90, 150))
    baskets = [
        (int(random.integers(1, 13)), float(day), random.integers(1, 4, random.integers(1, 5)).tolist()) for day in days
    ]
    return build_events(frames(baskets, [(3, "2017-03-20"), (4, "2017-04-02")], [(26, 3), (26, 4)]))


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 200), batch_events=st.integers(20, 120))
def test_features_of_an_event_do_not_change_with_what_comes_after_it(cut: int, batch_events: int) -> None:
    events = year_in_small()
    plan = plan_of(list(read_manifests().values()))
    prefix = events.take(slice(0, cut))
    for name, kind in TRIGGERS.items():
        wanted = events.kinds == kind
        places = np.flatnonzero(wanted[:cut])
        with_later = rows_of(plan, name, observe(plan, events, wanted, batch_events, lambda _: None), places)
        alone = rows_of(plan, name, observe(plan, prefix, wanted[:cut], batch_events, lambda _: None), places)
        assert with_later.numbers.tobytes() == alone.numbers.tobytes()
        assert with_later.texts == alone.texts


def test_features_do_not_depend_on_the_size_of_micro_batches() -> None:
    events = year_in_small()
    plan = plan_of(list(read_manifests().values()))
    wanted = events.kinds == BASKET
    small, large = (observe(plan, events, wanted, size, lambda _: None) for size in (7, 1000))
    for name in (OFFERS, FRAUD):
        places = np.flatnonzero(wanted)
        assert (
            rows_of(plan, name, small, places).numbers.tobytes() == rows_of(plan, name, large, places).numbers.tobytes()
        )


def test_the_last_line_of_each_household_in_each_micro_batch() -> None:
    events = year_in_small()
    found = set(last_lines(events, 50).tolist())
    expected = {}
    for place in np.flatnonzero(events.kinds == TRANSACTION).tolist():
        expected[events.households[place], place // 50] = place
    assert found == set(expected.values())


def test_the_manifests_parse_and_offers_uses_what_reorder_says() -> None:
    manifests = read_manifests()
    assert set(manifests) == {REORDER, OFFERS, FRAUD, LIST} == set(MODELS)
    assert [str(output) for output in manifests[OFFERS].stored_outputs] == [f"models.{REORDER.tenant}.again.score"]
    for name, kind in TRIGGERS.items():
        assert manifests[name].events == (SCHEMA.types[kind],)
    assert manifests[LIST].schedule.every_ms == 7 * DAY_MS


def test_the_nodes_config_passes_its_own_check(tmp_path: Path) -> None:
    config = parse_config(node_config("127.0.0.1:9092", Topics("demo-1"), 8081), tmp_path)
    schema = config.schema()
    assert (schema.types, dict(schema.fields)) == (SCHEMA.types, dict(SCHEMA.fields))
    assert config.kafka.inferences_topic == Topics("demo-1").inferences


@given(households=st.lists(st.integers(1, 2500), min_size=1, max_size=50))
def test_a_households_events_stay_in_one_partition(households: list[int]) -> None:
    partitions = stream.partitions_of(np.array(households)).tolist()
    assert len(set(zip(households, partitions, strict=True))) == len(set(households))


def test_an_inference_that_comes_twice_is_counted_once() -> None:
    name = ModelName("reorder", "again")
    results = Results([name], [np.array([1, 2]), np.array([0])], 3)
    record = {"tenant": "reorder", "model": "again", "partition": 0, "offset": 1, "outputs": {"score": 0.25}}
    results.take([record, record, {**record, "partition": 1, "offset": 0, "outputs": {"score": None}}])
    assert (results.total, results.doubled) == (2, 1)
    assert np.array_equal(results.scores[name], [np.nan, np.nan, 0.25], equal_nan=True)


def test_quality_leaves_out_what_is_not_known_and_tells_good_scores_from_bad() -> None:
    truth = np.array([0.0, 1.0, 0.0, 1.0, np.nan, 1.0])
    good = quality(np.array([0.1, 0.9, 0.2, 0.8, 0.5, np.nan]), truth)
    assert (good.judged, good.positive_share, good.auc, good.average_precision) == (4, 0.5, 1.0, 1.0)
    assert quality(1 - np.array([0.1, 0.9, 0.2, 0.8, 0.5, np.nan]), truth).auc == 0.0
    assert quality(np.array([0.5]), np.array([1.0])).auc is None


def test_speed_is_that_of_the_last_moments() -> None:
    speed = Speed()
    for second in range(11):
        speed.tell(float(second), {"events": 100 * min(second, 5)})
    assert speed.of("events") == 0.0
    speed.tell(11.0, {"events": 900})
    assert speed.of("events") == pytest.approx(400 / 3)


def test_the_command_line() -> None:
    given_settings = parse(["--once", "--json", "--rate", "500", "--kafka", "127.0.0.1:9092"])
    assert given_settings == Settings(once=True, as_json=True, rate=500.0, kafka="127.0.0.1:9092")
    for wrong in (["--rate", "0"], ["--kafka", "nowhere"], ["--events", "-3"], ["--frobnicate"]):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_an_inference_of_an_interval_counts_once_and_not_as_one_of_an_event() -> None:
    results = Results([REORDER], [np.array([0])], 1, [LIST])
    record = {"tenant": "reorder", "model": "list", "interval": 7 * DAY_MS, "customer": "5", "outputs": {"score": 0.5}}
    results.take([record, {**record, "customer": "6", "outputs": {"score": None}}, record])
    assert (results.total, results.doubled, results.inferences[LIST]) == (0, 1, 2)
    assert results.lists[LIST][7 * DAY_MS, 5] == 0.5
    assert np.isnan(results.lists[LIST][7 * DAY_MS, 6])


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["a", "b"])), max_size=12))
def test_versions_are_mixed_where_an_older_one_follows_in_a_partition(named: list[tuple[int, str]]) -> None:
    """`named`: the partition of each event, and the version that its inference names."""
    places = [np.array([at for at, (number, _) in enumerate(named) if number == one], np.int64) for one in (0, 1)]
    results = Results([REORDER], places, len(named))
    offsets = [0, 0]
    order = []
    for number, version in named:
        found = {"tenant": "reorder", "model": "again", "partition": number, "offset": offsets[number]}
        results.take([{**found, "outputs": {"score": 0.5}, "tables": {"products": version}}])
        offsets[number] += 1
        if version not in order:
            order.append(version)
    expected = 0
    for one in (0, 1):
        mine = [order.index(version) for number, version in named if number == one]
        expected += sum(any(before > after for before in mine[:at]) for at, after in enumerate(mine))
    assert results.mixed == expected
    assert sum(results.of_versions().values()) == len(named)


def test_a_week_is_foretold_by_who_comes_in_the_next_one() -> None:
    events = year_in_small()
    known = int(events.times_ms[-1])
    for week in (3, 8, 12):
        end_ms = int(events.times_ms[0] // DAY_MS + 7 * week) * DAY_MS
        found = labels.list_labels(events, np.arange(1, 14), end_ms, known)
        for household, label in zip(range(1, 14), found.tolist(), strict=True):
            mine = events.times_ms[(events.kinds == BASKET) & (events.households == household)]
            comes = bool(((mine >= end_ms) & (mine < end_ms + 7 * DAY_MS)).any())
            assert np.isnan(label) if end_ms + 7 * DAY_MS > known else label == float(comes)


def test_the_rows_of_a_week_are_those_of_an_event_at_its_end() -> None:
    events = year_in_small()
    manifests = read_manifests()
    plan, ends = plan_of(list(manifests.values())), Ends(manifests[LIST].version("0" * 64))
    weeks = ends.ends_ms(int(events.times_ms[0]), int(events.times_ms[-1]))
    assert len(weeks) == 13
    observe(plan, events, np.zeros(len(events), np.bool_), 50, lambda _: None, at_ends=ends, ends_ms=weeks)
    assert [one.end_ms for one in ends.found] == weeks
    for one in ends.found:
        before = events.times_ms < one.end_ms
        assert set(one.households.tolist()) == set(events.households[before].tolist())
        column = one.rows.names.index("baskets_90d")
        for household, row in zip(one.households.tolist(), one.rows.numbers, strict=True):
            baskets = before & (events.kinds == BASKET) & (events.households == household)
            assert row[column] == baskets.sum(), "the small year is shorter than the window"


def test_a_week_without_events_has_its_rows_too() -> None:
    events = year_in_small()
    ends = Ends(read_manifests()[LIST].version("0" * 64))
    weeks = ends.ends_ms(int(events.times_ms[0]), int(events.times_ms[-1]))
    quiet = (events.times_ms < weeks[3]) | (events.times_ms >= weeks[5])
    events = events.take(quiet)
    plan = plan_of(list(read_manifests().values()))
    observe(plan, events, np.zeros(len(events), np.bool_), 50, lambda _: None, at_ends=ends, ends_ms=weeks)
    assert [one.end_ms for one in ends.found] == weeks


def test_a_price_is_the_median_of_a_piece_before_discounts_of_the_shelf(tmp_path: Path) -> None:
    products_of = pd.DataFrame({"product_id": [1, 2, 3], "department": "D", "brand": ["National", "Private", None]})
    year = frames([(1, 0.0, [1, 2]), (1, 1.0, [1]), (2, 2.0, [1, 2])], [], [])
    year = replace(year, products=products_of.assign(product_category="C"))
    events = build_events(year)
    table = products.catalogue(year, events, len(events))
    lines = year.transactions
    for number in (1, 2):
        mine = lines[lines["product_id"] == number]
        expected = ((mine["sales_value"] + mine["retail_disc"]) / mine["quantity"]).median()
        assert table.set_index("product").loc[number, "price"] == pytest.approx(expected, abs=0.005)
    assert np.isnan(table.set_index("product").loc[3, "price"])
    version = products.reader(products.write(table, tmp_path / "products.parquet"))
    rows = version.rows(np.array([1.0, 3.0, 4.0]))
    assert (rows >= 0).tolist() == [True, True, False]
    assert version.column("brand", rows).tolist() == ["National", None, None]


def comings(households: Sequence[int], times_ms: Sequence[int]) -> Events:
    count = len(households)
    numbers = {name: np.full(count, np.nan) for name, kind in FIELDS.items() if kind == "number"}
    kinds, nothing = np.full(count, BASKET, np.int8), {}
    return Events(kinds, np.array(times_ms, np.int64), np.array(households, np.int64), numbers, nothing, nothing)


def lists_of(came: list[tuple[int, int]], steps: list[int]) -> set[tuple[int, int]]:
    """(end, household) as a node makes them of (household, time) in order: intervals of ten, each run over those
    changed since it last read them, in order of households, `steps[i]` of them between events i and i + 1."""
    listed, counts, marks = set(), dict[int, int](), dict[int, int]()
    run_end, waiting = came[0][1] // 10 * 10, list[int]()

    def go_on(step: int, newest: int) -> None:
        nonlocal run_end, waiting
        if not waiting and newest > run_end:
            run_end, waiting = newest, sorted(counts)
        read, waiting = waiting[:step], waiting[step:]
        for household in read:
            if marks.get(household) != counts[household]:
                marks[household] = counts[household]
                listed.add((run_end, household))

    for (household, time), step in zip(came, steps, strict=False):
        counts[household] = counts.get(household, 0) + 1
        go_on(step, time // 10 * 10)
    while waiting or came[-1][1] // 10 * 10 > run_end:
        go_on(1, came[-1][1] // 10 * 10)
    return listed


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 69)), min_size=1, max_size=40),
    st.lists(st.integers(0, 5), min_size=40, max_size=40),
)
def test_whoever_came_is_listed_however_late_runs_are(came: list[tuple[int, int]], steps: list[int]) -> None:
    came.sort(key=lambda one: one[1])
    events = comings([household for household, _ in came], [time for _, time in came])
    partitions, listed = np.zeros(len(came), np.int64), lists_of(came, steps)
    assert left_out(listed, events, partitions, 10) == 0
    ends = sorted({end for end, _ in listed})
    for number, end in enumerate(ends):
        fewer = {one for one in listed if one[0] != end}
        since, near = max([0, *ends[:number]]), ends[max(0, number - 2) : number]
        for household in {household for one, household in listed if one == end}:
            others = listed - {(end, household)}
            kept = end == ends[-1] or others - fewer  # else it is as if the interval had been skipped
            there = any(one == household and since <= time < end for one, time in came)
            if others and kept and there and not any((one, household) in listed for one in near):
                assert left_out(others, events, partitions, 10) >= 1


def test_a_partition_whose_newest_week_has_no_list_leaves_out_all_who_came() -> None:
    events = comings([1, 2, 1, 2, 3, 1], [1, 2, 11, 12, 13, 21])
    assert left_out({(10, 1), (10, 2), (20, 1), (20, 2), (20, 3)}, events, np.zeros(6), 10) == 0
    assert left_out({(10, 1), (10, 2)}, events, np.zeros(6), 10) == 1, "what 1 and 2 did may be in the run before"
    assert left_out({(10, 1), (10, 2), (20, 1)}, events, np.zeros(6), 10) == 1, "3 is on no list"
    assert left_out(set(), events, np.zeros(6), 10) == 0, "the model may have seen no end before the last"


@pytest.mark.parametrize(
    ("where", "what", "said"),
    [
        ((), {"missing": 3}, "3 triggers"),
        ((), {"doubled": 2}, "2 inferences came twice"),
        (("tables",), {"mixed": 4}, "version before"),
        (("tables",), {"unnamed": 5}, "name no version"),
        (("lists",), {"missing": 6}, "did not come"),
        (("lists",), {"left_out": 7}, "left out"),
        (("training_rows",), {"different": 1}, "not what the events give"),
        (("training_rows",), {"state_different": 1}, "not what the events give"),
        (("training_rows",), {"exported": 8}, "not what the events give"),
        (("training_rows",), {"compared": 8}, "not what the events give"),
    ],
)
def test_what_must_not_be_is_a_problem(where: tuple[str, ...], what: dict[str, int], said: str) -> None:
    report = {
        "delivery": "exactly_once",
        "inferences": {str(FRAUD): 9},
        "doubled": 0,
        "missing": 0,
        "tables": {"mixed": 0, "unnamed": 0},
        "lists": {"missing": 0, "left_out": 0},
        "training_rows": {"exported": 9, "compared": 9, "different": 0, "state_different": 0},
    }
    assert problems_of(report) == []
    changed = report
    for name in where:
        changed = changed[name]  # type: ignore[assignment]
    changed.update(what)
    (problem,) = problems_of(report)
    assert said in problem
