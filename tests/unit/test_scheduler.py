"""The fair scheduler: its stated bound, work conservation, and that no row is lost or doubled."""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from node.kernel.errors import BoundExceeded, NotFound
from node.kernel.types import BACKGROUND, URGENT
from tenants.cost import CostEstimate
from tenants.scheduler import BESIDE_SHARE_MAX, CREDIT_BATCHES_MAX, Dispatch, Scheduler

QUANTUM = 0.010
ROUNDING = 1e-6
TENANTS = ("ads", "fraud", "offers", "search")
MODELS = ("a", "b")

weights = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 10.0])
costs = st.one_of(st.floats(0, QUANTUM), st.floats(0, 10 * QUANTUM), st.just(0.0))


@dataclass
class Ticket:
    tenant: str
    model: str
    rows: int
    done: int = 0
    running: int = 0
    cancelled: bool = False


@dataclass
class Book:
    """A plain account of what must hold, kept beside the scheduler by the operations of a run."""

    scheduler: Scheduler
    tickets: dict[int, Ticket] = field(default_factory=dict)
    running: dict[int, Dispatch] = field(default_factory=dict)
    blocked: set[tuple[str, str | None]] = field(default_factory=set)
    present: set[str] = field(default_factory=set)
    latest: dict[tuple[str, str, int], int] = field(default_factory=dict)
    lent: set[int] = field(default_factory=set)
    beside: set[int] = field(default_factory=set)
    """Numbers of batches that were started beside the slots because they are short."""
    bound: int = 200

    def add_tenant(self, tenant: str, weight: float) -> None:
        if tenant in self.present:
            self.scheduler.set_weight(tenant, weight)
            return
        self.present.add(tenant)
        self.scheduler.add_tenant(tenant, weight)
        for model in MODELS:
            self.scheduler.add_model(tenant, model, rows_queued_max=self.bound)

    def remove_tenant(self, tenant: str) -> None:
        if tenant not in self.present or any(dispatch.tenant == tenant for dispatch in self.running.values()):
            return
        expected = {n for n, t in self.tickets.items() if t.tenant == tenant and self.open_rows(t) > 0}
        returned = self.scheduler.remove_tenant(tenant)
        assert len(returned) == len(set(returned))
        assert set(returned) == expected
        for number in expected:
            self.tickets[number].cancelled = True
        self.present.discard(tenant)
        self.blocked = {(t, m) for t, m in self.blocked if t != tenant}

    @staticmethod
    def open_rows(ticket: Ticket) -> int:
        return 0 if ticket.cancelled else ticket.rows - ticket.done - ticket.running

    def held(self, tenant: str, model: str) -> int:
        of_model = [t for t in self.tickets.values() if (t.tenant, t.model) == (tenant, model)]
        return sum(self.open_rows(t) + t.running for t in of_model)

    def enqueue(self, tenant: str, model: str, rows: int, priority: int, whole: bool) -> None:
        if tenant not in self.present:
            with pytest.raises(NotFound):
                self.scheduler.enqueue(-1, tenant, model, rows, priority)
            return
        number = len(self.tickets)
        if self.held(tenant, model) + rows > self.bound:
            with pytest.raises(BoundExceeded):
                self.scheduler.enqueue(number, tenant, model, rows, priority, whole=whole)
            return
        self.scheduler.enqueue(number, tenant, model, rows, priority, whole=whole)
        self.tickets[number] = Ticket(tenant, model, rows)

    def runnable(self) -> bool:
        busy = {dispatch.tenant for dispatch in self.running.values()}
        return len(self.running.keys() - self.lent) < self.scheduler.parallel and any(
            self.open_rows(t) > 0
            and t.tenant in self.present - busy
            and (t.tenant, None) not in self.blocked
            and (t.tenant, t.model) not in self.blocked
            for t in self.tickets.values()
        )

    def next(self) -> Dispatch | None:
        expected, computing = self.runnable(), len(self.running.keys() - self.lent)
        dispatch = self.scheduler.next()
        if dispatch is None:
            assert not expected, "work-conserving"
            return None
        if not expected:
            assert computing == self.scheduler.parallel, "one more than there are slots, and no more"
            if dispatch.seconds_estimated <= BESIDE_SHARE_MAX * QUANTUM:
                self.beside.add(dispatch.number)
            else:
                assert self.beside & (self.running.keys() - self.lent), "in place of one that has a slot ahead of it"
            assert (dispatch.tenant, None) not in self.blocked
            assert (dispatch.tenant, dispatch.model) not in self.blocked
        assert dispatch.tenant not in {other.tenant for other in self.running.values()}
        assert dispatch.rows == sum(part.stop - part.start for part in dispatch.parts) > 0
        for part in dispatch.parts:
            assert isinstance(part.ticket, int)
            ticket = self.tickets[part.ticket]
            assert (ticket.tenant, ticket.model) == (dispatch.tenant, dispatch.model)
            assert part.start == ticket.done + ticket.running, "rows of a ticket run in order, each once"
            lane = dispatch.tenant, dispatch.model, dispatch.priority
            assert part.ticket >= self.latest.get(lane, 0), "first in, first out"
            self.latest[lane] = part.ticket
            ticket.running += part.stop - part.start
            assert ticket.done + ticket.running <= ticket.rows
        self.running[dispatch.number] = dispatch
        return dispatch

    def complete(self, dispatch: Dispatch, cpu_seconds: float, rows_done: int) -> None:
        del self.running[dispatch.number]
        self.lent.discard(dispatch.number)
        left = rows_done
        for part in dispatch.parts:
            assert isinstance(part.ticket, int)
            size = part.stop - part.start
            done = min(size, left)
            left -= done
            self.tickets[part.ticket].running -= size
            self.tickets[part.ticket].done += done
            if done < size:
                lane = dispatch.tenant, dispatch.model, dispatch.priority
                self.latest[lane] = min(self.latest[lane], part.ticket)
        if rows_done:
            self.scheduler.complete(dispatch, cpu_seconds, rows_done)
        else:
            self.scheduler.requeue(dispatch, cpu_seconds)

    def lend(self, dispatch: Dispatch, lent: bool) -> None:
        self.scheduler.lend(dispatch, lent)
        (self.lent.add if lent else self.lent.discard)(dispatch.number)

    def cancel(self, number: int) -> None:
        ticket = self.tickets[number]
        if ticket.tenant not in self.present or ticket.cancelled or ticket.running:
            return
        assert self.scheduler.cancel(ticket.tenant, ticket.model, number) == self.open_rows(ticket)
        ticket.cancelled = True

    def block(self, tenant: str, model: str | None, on: bool) -> None:
        if tenant not in self.present:
            return
        if on:
            self.scheduler.block(tenant, model)
            self.blocked.add((tenant, model))
        else:
            self.scheduler.unblock(tenant, model)
            self.blocked.discard((tenant, model))


