"""Weighted fair shares of worker CPU time between tenants, and between each tenant's models. Pure.

Start-time fair queuing (Goyal, Vin and Cheng, "Start-time Fair Queuing: A Scheduling Algorithm for Integrated
Services Packet Switching Networks", SIGCOMM 1996) over measured CPU seconds, in two levels. Each tenant has a
virtual time that rises by (CPU seconds used / weight); the waiting tenant whose virtual time is lowest goes next.
A tenant's flows, one for each model and priority, share its time in the same way.

Costs are unknown before a batch has run (the problem of 2DFQ, Mace et al., SIGCOMM 2016). A tenant has one worker,
hence at most one running batch, so its virtual time moves once a batch, by what was measured: estimates decide only how
many rows make a batch, never who goes next, and a wrong one can't shift shares.

Time is an argument too (`advance`). Shares don't depend on it: it is for quotas of rows a second, and for telling what
held a tenant back (`tenants.shares`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from operator import attrgetter

from node.kernel import limits
from node.kernel.errors import BoundExceeded, NotFound
from node.kernel.types import BACKGROUND, URGENT
from tenants.bucket import RowBucket
from tenants.cost import CostEstimate
from tenants.scheduler_statistics import ModelShare, SchedulerStatistics, TenantShare
from tenants.shares import Hold, ShareLedger, ShareWindow

CHARGE_SECONDS_MIN = 20e-6
"""A batch is charged at least this, so that nothing runs for nothing, whatever was measured."""
CREDIT_BATCHES_MAX = 2
BESIDE_SHARE_MAX = 0.2
"""Of a quantum that all a tenant has waiting may be estimated to cost, for it to run beside the slots."""
COSTLIEST_DECAY = 0.995
"""Of the costliest recent batch, with each later one."""
PRIORITY_SHARES = {URGENT: 1.0, BACKGROUND: 0.125}
"""Priority -> factor on the model's weight: urgent rows go eight to one before background rows, which never starve."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start` to `stop` (exclusive) of what was enqueued as `ticket`."""

    ticket: Hashable
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One batch to run now in the tenant's worker; ends in exactly one `complete`."""

    number: int
    tenant: str
    model: str
    priority: int
    parts: tuple[Part, ...]
    rows: int
    seconds_estimated: float
    whole: bool = False


@dataclass(slots=True)
class _Entry:
    ticket: Hashable
    start: int
    stop: int
    whole: bool


@dataclass(slots=True)
class _Model:
    name: str
    weight: float
    cost: CostEstimate
    call_seconds_max: float
    rows_queued_max: int
    flows: dict[int, _Flow] = field(default_factory=dict)
    rows_queued: int = 0
    rows_running: int = 0
    rows_done: int = 0
    calls: int = 0
    cpu_seconds: float = 0.0
    blocked: bool = False


@dataclass(slots=True)
class _Flow:
    """Rows of one model and priority; first in, first out."""

    model: _Model
    priority: int
    virtual: float
    entries: deque[_Entry] = field(default_factory=deque)

    @property
    def weight(self) -> float:
        return self.model.weight * PRIORITY_SHARES[self.priority]


@dataclass(slots=True)
class _Tenant:
    name: str
    weight: float
    virtual: float
    flows_virtual: float = 0.0
    """The virtual time among the tenant's own flows."""
    models: dict[str, _Model] = field(default_factory=dict)
    ready: dict[tuple[str, int], _Flow] = field(default_factory=dict)
    running: int = 0
    blocked: bool = False
    calls: int = 0
    cpu_seconds: float = 0.0
    forgiven_seconds: float = 0.0
    bucket: RowBucket | None = None
    """Its quota of rows a second; None: none."""


@dataclass(slots=True)
class _Running:
    dispatch: Dispatch
    tenant: _Tenant
    model: _Model
    flow: _Flow
    beside: float = -math.inf
    """The tenant's virtual time, if the batch was started beside the slots."""
    lent: bool = False
    """Others have its slot meanwhile."""


_virtual = attrgetter("virtual")


