"""The vectorised fold against the plain program of `tests/reference.py`: the same bits, whatever comes in."""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.kernel.types import Aggregate, EventColumns
from node.state.fold import fold
from node.state.layout import NO_TILE, Layout
from node.state.reads import read

sys.path.insert(0, str(Path(__file__).parent.parent))
from reference import DAY, HOUR, MINUTE, SECOND, Event, Part, Reference

TYPES = ("search", "add_to_cart", "transaction")
FILTERS = {"event.channel == 'web'": lambda event: event.fields["channel"] == "web"}
(WEB,) = FILTERS
START_MS = 1_700_000_000_000
WINDOWS = (0, 700, 3 * SECOND, 59 * SECOND, 10 * MINUTE, HOUR, DAY, 30 * DAY, -1, -SECOND, -5 * MINUTE, -HOUR)
FUNCTIONS = ("count", "sum", "mean", "min", "max", "std", "last", "first", "distinct", "since")


def aggregates() -> st.SearchStrategy[Aggregate]:
    def made(function: str, event: str, field: str, window: int, where: str) -> Aggregate:
        if function in ("since",) or (function == "count" and field == "channel"):
            field = ""
        elif field == "channel" and function != "distinct":
            field = "amount"
        return Aggregate(function, event, field, window, where)  # type: ignore[arg-type]

    return st.builds(
        made,
        st.sampled_from(FUNCTIONS),
        st.sampled_from((*TYPES, "*", "unheard_of")),
        st.sampled_from(("amount", "channel", "time")),
        st.sampled_from(WINDOWS),
        st.sampled_from(("", "", WEB)),
    )


STEPS_MS = (0, 0, 0, 1, 300, 999, 1000, 4000, -700, -3000, MINUTE, -MINUTE, 5 * MINUTE, -HOUR, DAY, -DAY, 40 * DAY)
AMOUNTS = (float("nan"), 0.0, -0.0, 0.1, 0.2, 0.3, -0.7, 1e15, 3.3333, -1e15, 7.0)


def columns(events: list[Event]) -> EventColumns:
    customers = list(dict.fromkeys(event.customer for event in events))
    channels = np.empty(len(events), object)
    channels[:] = [event.fields["channel"] for event in events]
    return EventColumns(
        np.array([TYPES.index(event.type) for event in events], np.int64),
        np.array([event.time_ms for event in events], np.int64),
        np.array([customers.index(event.customer) for event in events], np.int64),
        customers,
        np.zeros(len(events), np.int64),
        np.arange(len(events)),
        {"amount": np.array([event.fields["amount"] for event in events], float), "channel": channels},
    )


def bits(value: float) -> bytes:
    return b"nan" if value != value else struct.pack("<d", value)


class Folded:
    """Rows kept by customer between batches, as the node's cache would."""

    def __init__(self) -> None:
        self.layout = Layout.empty()
        self.rows: dict[str, np.ndarray] = {}
        self.late = 0

    def ask(self, asked: list[Aggregate]) -> None:
        self.layout = self.layout.grown(asked, ())
        initial = self.layout.initial
        self.rows = {
            customer: np.concatenate([initial[:1], row[1:], initial[len(row) :]]) for customer, row in self.rows.items()
        }

    def see(self, events: list[Event], wanted: np.ndarray, bystanders: list[str]) -> dict[Aggregate, np.ndarray]:
        batch = columns(events)
        batch.customers.extend(name for name in bystanders if name not in batch.customers)
        rows = np.stack([self.rows.get(name, self.layout.initial) for name in batch.customers], axis=1).copy()
        masks = {where: np.array([keep(event) for event in events], bool) for where, keep in FILTERS.items()}
        result = fold(self.layout, rows, batch, masks, wanted, TYPES)
        self.rows.update(zip(batch.customers, rows.T.copy(), strict=True))
        self.late += result.late
        return dict(result.values)


def check_values(
    results: dict[Aggregate, np.ndarray], expected: list[dict[Aggregate, float]], wanted: np.ndarray
) -> None:
    for aggregate, found in results.items():
        due = [values[aggregate] for values, want in zip(expected, wanted, strict=True) if want]
        assert [bits(value) for value in found.tolist()] == [bits(value) for value in due], str(aggregate)


def check_rows(folded: Folded, reference: Reference) -> None:
    """Every slot of every row is what the plain program's dicts say, also where tiles were emptied."""
    for customer, row in folded.rows.items():
        due = folded.layout.initial.copy()
        for number, group in enumerate(folded.layout.groups):
            kept = reference.kept.get(customer, {}).get(number)
            if kept is None or kept.head is None:
                continue
            due[group.head_slot] = kept.head
            for accumulator, plane in group.planes.items():
                source = accumulator.source
                kind = {"sketch": "bits"}.get(accumulator.kind, accumulator.kind)
                part = Part(kind, source.event, source.field, source.where)
                for tile, values in kept.tiles.items():
                    for offset, value in enumerate(slot_values(kind, values.get(part))):
                        due[group.first_slot + (plane + offset) * group.tiles + tile % group.tiles] = value
        for source, slot in folded.layout.pivots.items():
            due[slot] = reference.pivots.get((customer, source.event, source.field, source.where), np.nan)
        assert [bits(value) for value in row.tolist()] == [bits(value) for value in due.tolist()]


def slot_values(kind: str, value: object) -> list[float]:
    if value is None:
        return []
    if kind == "bits":
        return list(struct.unpack("<4d", value.to_bytes(32, "little")))  # type: ignore[attr-defined]
    return list(value) if isinstance(value, tuple) else [value]  # type: ignore[list-item]