operations = st.one_of(
    st.tuples(
        st.just("enqueue"), st.sampled_from(TENANTS), st.sampled_from(MODELS),
        st.one_of(st.integers(1, 5), st.integers(1, 120)),
        st.sampled_from([URGENT, BACKGROUND]), st.sampled_from([False, False, True]),
    ),
    st.tuples(st.just("next")),
    st.tuples(st.just("next")),
    st.tuples(st.just("complete"), st.integers(0, 7), costs, st.floats(0, 1)),
    st.tuples(st.just("complete"), st.integers(0, 7), costs, st.just(1.0)),
    st.tuples(st.just("add"), st.sampled_from(TENANTS), weights),
    st.tuples(st.just("remove"), st.sampled_from(TENANTS)),
    st.tuples(
        st.just("block"), st.sampled_from(TENANTS), st.sampled_from([None, *MODELS]), st.sampled_from([True, False])
    ),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("lend"), st.integers(0, 7), st.sampled_from([True, False])),
)  # fmt: skip


def perform(book: Book, operation: tuple[object, ...]) -> None:
    match operation:
        case ("enqueue", str(tenant), str(model), int(rows), int(priority), bool(whole)):
            book.enqueue(tenant, model, rows, priority, whole)
        case ("next",):
            book.next()
        case ("complete", int(which), float(cost), float(share)) if book.running:
            dispatch = list(book.running.values())[which % len(book.running)]
            book.complete(dispatch, cost, round(dispatch.rows * share))
        case ("add", str(tenant), float(weight)):
            book.add_tenant(tenant, weight)
        case ("remove", str(tenant)):
            book.remove_tenant(tenant)
        case ("block", str(tenant), model, bool(on)) if model is None or isinstance(model, str):
            book.block(tenant, model, on)
        case ("lend", int(which), bool(lent)) if book.running:
            book.lend(list(book.running.values())[which % len(book.running)], lent)
        case ("cancel", int(number)) if book.tickets:
            book.cancel(number % len(book.tickets))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3), st.lists(operations, max_size=80))
