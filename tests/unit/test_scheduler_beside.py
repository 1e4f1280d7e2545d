"""What the scheduler starts beside the slots: short batches of light tenants, and others in the slot of a sleeper."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tenants.cost import CostEstimate
from tenants.scheduler import BACKGROUND, URGENT, Dispatch, Scheduler

QUANTUM = 0.010
KNOWN_CHEAP = CostEstimate(seconds_per_call=300e-6, seconds_per_row=10e-6, rows_seen_max=4096, calls=1)


def heavy_and_light(short_beside: bool = True) -> tuple[Scheduler, Dispatch]:
    """A heavy tenant whose batch holds the only slot, and a light one, idle so far."""
    scheduler = Scheduler(1, QUANTUM, short_beside=short_beside)
    for tenant in ("heavy", "light"):
        scheduler.add_tenant(tenant)
        scheduler.add_model(tenant, "a", cost=replace(KNOWN_CHEAP))
    scheduler.enqueue("much", "heavy", "a", 40_000)
    running = scheduler.next()
    assert running is not None
    return scheduler, running


def test_a_light_tenants_short_batch_does_not_wait_for_a_heavy_ones_end() -> None:
    scheduler, _ = heavy_and_light()
    scheduler.enqueue("few", "light", "a", 3)
    short = scheduler.next()
    assert short is not None
    assert (short.tenant, short.rows, short.short) == ("light", 3, True)
    assert scheduler.next() is None
    scheduler.complete(short, 330e-6)
    without, _ = heavy_and_light(short_beside=False)
    without.enqueue("few", "light", "a", 3)
    assert without.next() is None


def test_short_batches_beside_end_when_their_tenant_is_a_quantum_ahead() -> None:
    scheduler, _ = heavy_and_light()
    had = 0.0
    for ticket in range(100):
        scheduler.enqueue(ticket, "light", "a", 3)
        if (short := scheduler.next()) is None:
            break
        scheduler.complete(short, 330e-6)
        had += 330e-6
    assert QUANTUM - 660e-6 <= had <= QUANTUM


def test_short_batches_go_on_beside_one_that_overruns_as_in_a_fluid_system() -> None:
    """A batch uses a second of the only slot: of two equal tenants the other would have had half of it by then."""
    scheduler, endless = heavy_and_light()
    had = 0.0
    for look in range(1, 51):
        scheduler.overrun(endless, look * 2 * QUANTUM, computing=True)
        if scheduler.rows_held("light", "a") == 0:
            scheduler.enqueue(look, "light", "a", 3)
        while (short := scheduler.next()) is not None:
            scheduler.complete(short, 330e-6)
            had += 330e-6
            scheduler.enqueue((look, had), "light", "a", 3)
    assert 0.5 <= had <= 0.5 + QUANTUM


def test_a_tenant_with_more_waiting_than_a_short_batch_takes_its_turns_in_the_slots() -> None:
    """However short its batches are: two tenants are backlogged, three to one by weight, and one's batches are short."""
    scheduler, running = heavy_and_light()
    scheduler.set_weight("light", 3.0)
    served = {"heavy": 0.0, "light": 0.0}
    for batch in range(400):
        for tenant in served:
            scheduler.enqueue(batch, tenant, "a", 100)
        cost = 0.010 if running.tenant == "heavy" else 0.0013
        assert scheduler.next() is None
        scheduler.complete(running, cost)
        served[running.tenant] += cost
        running = scheduler.next() or running
    assert served["light"] / served["heavy"] == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize(("rows", "priority"), [(500, URGENT), (3, BACKGROUND)])
def test_a_long_batch_or_one_that_is_not_urgent_waits_for_a_slot(rows: int, priority: int) -> None:
    scheduler, running = heavy_and_light()
    scheduler.enqueue("rows", "light", "a", rows, priority)
    assert scheduler.next() is None
    scheduler.complete(running, 0.010)
    started = scheduler.next()
    assert started is not None
    assert (started.tenant, started.short) == ("light", False)


def test_a_batch_that_sleeps_lends_its_slot_and_can_ask_it_back() -> None:
    scheduler, sleeping = heavy_and_light(short_beside=False)
    scheduler.enqueue("rows", "light", "a", 40_000)
    assert scheduler.next() is None
    scheduler.overrun(sleeping, 0.0, computing=False)
    first = scheduler.next()
    assert first is not None
    assert first.tenant == "light"
    scheduler.overrun(sleeping, 0.0, computing=True)
    scheduler.complete(first, 0.010)
    assert scheduler.next() is None, "the slot is its own again"
    scheduler.complete(sleeping, 0.010)
    assert scheduler.next() is not None
    assert scheduler.next() is None


@pytest.mark.parametrize("computing", [True, False])
def test_a_short_batch_that_overruns_does_not_hold_up_the_next_short_one(computing: bool) -> None:
    scheduler, running = heavy_and_light()
    scheduler.add_tenant("other")
    scheduler.add_model("other", "a", cost=replace(KNOWN_CHEAP))
    for tenant in ("light", "other"):
        scheduler.enqueue(tenant, tenant, "a", 3)
    stuck = scheduler.next()
    assert stuck is not None
    assert scheduler.next() is None
    scheduler.overrun(stuck, 0.020, computing)
    short = scheduler.next()
    assert short is not None
    assert short.short
    scheduler.complete(short, 330e-6)
    scheduler.complete(running, 0.010)
    assert (scheduler.next() is None) == computing, "one that computes holds a slot from then on"