def run(batches: list[list[Event]], asked: list[list[Aggregate]], wanted_share: float, seed: int) -> None:
    chance = random.Random(seed)
    folded, reference = Folded(), Reference(FILTERS)
    for number, events in enumerate(batches):
        if number < len(asked):
            folded.ask(asked[number])
            reference.ask(asked[number])
        expected = [reference.see(event) for event in events]
        wanted = np.array([chance.random() < wanted_share for _ in events], bool)
        bystanders = chance.sample(sorted(folded.rows), min(len(folded.rows), chance.randrange(3)))
        check_values(folded.see(events, wanted, bystanders), expected, wanted)
    assert folded.late == reference.late
    check_rows(folded, reference)
    newest = max(event.time_ms for events in batches for event in events)
    for time_ms in (newest, newest - 7 * MINUTE, newest + HOUR, newest + 100 * DAY):
        check_reads(folded, reference, time_ms)


def check_reads(folded: Folded, reference: Reference, time_ms: int) -> None:
    """What is read without an event, of every customer and of one that nobody has seen."""
    customers = [*folded.rows, "nobody"]
    rows = np.stack([folded.rows.get(name, folded.layout.initial) for name in customers], axis=1)
    found = read(folded.layout, np.ascontiguousarray(rows), np.full(len(customers), time_ms))
    for aggregate, values in found.items():
        due = [reference.read(aggregate, customer, time_ms) for customer in customers]
        assert [bits(value) for value in values.tolist()] == [bits(value) for value in due], str(aggregate)


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    steps = draw(
        st.lists(
            st.tuples(
                st.integers(0, 4),
                st.sampled_from(TYPES),
                st.sampled_from(STEPS_MS),
                st.sampled_from(AMOUNTS),
                st.sampled_from((None, "web", "shop", "é")),
            ),
            min_size=1,
            max_size=60,
        )
    )
    events, now = [], START_MS
    for customer, kind, step, amount, channel in steps:
        now += step
        events.append(Event(f"c{customer}", kind, now, {"amount": amount, "channel": channel}))
    return events


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    histories(),
    st.lists(st.lists(aggregates(), min_size=1, max_size=6), min_size=1, max_size=3),
    st.lists(st.integers(1, 25), min_size=1, max_size=5),
    st.sampled_from((1.0, 0.5)),
    st.integers(0, 5),
)
def test_fold_equals_the_plain_program(
    events: list[Event], asked: list[list[Aggregate]], cuts: list[int], wanted_share: float, seed: int
) -> None:
    batches, at = [], 0
    while at < len(events):
        size = cuts[len(batches) % len(cuts)]
        batches.append(events[at : at + size])
        at += size
    run(batches, asked, wanted_share, seed)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 2**32),
    st.lists(aggregates(), min_size=3, max_size=8),
    st.sampled_from((0.0, 0.5, 0.9)),
    st.sampled_from((1, 100, 20_000, HOUR)),
    st.sampled_from((0.0, 0.02, 0.5)),
)
def test_large_batches_with_a_hot_customer_and_late_events(
    seed: int, asked: list[Aggregate], hot: float, step_ms: int, late: float
) -> None:
    chance = random.Random(seed)
    events, now = [], START_MS
    for _ in range(900):
        now += chance.randrange(step_ms + 1)
        back = chance.choice((1, 30)) * chance.randrange(step_ms * 20 + 1) if chance.random() < late else 0
        customer = "hot" if chance.random() < hot else f"c{chance.randrange(200)}"
        amount = chance.choice((chance.gauss(0, 1000), chance.random(), float("nan")))
        fields = {"amount": amount, "channel": chance.choice((None, "web", f"x{chance.randrange(500)}"))}
        events.append(Event(customer, chance.choice(TYPES), now - back, fields))
    run([events[:500], events[500:501], events[501:]], [asked], 0.6, seed)


@pytest.mark.parametrize("columns_count", [1, 2, 3])
@pytest.mark.parametrize("window", [0, 59 * SECOND])
def test_sums_of_few_customers_are_added_in_order(columns_count: int, window: int) -> None:
    """numpy sums a single column pairwise, unless told not to: other bits than one after the other."""
    events = [
        Event(f"c{n % columns_count}", "search", START_MS + n * 997, {"amount": 1 / (n + 3), "channel": None})
        for n in range(400)
    ]
    asked = [Aggregate("sum", "search", "amount", window)]
    run([events[:300], *([event] for event in events[300:])], [asked], 1.0, 0)


@pytest.mark.parametrize("cuts", [[6], [1] * 6, [2, 4], [3, 3]])
def test_events_of_one_time_are_first_and_last_by_arrival(cuts: list[int]) -> None:
    steps = (0, 0, -5, -5, 5, 0)
    events = [
        Event("c", "search", START_MS + step, {"amount": float(number), "channel": None})
        for number, step in enumerate(steps)
    ]
    asked = [Aggregate(function, "search", "amount", window) for function in ("first", "last") for window in (0, HOUR)]
    batches = [events[sum(cuts[:number]) :][:size] for number, size in enumerate(cuts)]
    run(batches, [asked], 1.0, 0)


def test_a_customer_without_events_keeps_its_row() -> None:
    folded = Folded()
    folded.ask([Aggregate("count", "search", "", HOUR)])
    event = Event("a", "search", START_MS, {"amount": 1.0, "channel": None})
    folded.see([event], np.ones(1, bool), [])
    row = folded.rows["a"].copy()
    folded.rows["b"] = folded.layout.initial
    folded.see([Event("b", "search", START_MS + DAY, event.fields)], np.ones(1, bool), ["a"])
    assert folded.rows["a"].tobytes() == row.tobytes()
    assert folded.rows["b"][folded.layout.groups[0].head_slot] > row[folded.layout.groups[0].head_slot] > NO_TILE