def test_any_operations_conserve_work_and_rows(parallel: int, run: list[tuple[object, ...]]) -> None:
    book = Book(Scheduler(parallel, QUANTUM, batch_rows_max=64))
    for tenant in TENANTS[:2]:
        book.add_tenant(tenant, 1.0)
    for operation in run:
        perform(book, operation)
        for tenant in book.present:
            for model in MODELS:
                assert book.scheduler.rows_held(tenant, model) == book.held(tenant, model) <= book.bound

    for tenant, blocked_model in list(book.blocked):
        book.block(tenant, blocked_model, on=False)
    while book.running or book.runnable():
        while book.next() is not None:
            pass
        dispatch = next(iter(book.running.values()))
        book.complete(dispatch, 0.001, dispatch.rows)
    assert all(ticket.done == ticket.rows for ticket in book.tickets.values() if not ticket.cancelled), "none starves"
    assert all(ticket.running == 0 for ticket in book.tickets.values())


@dataclass
class Backlogged:
    """Drives a scheduler in simulated time: a batch of cost c holds its slot for c seconds."""

    scheduler: Scheduler
    always: dict[str, float]
    costs: list[float]
    now: float = 0.0
    batches: int = 0
    number: int = 0
    ends: list[tuple[float, int, Dispatch, float]] = field(default_factory=list)
    served: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    costliest: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def feed(self, tenant: str, rows: int = 40) -> None:
        if self.scheduler.rows_held(tenant, "a") <= 400:
            self.number += 1
            self.scheduler.enqueue(self.number, tenant, "a", rows)

    def step(self) -> None:
        for tenant in self.always:
            self.feed(tenant)
        while (dispatch := self.scheduler.next()) is not None:
            cost = self.costs[self.batches % len(self.costs)]
            self.batches += 1
            heapq.heappush(self.ends, (self.now + cost, dispatch.number, dispatch, cost))
        if not self.ends:
            return
        self.now, _, dispatch, cost = heapq.heappop(self.ends)
        self.scheduler.complete(dispatch, cost)
        self.served[dispatch.tenant] += cost
        self.costliest[dispatch.tenant] = max(self.costliest[dispatch.tenant], cost)