class Scheduler:
    """Decides which rows run next in `parallel` CPU slots, one running batch a tenant.

    **Bound.** Take any time in which tenants f and g both had work waiting or running, were not blocked and kept
    their weights w. With one slot, the CPU seconds S they were served obey
    |S_f/w_f - S_g/w_g| <= c_f/w_f + c_g/w_g, with c the costliest batch the tenant ran in that time: two quanta,
    for batches of one quantum and weights of at least 1 (theorem 1 of the paper above; VTC, Sheng et al., OSDI 2024,
    has the like for tokens). With more slots a tenant may be unable to take its share, as it has one worker only.
    What it falls behind by is kept for it up to CREDIT_BATCHES_MAX times the costliest recent batch of all (at least
    a quantum) and forgiven beyond, so that it can't lock others out later; counting what was forgiven as served, the
    bound then holds with that credit, divided by its weight, added for each of the two.

    **Beside the slots.** A tenant with little to run is not to wait for the batch of another: one batch more than there
    are slots may run if all that its tenant has waiting is short (BESIDE_SHARE_MAX of a quantum). The next slot that
    is free is then taken by it, unless the tenant that is due is behind it: that one goes beside them in its place. It
    starts at most a quantum of its own ahead of what was started in the slots, which is all it adds to the bound: a
    quantum, divided by its weight.

    **Lending.** A batch that holds its slot without computing (it sleeps) lends it to others, see `lend`. Then as many
    batches compute at once as there are slots; a tenant that lends falls behind as it does with more of them.

    **Work-conserving.** `next` returns a batch whenever a slot is free and some tenant that isn't blocked or
    running, and whose quota isn't used up, has rows of a model that isn't blocked.

    **Quota.** While its bucket of rows a second (`tenants.bucket`) is empty, a tenant counts as idle: its rows wait,
    and others have its share.

    **Coming back.** A tenant (or flow) that was idle or blocked goes on from the present virtual time: no credit
    for the past. Every other operation is O(1) but for `next`, linear in the tenants and flows ready.
    """

    def __init__(
        self,
        parallel: int,
        quantum_seconds: float = limits.QUANTUM_MS / 1000,
        batch_rows_max: int = limits.SEQUENCE_CHUNK_ROWS_MAX,
    ) -> None:
        if parallel < 1 or not quantum_seconds > 0 or batch_rows_max < 1:
            raise ValueError("a scheduler needs at least one slot, a quantum above 0 and batches of at least one row")
        self.parallel = parallel
        self.quantum_seconds = quantum_seconds
        self.batch_rows_max = batch_rows_max
        self._tenants: dict[str, _Tenant] = {}
        self._ready: dict[str, _Tenant] = {}
        self._running: dict[int, _Running] = {}
        self._slots_taken = 0
        self._virtual = 0.0
        """The highest virtual time at which a batch was started in a slot, not beside them."""
        self._costliest_seconds = quantum_seconds
        self._number = 0
        self._ledger = ShareLedger()
        self._throttled: dict[str, float] = {}
        """Tenants whose rows wait for their quota, and when it lets them go on."""

    # Time

    def advance(self, now: float) -> None:
        """What follows happens at `now`, in seconds of a clock that never goes back."""
        while self._throttled and (until := min(self._throttled.values())) <= now:
            self._ledger.advance(until)
            for tenant in [name for name, one in self._throttled.items() if one <= until]:
                self._refresh(self._tenants[tenant])
        self._ledger.advance(now)

    def due(self) -> float | None:
        """When `next` is to be asked again because a quota lets rows go on; None: no tenant waits for that."""
        return min(self._throttled.values(), default=None)

    def windows(self, tenant: str) -> tuple[ShareWindow, ...]:
        """What the tenant asked for and got of late, and what held it back. Raises NotFound."""
        asked = self._tenant(tenant)
        running = sum(one.dispatch.rows for one in self._running.values() if one.tenant is asked)
        waiting = sum(model.rows_queued * _seconds_per_row(model) for model in asked.models.values())
        return self._ledger.windows(tenant, running, waiting)

    # Tenants and models

    def add_tenant(self, tenant: str, weight: float = 1.0) -> None:
        """Raises BoundExceeded over TENANTS_MAX, ValueError if the tenant is there or the weight is out of range."""
        if tenant in self._tenants:
            raise ValueError(f"tenant {tenant} is already scheduled")
        if len(self._tenants) >= limits.TENANTS_MAX:
            raise BoundExceeded(
                f"tenant {tenant} not taken: TENANTS_MAX is {limits.TENANTS_MAX}; remove a tenant first"
            )
        self._tenants[tenant] = _Tenant(tenant, _checked_weight(weight), self._virtual)
        self._ledger.add(tenant, weight)

    def remove_tenant(self, tenant: str) -> list[Hashable]:
        """Forget the tenant; the tickets that still had rows queued, each once. A running batch may still complete."""
        removed = self._tenant(tenant)
        del self._tenants[tenant]
        self._ready.pop(tenant, None)
        self._throttled.pop(tenant, None)
        self._ledger.remove(tenant)
        tickets: dict[Hashable, None] = {}
        for model in removed.models.values():
            tickets.update(dict.fromkeys(_empty(model)))
        removed.models.clear()
        removed.ready.clear()
        return list(tickets)

    def set_weight(self, tenant: str, weight: float) -> None:
        self._tenant(tenant).weight = _checked_weight(weight)
        self._ledger.weigh(tenant, weight)

    def set_rows_s(self, tenant: str, rows_s: float) -> None:
        """A quota of rows a second from now on; 0: none."""
        limited = self._tenant(tenant)
        if not rows_s:
            limited.bucket = None
        elif limited.bucket is None:
            limited.bucket = RowBucket(rows_s, self._ledger.now)
        elif rows_s != limited.bucket.rows_s:
            limited.bucket.change(rows_s, self._ledger.now)
        self._refresh(limited)

    def add_model(
        self,
        tenant: str,
        model: str,
        weight: float = 1.0,
        cost: CostEstimate | None = None,
        call_seconds_max: float = math.inf,
        rows_queued_max: int = limits.ROWS_QUEUED_PER_MODEL_MAX,
    ) -> None:
        """`call_seconds_max` bounds the estimated cost of a batch, below the deadline of a call."""
        owner = self._tenant(tenant)
        if model in owner.models:
            raise ValueError(f"model {tenant}/{model} is already scheduled")
        bound = min(rows_queued_max, limits.ROWS_QUEUED_PER_MODEL_MAX)
        owner.models[model] = _Model(model, _checked_weight(weight), cost or CostEstimate(), call_seconds_max, bound)

    def remove_model(self, tenant: str, model: str) -> list[Hashable]:
        """Forget the model; the tickets that still had rows queued, each once."""
        owner, removed = self._tenant(tenant), self._model(tenant, model)
        self._ledger.dropped(tenant, removed.rows_queued)
        tickets = _empty(removed)
        for priority in removed.flows:
            owner.ready.pop((model, priority), None)
        del owner.models[model]
        self._refresh(owner)
        return tickets

    def set_rows_queued_max(self, tenant: str, model: str, rows: int) -> None:
        self._model(tenant, model).rows_queued_max = min(rows, limits.ROWS_QUEUED_PER_MODEL_MAX)

    def set_cost(self, tenant: str, model: str, cost: CostEstimate) -> None:
        """A better first estimate; ignored once calls of the model were measured."""
        estimated = self._model(tenant, model)
        if estimated.cost.calls == 0:
            estimated.cost = cost

    def block(self, tenant: str, model: str | None = None) -> None:
        """Skip the tenant, or one model of it, until `unblock`; what runs goes on, what is queued stays."""
        owner = self._tenant(tenant)
        if model is None:
            owner.blocked = True
        else:
            self._model(tenant, model).blocked = True
            for priority in PRIORITY_SHARES:
                owner.ready.pop((model, priority), None)
        self._refresh(owner)

    def unblock(self, tenant: str, model: str | None = None) -> None:
        owner = self._tenant(tenant)
        if model is None:
            owner.blocked = False
        else:
            unblocked = self._model(tenant, model)
            unblocked.blocked = False
            for flow in unblocked.flows.values():
                self._flow_ready(owner, flow)
        self._refresh(owner)

    # Work

    def enqueue(
        self,
        ticket: Hashable,
        tenant: str,
        model: str,
        rows: int,
        priority: int = URGENT,
        *,
        whole: bool = False,
        first: bool = False,
    ) -> None:
        """Queue rows 0 to `rows` of `ticket`.

        `whole`: they run as one batch, by themselves. `first`: before what is queued, and past the bound, for
        rows that were accepted once already. Raises BoundExceeded when the model's queue would be over its bound;
        then nothing was queued. Raises NotFound for an unknown tenant or model, ValueError for rows < 1.
        """
        if rows < 1:
            raise ValueError("a ticket needs at least one row")
        owner, queued = self._tenant(tenant), self._model(tenant, model)
        held = queued.rows_queued + queued.rows_running
        if not first and held + rows > queued.rows_queued_max:
            raise BoundExceeded(
                f"model {tenant}/{model} holds {held} rows and can't take {rows} more: its queue is bounded to"
                f" {queued.rows_queued_max}; keep the rows and submit them again when some are done"
            )
        flow = queued.flows.get(priority)
        if flow is None:
            flow = queued.flows[priority] = _Flow(queued, priority, owner.flows_virtual)
        entry = _Entry(ticket, 0, rows, whole)
        if first:
            flow.entries.appendleft(entry)
        else:
            flow.entries.append(entry)
        queued.rows_queued += rows
        self._ledger.asked(tenant, rows)
        self._flow_ready(owner, flow)
        self._refresh(owner)

    def next(self) -> Dispatch | None:
        """The next batch to start, or None when no slot is free, nor the place beside them, or nothing may run."""
        if not self._ready or self._slots_taken > self.parallel:
            return None
        due = min(self._ready.values(), key=_virtual)
        if self._slots_taken < self.parallel or self._owed_a_slot(due):
            self._virtual = max(self._virtual, due.virtual)
            return self._start(due)
        light = [tenant for tenant in self._ready.values() if self._may_run_beside(tenant)]
        return self._start(min(light, key=_virtual), beside=True) if light else None

    def _owed_a_slot(self, due: _Tenant) -> bool:
        """Whether a batch that was let in beside the slots, ahead of that tenant, has one of them by now."""
        return any(one.beside > due.virtual and not one.lent for one in self._running.values())

    def _may_run_beside(self, tenant: _Tenant) -> bool:
        """Whether all it has waiting is short, and it is at most a quantum ahead of what runs in the slots."""
        if tenant.virtual > self._virtual + self.quantum_seconds / tenant.weight:
            return False
        waiting = sum(flow.model.cost.seconds(flow.model.rows_queued) for flow in tenant.ready.values())
        return waiting <= BESIDE_SHARE_MAX * self.quantum_seconds

    def _start(self, tenant: _Tenant, beside: bool = False) -> Dispatch:
        self._slots_taken += 1
        flow = min(tenant.ready.values(), key=_virtual)
        tenant.flows_virtual = max(tenant.flows_virtual, flow.virtual)
        model = flow.model
        whole = flow.entries[0].whole
        parts, rows = self._take(flow, self._allowed(tenant))
        if tenant.bucket is not None:
            tenant.bucket.take(rows)
        model.rows_queued -= rows
        model.rows_running += rows
        if not flow.entries:
            del tenant.ready[model.name, flow.priority]
        self._number += 1
        dispatch = Dispatch(
            self._number, tenant.name, model.name, flow.priority, parts, rows, model.cost.seconds(rows), whole
        )
        ahead = tenant.virtual if beside else -math.inf
        self._running[dispatch.number] = _Running(dispatch, tenant, model, flow, ahead)
        tenant.running += 1
        del self._ready[tenant.name]
        self._ledger.hold(tenant.name, self._hold(tenant))
        return dispatch

    def lend(self, dispatch: Dispatch, lent: bool) -> None:
        """The batch doesn't compute (or does again): others have its slot meanwhile. One asked back while others have
        it is one slot too many until another batch ends."""
        running = self._running.get(dispatch.number)
        if running is not None and running.lent != lent:
            running.lent = lent
            self._slots_taken += -1 if lent else 1

    def complete(
        self, dispatch: Dispatch, cpu_seconds: float, rows_done: int | None = None, *, learn: bool = True
    ) -> None:
        """The batch has ended: charge what it used and put its rows from `rows_done` on (None: all done) back in front.

        `learn`: whether the cost is representative; False when the call failed.
        """
        running = self._running.pop(dispatch.number)
        self._slots_taken -= not running.lent
        tenant, model, flow = running.tenant, running.model, running.flow
        done = dispatch.rows if rows_done is None else rows_done
        charge = max(cpu_seconds, CHARGE_SECONDS_MIN) if math.isfinite(cpu_seconds) else CHARGE_SECONDS_MIN
        if learn and done == dispatch.rows:
            model.cost.observe(dispatch.rows, charge)
        model.rows_running -= dispatch.rows
        model.rows_done += done
        model.calls += 1
        model.cpu_seconds += charge
        tenant.calls += 1
        tenant.running -= 1
        self._costliest_seconds = max(self._costliest_seconds * COSTLIEST_DECAY, charge, self.quantum_seconds)
        flow.virtual += charge / flow.weight
        self._charge(tenant, charge, done)
        if tenant.bucket is not None:
            tenant.bucket.put_back(dispatch.rows - done)
        if tenant.models.get(model.name) is model:
            self._put_back(flow, dispatch, done)
            self._flow_ready(tenant, flow)
        elif self._tenants.get(tenant.name) is tenant:
            self._ledger.dropped(tenant.name, dispatch.rows - done)
        self._refresh(tenant, returns=False)

    def requeue(self, dispatch: Dispatch, cpu_seconds: float) -> None:
        """The batch gave nothing (its worker was lost): charge it and queue its rows again, in front."""
        self.complete(dispatch, cpu_seconds, 0, learn=False)

    def charge(self, tenant: str, cpu_seconds: float) -> None:
        """CPU time used for the tenant outside a batch, such as loading a model."""
        self._charge(self._tenant(tenant), max(cpu_seconds, 0.0))

    def cancel(self, tenant: str, model: str, ticket: Hashable) -> int:
        """Drop the rows of `ticket` that are still queued; how many. Rows that run go on."""
        owner, queued = self._tenant(tenant), self._model(tenant, model)
        dropped = 0
        for flow in queued.flows.values():
            kept = deque(entry for entry in flow.entries if entry.ticket != ticket)
            if len(kept) == len(flow.entries):
                continue
            dropped += sum(entry.stop - entry.start for entry in flow.entries if entry.ticket == ticket)
            flow.entries = kept
            if not kept:
                owner.ready.pop((model, flow.priority), None)
        queued.rows_queued -= dropped
        self._ledger.dropped(tenant, dropped)
        self._refresh(owner)
        return dropped

    def move(self, tenant: str, source: str, target: str) -> list[Hashable]:
        """Queue what is queued for one model before what is queued for another, past its bound; the tickets moved."""
        owner, old, new = self._tenant(tenant), self._model(tenant, source), self._model(tenant, target)
        moved: list[Hashable] = []
        for priority, flow in old.flows.items():
            if not flow.entries:
                continue
            to = new.flows.get(priority)
            if to is None:
                to = new.flows[priority] = _Flow(new, priority, owner.flows_virtual)
            to.entries.extendleft(reversed(flow.entries))
            rows = sum(entry.stop - entry.start for entry in flow.entries)
            moved += [entry.ticket for entry in flow.entries]
            flow.entries.clear()
            owner.ready.pop((source, priority), None)
            old.rows_queued -= rows
            new.rows_queued += rows
            self._flow_ready(owner, to)
        self._refresh(owner)
        return moved

    def rows_held(self, tenant: str, model: str) -> int:
        """Rows of the model that are queued or running."""
        held = self._model(tenant, model)
        return held.rows_queued + held.rows_running

    def statistics(self) -> SchedulerStatistics:
        return SchedulerStatistics(
            parallel=self.parallel,
            running=len(self._running),
            virtual_time=self._virtual,
            tenants={name: _tenant_share(tenant) for name, tenant in self._tenants.items()},
        )

    # Inside

    def _tenant(self, tenant: str) -> _Tenant:
        try:
            return self._tenants[tenant]
        except KeyError:
            raise NotFound(f"tenant {tenant} is not scheduled here; add it first") from None

    def _model(self, tenant: str, model: str) -> _Model:
        try:
            return self._tenant(tenant).models[model]
        except KeyError:
            raise NotFound(f"model {tenant}/{model} is not scheduled here; add it first") from None

    def _charge(self, tenant: _Tenant, seconds: float, rows: int = 0) -> None:
        tenant.cpu_seconds += seconds
        tenant.virtual += seconds / tenant.weight
        present = self._tenants.get(tenant.name) is tenant
        self._ledger.got(tenant.name if present else "", rows, seconds)

    def _allowed(self, tenant: _Tenant) -> int:
        """Rows that the tenant's quota lets it start now."""
        return self.batch_rows_max if tenant.bucket is None else tenant.bucket.allowed(self._ledger.now)

    def _throttle(self, tenant: _Tenant) -> bool:
        """Whether a tenant that could run has to wait for its quota."""
        if tenant.bucket is None:
            return False
        now = self._ledger.now
        queued = sum(flow.model.rows_queued for flow in tenant.ready.values())
        until = tenant.bucket.ready_at(queued, now)
        if until <= now:
            return False
        self._throttled[tenant.name] = until
        return True

    def _hold(self, tenant: _Tenant) -> Hold:
        if tenant.running:
            return "worker" if tenant.ready else "served"
        if tenant.name in self._throttled:
            return "quota"
        if tenant.name in self._ready:
            return "turn"
        return "blocked" if any(model.rows_queued for model in tenant.models.values()) else "idle"

    def _take(self, flow: _Flow, rows_max: int) -> tuple[tuple[Part, ...], int]:
        """Parts for one batch of about a quantum: small tickets together, a large one split."""
        model, entries = flow.model, flow.entries
        if entries[0].whole:
            entry = entries.popleft()
            return (Part(entry.ticket, entry.start, entry.stop),), entry.stop - entry.start
        wanted = model.cost.rows_within(self.quantum_seconds, model.call_seconds_max, self.batch_rows_max)
        wanted = min(wanted, max(1, rows_max))
        parts: list[Part] = []
        rows = 0
        while rows < wanted and entries and not entries[0].whole:
            entry = entries[0]
            stop = min(entry.stop, entry.start + wanted - rows)
            parts.append(Part(entry.ticket, entry.start, stop))
            rows += stop - entry.start
            if stop == entry.stop:
                entries.popleft()
            else:
                entry.start = stop
        return tuple(parts), rows

    def _put_back(self, flow: _Flow, dispatch: Dispatch, rows_done: int) -> None:
        skip = rows_done
        back: list[_Entry] = []
        for part in dispatch.parts:
            size = part.stop - part.start
            if skip < size:
                back.append(_Entry(part.ticket, part.start + skip, part.stop, dispatch.whole))
            skip = max(0, skip - size)
        flow.entries.extendleft(reversed(back))
        flow.model.rows_queued += sum(entry.stop - entry.start for entry in back)

    def _flow_ready(self, tenant: _Tenant, flow: _Flow) -> None:
        key = flow.model.name, flow.priority
        if flow.entries and not flow.model.blocked and key not in tenant.ready:
            flow.virtual = max(flow.virtual, tenant.flows_virtual)
            tenant.ready[key] = flow

    def _refresh(self, tenant: _Tenant, *, returns: bool = True) -> None:
        """Put the tenant among the ready ones or take it out; `returns`: it was idle or blocked until now."""
        if self._tenants.get(tenant.name) is not tenant:
            return
        was_throttled = self._throttled.pop(tenant.name, None) is not None
        able = not tenant.blocked and not tenant.running and bool(tenant.ready)
        if not able or self._throttle(tenant):
            self._ready.pop(tenant.name, None)
        elif tenant.name not in self._ready:
            self._enter(tenant, returns or was_throttled)
        self._ledger.hold(tenant.name, self._hold(tenant))

    def _enter(self, tenant: _Tenant, returns: bool) -> None:
        credit = 0.0 if returns else CREDIT_BATCHES_MAX * self._costliest_seconds / tenant.weight
        behind = self._virtual - credit - tenant.virtual
        if behind > 0:
            tenant.forgiven_seconds += behind * tenant.weight
            tenant.virtual += behind
            if not returns:
                self._ledger.forgave(tenant.name, behind * tenant.weight)
        self._ready[tenant.name] = tenant


