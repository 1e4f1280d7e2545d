"""What tenants asked for and got, and quotas of rows a second: all is accounted for, whatever happens when."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel.errors import BoundExceeded, NotFound
from tenants.bucket import BURST_SECONDS, RowBucket
from tenants.scheduler import Dispatch, Scheduler
from tenants.shares import HOLDS, WINDOWS_SECONDS, ShareWindow

TENANTS = ("ads", "fraud", "offers")
MODELS = ("a", "b")
BATCH_ROWS_MAX = 50
NEAR = 1e-6

operations = st.one_of(
    st.tuples(st.just("wait"), st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0, 7.0, 45.0, 700.0])),
    st.tuples(st.just("enqueue"), st.sampled_from(TENANTS), st.sampled_from(MODELS), st.integers(1, 120)),
    st.tuples(st.just("next")),
    st.tuples(st.just("complete"), st.integers(0, 9), st.floats(0, 0.5), st.floats(0, 1)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("block"), st.sampled_from(TENANTS), st.booleans()),
    st.tuples(st.just("weight"), st.sampled_from(TENANTS), st.sampled_from([0.5, 1.0, 4.0])),
    st.tuples(st.just("quota"), st.sampled_from(TENANTS), st.sampled_from([0.0, 0.5, 20.0, 1000.0])),
    st.tuples(st.just("renew"), st.sampled_from(TENANTS)),
    st.tuples(st.just("renew model"), st.sampled_from(TENANTS), st.sampled_from(MODELS)),
)


@dataclass
class Book:
    """Plain sums of what is done to a scheduler, kept for each tenant since it came."""

    scheduler: Scheduler
    now: float = 0.0
    running: list[Dispatch] = field(default_factory=list)
    tickets: list[tuple[str, str]] = field(default_factory=list)
    sums: defaultdict[str, defaultdict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    owners: dict[int, int] = field(default_factory=dict)
    """Number of the batch -> which of the tenants of that name it is of."""
    orphans: set[int] = field(default_factory=set)
    """Batches whose model was removed while they ran."""
    generation: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, tenant: str) -> None:
        self.scheduler.add_tenant(tenant)
        for model in MODELS:
            self.scheduler.add_model(tenant, model)
        self.generation[tenant] += 1
        self.sums[tenant] = defaultdict(float, came=self.now)

    def perform(self, operation: tuple[Any, ...]) -> None:
        self.scheduler.advance(self.now)
        match operation:
            case ("wait", seconds):
                self.now += seconds
                self.scheduler.advance(self.now)
            case ("enqueue", tenant, model, rows):
                try:
                    self.scheduler.enqueue(len(self.tickets), tenant, model, rows)
                except BoundExceeded:
                    return
                self.tickets.append((tenant, model))
                self.sums[tenant]["asked"] += rows
            case ("next",):
                self.start()
            case ("complete", place, seconds, part) if self.running:
                self.complete(self.running.pop(place % len(self.running)), seconds, part)
            case ("cancel", place) if self.tickets:
                number = place % len(self.tickets)
                tenant, model = self.tickets[number]
                self.sums[tenant]["dropped"] += self.scheduler.cancel(tenant, model, number)
            case ("block", tenant, on):
                (self.scheduler.block if on else self.scheduler.unblock)(tenant)
            case ("weight", tenant, weight):
                self.scheduler.set_weight(tenant, weight)
            case ("quota", tenant, rows_s):
                self.scheduler.set_rows_s(tenant, rows_s)
            case ("renew", tenant):
                self.scheduler.remove_tenant(tenant)
                self.add(tenant)
            case ("renew model", tenant, model):
                queued = self.scheduler.statistics().tenants[tenant].models[model].rows_queued
                self.sums[tenant]["dropped"] += queued
                self.scheduler.remove_model(tenant, model)
                self.scheduler.add_model(tenant, model)
                self.orphans.update(one.number for one in self.running if (one.tenant, one.model) == (tenant, model))

    def start(self) -> None:
        dispatch = self.scheduler.next()
        if dispatch is not None:
            self.running.append(dispatch)
            self.owners[dispatch.number] = self.generation[dispatch.tenant]

    def complete(self, dispatch: Dispatch, seconds: float, part: float) -> None:
        done = int(dispatch.rows * part)
        self.scheduler.complete(dispatch, seconds, done)
        if self.owners[dispatch.number] == self.generation[dispatch.tenant]:
            self.sums[dispatch.tenant]["got"] += done
            self.sums[dispatch.tenant]["dropped"] += dispatch.rows - done if dispatch.number in self.orphans else 0

    def rows(self, tenant: str) -> tuple[int, int]:
        """Running and waiting."""
        models = self.scheduler.statistics().tenants[tenant].models.values()
        running = [one for one in self.running if one.tenant == tenant]
        own = sum(one.rows for one in running if self.owners[one.number] == self.generation[tenant])
        return own, sum(one.rows_queued for one in models)


def fresh(parallel: int) -> Book:
    book = Book(Scheduler(parallel, batch_rows_max=BATCH_ROWS_MAX))
    book.scheduler.advance(0.0)
    for tenant in TENANTS:
        book.add(tenant)
    return book


def check(window: ShareWindow, now: float, came: float, asked_seconds: int) -> None:
    assert window.waited + window.asked == window.got + window.dropped + window.running + window.waiting
    assert sum(window.held.values()) == pytest.approx(window.seconds, abs=NEAR)
    assert all(window.held[hold] >= 0 for hold in HOLDS)
    assert window.seconds <= now - came + NEAR
    assert window.seconds >= min(asked_seconds, now - came) - NEAR
    assert window.share_got is None or -NEAR <= window.share_got <= 1 + NEAR
    assert window.share_due is None or -NEAR <= window.share_due <= 1 + NEAR
    assert window.cpu_seconds <= window.cpu_all + NEAR


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3), st.lists(operations, max_size=100))
def test_what_was_asked_for_is_what_was_got_dropped_or_waits(parallel: int, run: list[tuple[Any, ...]]) -> None:
    book = fresh(parallel)
    for operation in run:
        book.perform(operation)
    for tenant in TENANTS:
        sums, (running, waiting) = book.sums[tenant], book.rows(tenant)
        windows = book.scheduler.windows(tenant)
        for window, seconds in zip(windows, WINDOWS_SECONDS, strict=True):
            check(window, book.now, sums["came"], seconds)
            assert (window.running, window.waiting) == (running, waiting)
        if book.now - sums["came"] <= WINDOWS_SECONDS[-1]:
            whole = windows[-1]
            assert whole.waited == 0
            assert (whole.asked, whole.got, whole.dropped) == (sums["asked"], sums["got"], sums["dropped"])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.lists(operations, max_size=80))
def test_samples_tell_what_a_second_of_every_operation_would(parallel: int, run: list[tuple[Any, ...]]) -> None:
    """A book that is asked all the time, so that all is settled and sampled, tells the same as one that is not."""
    asked, quiet = fresh(parallel), fresh(parallel)
    for operation in run:
        if operation[0] == "wait":
            for _ in range(9):
                asked.perform(("wait", operation[1] / 10))
                for tenant in TENANTS:
                    asked.scheduler.windows(tenant)
            asked.now += quiet.now + operation[1] - asked.now
        else:
            asked.perform(operation)
        quiet.perform(operation)
    asked.perform(("wait", 0.0))
    for tenant in TENANTS:
        for one, other in zip(asked.scheduler.windows(tenant), quiet.scheduler.windows(tenant), strict=True):
            assert (one.asked, one.got, one.waited) == (other.asked, other.got, other.waited)
            assert [one.held[hold] for hold in HOLDS] == pytest.approx([other.held[hold] for hold in HOLDS], abs=NEAR)
            assert (one.share_due or 0.0) == pytest.approx(other.share_due or 0.0, abs=NEAR)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.lists(operations.filter(lambda one: one[0] != "quota"), max_size=80))
def test_without_a_quota_nothing_is_held_by_one(parallel: int, run: list[tuple[Any, ...]]) -> None:
    book = fresh(parallel)
    for operation in run:
        book.perform(operation)
        assert book.scheduler.due() is None
    for tenant in TENANTS:
        assert all(window.held["quota"] == 0 for window in book.scheduler.windows(tenant))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([0.5, 3.0, 40.0, 1000.0]),
    st.lists(st.tuples(st.sampled_from([0.001, 0.05, 0.5, 3.0]), st.integers(0, 400)), max_size=60),
)
def test_a_quota_is_kept_over_any_time_and_used_while_rows_wait(rows_s: float, run: list[tuple[float, int]]) -> None:
    scheduler, now, ticket = Scheduler(1, batch_rows_max=BATCH_ROWS_MAX), 0.0, 0
    scheduler.advance(now)
    scheduler.add_tenant("ads")
    scheduler.add_model("ads", "a")
    scheduler.set_rows_s("ads", rows_s)
    started: list[tuple[float, int]] = []
    for seconds, rows in run:
        now += seconds
        scheduler.advance(now)
        if rows:
            scheduler.enqueue(ticket := ticket + 1, "ads", "a", rows)
        while (dispatch := scheduler.next()) is not None:
            started.append((now, dispatch.rows))
            scheduler.complete(dispatch, 0.0001)
        if scheduler.rows_held("ads", "a"):
            due = scheduler.due()
            assert due is not None, "rows wait, so it is known when they go on"
            assert now < due <= now + 1 / rows_s + 0.051
    for first in range(len(started)):
        for last in range(first, len(started)):
            lasted = started[last][0] - started[first][0]
            rows = sum(rows for _, rows in started[first : last + 1])
            assert rows <= rows_s * lasted + max(1.0, rows_s * BURST_SECONDS) + NEAR


def test_rows_over_the_quota_wait_and_others_have_its_share() -> None:
    book = fresh(1)
    book.scheduler.set_rows_s("ads", 10.0)
    for tenant in ("ads", "fraud"):
        book.perform(("enqueue", tenant, "a", 100))
    book.now = 0.5
    served: defaultdict[str, int] = defaultdict(int)
    for _ in range(40):
        book.scheduler.advance(book.now)
        book.start()
        if book.running:
            dispatch = book.running.pop()
            served[dispatch.tenant] += dispatch.rows
            book.complete(dispatch, 0.001, 1.0)
    assert served == {"ads": 10, "fraud": 100}
    due = book.scheduler.due()
    assert due == pytest.approx(0.6)
    book.now = 2.0
    book.scheduler.advance(book.now)
    window = book.scheduler.windows("ads")[0]
    assert (window.asked, window.got, window.waiting) == (100, 10, 90)
    assert window.held["quota"] == pytest.approx(0.1)
    assert window.held["turn"] == pytest.approx(0.5 + 1.4)
    book.scheduler.set_rows_s("ads", 0.0)
    assert book.scheduler.next() is not None


def test_each_second_of_a_tenant_is_told_by_what_held_it() -> None:
    book = fresh(1)
    scheduler = book.scheduler
    steps: list[tuple[float, tuple[Any, ...]]] = [
        (1.0, ("enqueue", "ads", "a", 200)),
        (1.0, ("next",)),
        (3.0, ("enqueue", "fraud", "a", 5)),
        (2.0, ("complete", 0, 0.5, 1.0)),
        (0.0, ("next",)),
        (4.0, ("block", "ads", True)),
        (6.0, ("complete", 0, 0.25, 1.0)),
    ]
    for seconds, operation in steps:
        book.now += seconds
        book.perform(operation)
    ads, fraud = (scheduler.windows(tenant)[1] for tenant in ("ads", "fraud"))
    # fraud's virtual time is lower, so it is its turn once the first batch of ads ends.
    assert dict(ads.held) == pytest.approx(
        {"idle": 1, "turn": 1 + 4, "worker": 5, "blocked": 6, "served": 0, "quota": 0}
    )
    assert dict(fraud.held) == pytest.approx(
        {"idle": 5, "turn": 2, "served": 10, "worker": 0, "blocked": 0, "quota": 0}
    )
    assert (ads.cpu_seconds, fraud.cpu_seconds, ads.cpu_all) == (0.5, 0.25, 0.75)
    assert ads.share_got == pytest.approx(2 / 3)
    assert ads.share_due == pytest.approx((4 + 6 / 2) / 16)
    assert [(one.tenant, one.competed_seconds) for one in ads.competitors] == [("fraud", pytest.approx(12.0))]


def test_time_for_which_a_tenant_had_no_work_is_no_limit_of_its_worker() -> None:
    book = fresh(1)
    for _ in range(20):
        book.now += 1.0
        book.perform(("enqueue", "fraud", "a", 1))
        book.start()
        book.complete(book.running.pop(), 0.9, 1.0)
    book.perform(("enqueue", "ads", "a", 1))
    assert book.scheduler.windows("ads")[0].forgiven_seconds == 0
    assert book.scheduler.windows("ads")[0].held["worker"] == 0


def test_a_window_forgets_what_was_before_it() -> None:
    book = fresh(1)
    book.perform(("enqueue", "ads", "a", 10))
    book.start()
    book.complete(book.running.pop(), 0.5, 1.0)
    got = []
    for now in (5.0, 30.0, 100.0, 900.0):
        book.now = now
        book.scheduler.advance(now)
        got.append([window.got for window in book.scheduler.windows("ads")])
    assert got == [[10, 10, 10], [0, 10, 10], [0, 0, 10], [0, 0, 0]]


def test_rows_a_second_are_told_of_each_window_however_long_it_goes_on() -> None:
    book = fresh(1)
    for second in range(1500):
        book.now = second + 0.5
        book.perform(("enqueue", "ads", "a", 1))
        book.start()
        book.complete(book.running.pop(), 0.25, 1.0)
    book.now = 1500.0
    book.scheduler.advance(book.now)
    windows = book.scheduler.windows("ads")
    assert [(window.seconds, window.got) for window in windows] == [(10, 10), (60, 60), (600, 600)]
    assert [window.cpu_seconds for window in windows] == pytest.approx([2.5, 15, 150])


def test_a_window_of_a_minute_that_begins_within_a_second_is_told_by_the_second() -> None:
    book = fresh(1)
    book.now = 1.001
    book.perform(("enqueue", "ads", "a", 1))
    book.now = 701.001
    book.scheduler.advance(book.now)
    window = book.scheduler.windows("ads")[1]
    assert window.held["turn"] == pytest.approx(window.seconds)


def test_rows_of_a_model_that_goes_while_they_run_are_got_or_dropped() -> None:
    book = fresh(1)
    for operation in (("enqueue", "ads", "a", 10), ("next",), ("renew model", "ads", "a"), ("complete", 0, 0.1, 0.5)):
        book.perform(operation)
    window = book.scheduler.windows("ads")[0]
    assert (window.asked, window.got, window.dropped, window.waiting) == (10, 5, 5, 0)


def test_a_tenant_is_due_all_once_the_others_have_no_work_left() -> None:
    book = fresh(2)
    for tenant in ("ads", "fraud"):
        book.perform(("enqueue", tenant, "a", 1))
        book.start()
    book.now = 4.0
    book.perform(("complete", 1, 0.1, 1.0))
    book.now = 10.0
    book.scheduler.advance(book.now)
    assert book.scheduler.windows("ads")[0].share_due == pytest.approx((4 / 2 + 6) / 10)


def test_rows_that_were_put_back_do_not_count_against_the_quota() -> None:
    book = fresh(1)
    book.scheduler.set_rows_s("ads", 10.0)
    book.perform(("enqueue", "ads", "a", 10))
    for _ in range(5):
        book.start()
        dispatch = book.running.pop()
        assert dispatch.rows == 10
        book.scheduler.requeue(dispatch, 0.001)
    assert book.scheduler.due() is None


def test_a_bucket_owes_what_was_taken_beyond_it_and_keeps_what_it_has_when_changed() -> None:
    bucket = RowBucket(10.0, 0.0)
    assert bucket.allowed(0.0) == 10
    bucket.take(30)
    assert bucket.allowed(1.0) == 0
    assert bucket.ready_at(100, 1.0) == pytest.approx(2.1)
    bucket.put_back(15)
    assert bucket.allowed(1.0) == 5
    bucket.change(2.0, 1.0)
    assert bucket.allowed(9.0) == 2
    with pytest.raises(NotFound):
        Scheduler(1).windows("nobody")