def run_backlogged(
    parallel: int, shares: list[float], batch_costs: list[float], visits: list[tuple[int, float, int]], steps: int
) -> tuple[Backlogged, dict[str, list[float]]]:
    """Two or more tenants always backlogged, visitors coming and going; each tenant's served/weight after each step."""
    scheduler = Scheduler(parallel, QUANTUM, batch_rows_max=64)
    always = {f"always{index}": share for index, share in enumerate(shares)}
    for tenant, share in always.items():
        scheduler.add_tenant(tenant, share)
        scheduler.add_model(tenant, "a")
    run = Backlogged(scheduler, always, batch_costs)
    arrivals = {step % steps: (weight, rows) for step, weight, rows in visits}
    history: dict[str, list[float]] = {tenant: [0.0] for tenant in always}
    for step in range(steps):
        if step in arrivals:
            weight, rows = arrivals[step]
            name = f"visitor{step}"
            scheduler.add_tenant(name, weight)
            scheduler.add_model(name, "a")
            run.feed(name, rows)
        run.step()
        forgiven = {name: share.forgiven_seconds for name, share in scheduler.statistics().tenants.items()}
        for tenant, weight in always.items():
            history[tenant].append((run.served[tenant] + forgiven[tenant]) / weight)
    return run, history


# Costs from CHARGE_SECONDS_MIN on, so that what is charged is what was served.
real_costs = st.lists(st.floats(20e-6, 10 * QUANTUM), min_size=1, max_size=12)
visits = st.lists(st.tuples(st.integers(0, 150), weights, st.integers(1, 400)), max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.lists(weights, min_size=2, max_size=5), real_costs, visits)
def test_one_slot_keeps_the_stated_bound(
    shares: list[float], batch_costs: list[float], visits: list[tuple[int, float, int]]
) -> None:
    run, history = run_backlogged(1, shares, batch_costs, visits, steps=150)
    assert all(share.forgiven_seconds == 0 for share in run.scheduler.statistics().tenants.values())
    names = list(run.always)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            apart = [one - other for one, other in zip(history[first], history[second], strict=True)]
            # A quantum more than the batch, as either may have run beside the slot.
            bound = sum((run.costliest[name] + QUANTUM) / run.always[name] for name in (first, second))
            # max - min over the run is the largest difference over any stretch of it
            assert max(apart) - min(apart) <= bound + ROUNDING


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 4), st.lists(weights, min_size=2, max_size=6), real_costs, visits)
def test_several_slots_keep_the_stated_bound(
    parallel: int, shares: list[float], batch_costs: list[float], visits: list[tuple[int, float, int]]
) -> None:
    run, history = run_backlogged(parallel, shares, batch_costs, visits, steps=150)
    running = {dispatch.tenant for _, _, dispatch, _ in run.ends}
    names = [name for name in run.always if name not in running]
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            credit = CREDIT_BATCHES_MAX * max(QUANTUM, *batch_costs, 0.0)
            allowed = {name: (run.costliest[name] + QUANTUM + credit) / run.always[name] for name in (first, second)}
            apart = history[first][-1] - history[second][-1]
            assert abs(apart) <= sum(allowed.values()) + ROUNDING


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([0.5, 1.0, 2.0]), real_costs)
@example(2, 1, 0.5, [0.001953125, 0.001953125, 0.0009266618535590279])
def test_equal_weights_get_equal_time_on_any_number_of_slots(
    parallel: int, more: int, weight: float, batch_costs: list[float]
) -> None:
    run, _ = run_backlogged(parallel, [weight] * (parallel + more), batch_costs, [], steps=600)
    times = [run.served[name] for name in run.always]
    longest = max(QUANTUM, *batch_costs, 0.0)
    # A waiting tenant's virtual time is within one batch above and the credit below; one that runs is a batch behind.
    assert max(times) - min(times) <= (2 + CREDIT_BATCHES_MAX) * longest + ROUNDING


@pytest.mark.parametrize("shares", [(2.0, 1.0, 1.0, 1.0), (1.9, 1.0, 1.0), (3.0, 2.0, 2.0, 1.0)])
@pytest.mark.parametrize("batch_costs", [[0.010], [0.001] * 9 + [0.1], [0.002, 0.019, 0.004, 0.012]])
def test_two_slots_divide_by_weight_where_one_worker_each_can_take_it(
    shares: tuple[float, ...], batch_costs: list[float]
) -> None:
    run, _ = run_backlogged(2, list(shares), batch_costs, [], steps=8000)
    for tenant, share in run.always.items():
        assert run.served[tenant] / sum(run.served.values()) == pytest.approx(share / sum(shares), rel=0.02)