def _seconds_per_row(model: _Model) -> float:
    """As the model's rows cost so far, in the batches they came in; before the first, as is estimated."""
    return model.cpu_seconds / model.rows_done if model.rows_done else model.cost.seconds(1)


def _checked_weight(weight: float) -> float:
    if not limits.WEIGHT_MIN <= weight <= limits.WEIGHT_MAX:
        raise ValueError(f"weight {weight} is outside {limits.WEIGHT_MIN} to {limits.WEIGHT_MAX}")
    return weight


def _empty(model: _Model) -> list[Hashable]:
    tickets: dict[Hashable, None] = {}
    for flow in model.flows.values():
        tickets.update(dict.fromkeys(entry.ticket for entry in flow.entries))
        flow.entries.clear()
    model.rows_queued = 0
    return list(tickets)


def _tenant_share(tenant: _Tenant) -> TenantShare:
    return TenantShare(
        weight=tenant.weight,
        virtual_time=tenant.virtual,
        cpu_seconds=tenant.cpu_seconds,
        forgiven_seconds=tenant.forgiven_seconds,
        calls=tenant.calls,
        running=tenant.running > 0,
        blocked=tenant.blocked,
        models={name: _model_share(model) for name, model in tenant.models.items()},
    )


def _model_share(model: _Model) -> ModelShare:
    return ModelShare(
        weight=model.weight,
        rows_queued=model.rows_queued,
        rows_running=model.rows_running,
        rows_done=model.rows_done,
        calls=model.calls,
        cpu_seconds=model.cpu_seconds,
        seconds_per_call=model.cost.seconds_per_call,
        seconds_per_row=model.cost.seconds_per_row,
        blocked=model.blocked,
    )