def drain(scheduler: Scheduler, batches: int, cost: float) -> dict[tuple[str, str, int], float]:
    """CPU seconds by (tenant, model, priority) over so many batches run one after another."""
    served: defaultdict[tuple[str, str, int], float] = defaultdict(float)
    for _ in range(batches):
        dispatch = scheduler.next()
        if dispatch is None:
            break
        scheduler.complete(dispatch, cost)
        served[dispatch.tenant, dispatch.model, dispatch.priority] += cost
    return served


def test_weights_divide_the_time_between_tenants_and_then_between_models() -> None:
    scheduler = Scheduler(1, QUANTUM, batch_rows_max=16)
    for tenant, weight in (("ads", 1.0), ("fraud", 3.0)):
        scheduler.add_tenant(tenant, weight)
        scheduler.add_model(tenant, "a", weight=1.0)
        scheduler.add_model(tenant, "b", weight=4.0)
        for model in MODELS:
            scheduler.enqueue(f"{tenant}{model}", tenant, model, 60_000)
    served = drain(scheduler, 400, 0.010)
    assert served["fraud", "b", URGENT] == pytest.approx(4.0 * 3 / 4 * 4 / 5, rel=0.02)
    assert served["fraud", "a", URGENT] == pytest.approx(4.0 * 3 / 4 * 1 / 5, rel=0.02)
    assert served["ads", "b", URGENT] == pytest.approx(4.0 * 1 / 4 * 4 / 5, rel=0.02)
    assert served["ads", "a", URGENT] == pytest.approx(4.0 * 1 / 4 * 1 / 5, rel=0.06)


def test_background_rows_yield_to_urgent_ones_and_still_get_a_ninth() -> None:
    scheduler = one_model(batch_rows_max=16)
    scheduler.enqueue("late", "ads", "a", 30_000, BACKGROUND)
    scheduler.enqueue("now", "ads", "a", 30_000, URGENT)
    served = drain(scheduler, 900, 0.001)
    assert served["ads", "a", BACKGROUND] == pytest.approx(0.9 / 9, rel=0.02)


def one_model(batch_rows_max: int = 4096, cost: CostEstimate | None = None) -> Scheduler:
    scheduler = Scheduler(1, QUANTUM, batch_rows_max)
    scheduler.add_tenant("ads")
    scheduler.add_model("ads", "a", cost=cost)
    return scheduler


def busy(weight: float = 1.0) -> tuple[Scheduler, Dispatch]:
    """One slot, and the batch of a backlogged tenant that has it; another tenant that has nothing yet."""
    scheduler = one_model(batch_rows_max=16)
    scheduler.add_tenant("fraud", weight)
    scheduler.add_model("fraud", "a", cost=CostEstimate(100e-6, 10e-6))
    scheduler.enqueue("ads", "ads", "a", 40_000)
    running = scheduler.next()
    assert running is not None
    return scheduler, running


def test_what_is_short_runs_beside_a_batch_that_holds_the_slot() -> None:
    scheduler, _ = busy()
    scheduler.enqueue("fraud", "fraud", "a", 10)
    beside = scheduler.next()
    assert beside is not None
    assert (beside.tenant, beside.rows) == ("fraud", 10)
    scheduler.add_tenant("offers")
    scheduler.add_model("offers", "a", cost=CostEstimate(100e-6, 10e-6))
    scheduler.enqueue("offers", "offers", "a", 1)
    assert scheduler.next() is None, "one at a time"
    scheduler.complete(beside, 200e-6)
    assert scheduler.next() is not None


def test_a_short_batch_that_nobody_is_behind_takes_the_next_slot() -> None:
    scheduler, running = busy()
    scheduler.enqueue("fraud", "fraud", "a", 10)
    beside = scheduler.next()
    assert beside is not None
    scheduler.complete(running, 0.010)
    assert scheduler.next() is None, "it has the slot, and who waits is ahead of it"
    scheduler.complete(beside, 200e-6)
    after = scheduler.next()
    assert after is not None
    assert after.tenant == "ads"


def test_a_short_batch_ahead_of_the_tenant_that_is_due_does_not_take_its_slot() -> None:
    scheduler, running = busy()
    scheduler.add_tenant("offers")
    scheduler.add_model("offers", "a")
    scheduler.enqueue("short", "fraud", "a", 10)
    first = scheduler.next()
    assert first is not None
    scheduler.complete(first, 200e-6)
    scheduler.enqueue("again", "fraud", "a", 10)
    assert scheduler.next() is not None
    scheduler.enqueue("offers", "offers", "a", 40_000)
    assert scheduler.next() is None
    scheduler.complete(running, 0.010)
    due = scheduler.next()
    assert due is not None
    assert due.tenant == "offers"
    assert scheduler.next() is None


def test_what_is_not_short_waits_for_its_turn() -> None:
    scheduler, _ = busy()
    scheduler.enqueue("fraud", "fraud", "a", 10)
    scheduler.enqueue("more", "fraud", "a", 300)
    assert scheduler.next() is None, "all that waits counts, not what one batch takes of it"


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_short_batches_beside_the_slot_come_to_a_quantum_and_one_of_them(weight: float) -> None:
    scheduler, _ = busy(weight)
    used, each = 0.0, 0.0007
    for number in range(100):
        scheduler.enqueue(number, "fraud", "a", 10)
        dispatch = scheduler.next()
        if dispatch is None:
            break
        used += each
        scheduler.complete(dispatch, each)
    assert QUANTUM < used <= QUANTUM + each


def test_an_idle_tenant_lends_its_share_and_gets_no_credit_for_it() -> None:
    scheduler = one_model(batch_rows_max=16)
    scheduler.add_tenant("fraud")
    scheduler.add_model("fraud", "a")
    scheduler.enqueue("ads", "ads", "a", 40_000)
    assert drain(scheduler, 500, 0.010)["ads", "a", URGENT] == pytest.approx(5.0)
    scheduler.enqueue("fraud", "fraud", "a", 40_000)
    served = drain(scheduler, 100, 0.010)
    assert served["fraud", "a", URGENT] == pytest.approx(served["ads", "a", URGENT], abs=0.0101)


def test_an_idle_model_gets_no_credit_within_its_tenant() -> None:
    scheduler = one_model(batch_rows_max=16)
    scheduler.add_model("ads", "b")
    scheduler.enqueue("early", "ads", "b", 1)
    assert drain(scheduler, 1, 0.010)["ads", "b", URGENT] == 0.010
    scheduler.enqueue("a", "ads", "a", 40_000)
    drain(scheduler, 200, 0.010)
    scheduler.enqueue("b", "ads", "b", 40_000)
    served = drain(scheduler, 100, 0.010)
    assert served["ads", "b", URGENT] == pytest.approx(served["ads", "a", URGENT], abs=0.0101)


def test_a_blocked_tenant_is_skipped_and_gets_no_credit_for_it() -> None:
    scheduler = one_model(batch_rows_max=16)
    scheduler.add_tenant("fraud")
    scheduler.add_model("fraud", "a")
    for tenant in ("ads", "fraud"):
        scheduler.enqueue(tenant, tenant, "a", 40_000)
    scheduler.block("fraud")
    assert set(drain(scheduler, 300, 0.010)) == {("ads", "a", URGENT)}
    scheduler.unblock("fraud")
    served = drain(scheduler, 100, 0.010)
    assert served["fraud", "a", URGENT] == pytest.approx(served["ads", "a", URGENT], abs=0.0101)


def test_a_tenant_that_cannot_use_its_share_does_not_lock_others_out_later() -> None:
    """Weight 100 of 102 on two slots is more than one worker can use; what is lost is forgiven."""
    run, _ = run_backlogged(2, [100.0, 1.0, 1.0], [0.010], [], steps=900)
    assert run.served["always0"] == pytest.approx(4.5, rel=0.03)
    share = run.scheduler.statistics().tenants["always0"]
    assert share.forgiven_seconds > 0
    behind = run.scheduler.statistics().virtual_time - share.virtual_time
    assert behind <= (CREDIT_BATCHES_MAX + 1) * QUANTUM / 100.0 + QUANTUM


def test_loading_is_charged_to_the_tenant_it_is_for() -> None:
    scheduler = one_model(batch_rows_max=16)
    scheduler.add_tenant("fraud")
    scheduler.add_model("fraud", "a")
    for tenant in ("ads", "fraud"):
        scheduler.enqueue(tenant, tenant, "a", 4_000)
    scheduler.charge("ads", 0.5)
    served = drain(scheduler, 50, 0.010)
    assert served["ads", "a", URGENT] <= 0.010


def test_small_tickets_share_a_batch_and_large_ones_are_split() -> None:
    scheduler = one_model(cost=CostEstimate(seconds_per_call=300e-6, seconds_per_row=10e-6, rows_seen_max=4096))
    for number in range(50):
        scheduler.enqueue(number, "ads", "a", 3)
    together = scheduler.next()
    assert together is not None
    assert (together.rows, len(together.parts)) == (150, 50)
    scheduler.complete(together, 300e-6 + 150 * 10e-6)

    scheduler.enqueue("large", "ads", "a", 4096)
    sizes = []
    while (dispatch := scheduler.next()) is not None:
        sizes.append(dispatch.rows)
        scheduler.complete(dispatch, 300e-6 + dispatch.rows * 10e-6)
    assert sum(sizes) == 4096
    assert all(900 <= size <= 1000 for size in sizes[:-1]), "about one quantum each"


def test_rows_that_come_back_keep_their_order() -> None:
    scheduler = one_model(batch_rows_max=10)
    for ticket in ("first", "second", "third"):
        scheduler.enqueue(ticket, "ads", "a", 4)
    for done in (0, 5):
        dispatch = scheduler.next()
        assert dispatch is not None
        parts = [(part.ticket, part.start, part.stop) for part in dispatch.parts]
        assert parts == [("first", 0, 4), ("second", 0, 4), ("third", 0, 2)]
        scheduler.complete(dispatch, 0.001, done)
    dispatch = scheduler.next()
    assert dispatch is not None
    parts = [(part.ticket, part.start, part.stop) for part in dispatch.parts]
    assert parts == [("second", 1, 4), ("third", 0, 2), ("third", 2, 4)]


def test_whole_tickets_run_alone_and_stay_whole_when_queued_again() -> None:
    scheduler = one_model(batch_rows_max=16)
    scheduler.enqueue("usual", "ads", "a", 5)
    scheduler.enqueue("piece", "ads", "a", 40, whole=True, first=True)
    for _ in range(2):
        dispatch = scheduler.next()
        assert dispatch is not None
        assert dispatch.whole
        assert [(part.ticket, part.start, part.stop) for part in dispatch.parts] == [("piece", 0, 40)]
        scheduler.requeue(dispatch, 0.001)


def test_an_unknown_model_is_felt_out_before_large_batches() -> None:
    scheduler = one_model()
    scheduler.enqueue("rows", "ads", "a", 20_000)
    sizes = []
    for _ in range(12):
        dispatch = scheduler.next()
        assert dispatch is not None
        sizes.append(dispatch.rows)
        scheduler.complete(dispatch, 300e-6 + dispatch.rows * 5e-6)
    assert sizes[0] <= 16
    assert all(later <= 4 * earlier for earlier, later in pairwise(sizes))
    assert sizes[-1] == pytest.approx((QUANTUM - 300e-6) / 5e-6, rel=0.05)


@given(st.floats(1e-5, 0.1), st.floats(1e-7, 0.01), st.lists(st.integers(1, 4096), min_size=3, max_size=60))
def test_the_cost_of_a_linear_model_is_learned(call: float, row: float, sizes: list[int]) -> None:
    cost = CostEstimate()
    for rows in [*sizes, 1, 4096]:
        cost.observe(rows, call + row * rows)
    for rows in (1, 4096):
        assert cost.seconds(rows) == pytest.approx(call + row * rows, rel=0.01)


@given(
    st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 10)), max_size=40),
    st.floats(1e-4, 1.0), st.floats(1e-4, 10.0), st.integers(1, 4096),
)  # fmt: skip
def test_batches_stay_in_their_bounds_whatever_was_measured(
    observed: list[tuple[int, float]], quantum: float, call_seconds_max: float, rows_max: int
) -> None:
    cost = CostEstimate()
    for rows, seconds in observed:
        cost.observe(rows, seconds)
    rows = cost.rows_within(quantum, call_seconds_max, rows_max)
    assert 1 <= rows <= rows_max
    if rows > 1:
        longest = min(max(quantum, 2 * cost.seconds_per_call), call_seconds_max)
        assert cost.seconds(rows) <= longest * 1.0001


def test_a_batch_that_sleeps_lends_its_slot_and_can_ask_it_back() -> None:
    scheduler = Scheduler(1, QUANTUM)
    for tenant in ("sleeper", "other"):
        scheduler.add_tenant(tenant)
        scheduler.add_model(tenant, "a")
        scheduler.enqueue(tenant, tenant, "a", 40_000)
    sleeping = scheduler.next()
    assert sleeping is not None
    assert scheduler.next() is None
    scheduler.lend(sleeping, lent=True)
    first = scheduler.next()
    assert first is not None
    assert first.tenant == "other"
    scheduler.lend(sleeping, lent=False)
    scheduler.complete(first, 0.010)
    assert scheduler.next() is None, "the slot is its own again"
    scheduler.complete(sleeping, 0.010)
    assert scheduler.next() is not None
    assert scheduler.next() is None


def test_mistakes_are_named() -> None:
    scheduler = one_model()
    with pytest.raises(ValueError, match="weight 0"):
        scheduler.set_weight("ads", 0)
    with pytest.raises(NotFound, match="fraud"):
        scheduler.enqueue(1, "fraud", "a", 1)
    with pytest.raises(NotFound, match="ads/b"):
        scheduler.enqueue(1, "ads", "b", 1)
    with pytest.raises(BoundExceeded, match="bounded to 65536"):
        scheduler.enqueue(1, "ads", "a", 65_537)
    assert scheduler.statistics().tenants["ads"].models["a"].rows_queued == 0


def test_rows_move_before_those_of_the_other_model_in_order_and_past_its_bound() -> None:
    scheduler = Scheduler(1, QUANTUM)
    scheduler.add_tenant("a", 1.0)
    for model in ("old", "new"):
        scheduler.add_model("a", model, 1.0, CostEstimate(), 1.0)
    scheduler.set_rows_queued_max("a", "new", 4)
    scheduler.enqueue("running", "a", "old", 1)
    running = scheduler.next()
    assert running is not None
    for ticket in ("first", "second"):
        scheduler.enqueue(ticket, "a", "old", 3, whole=True)
    scheduler.enqueue("third", "a", "new", 2, whole=True)
    assert scheduler.move("a", "old", "new") == ["first", "second"]
    assert scheduler.rows_held("a", "old") == 1
    assert scheduler.rows_held("a", "new") == 8
    scheduler.complete(running, 0.001)
    ran = []
    while (dispatch := scheduler.next()) is not None:
        assert dispatch.model == "new"
        ran += [part.ticket for part in dispatch.parts]
        scheduler.complete(dispatch, 0.001)
    assert ran == ["first", "second", "third"]
