"""This node's part in the cluster: membership, lease, reports, and the planning while it leads.

The catalog comes through Raft on a thread of its own (`catalog_raft`, `catalog_machine`); everything here is on the
event loop. What is decided is decided by pure functions (`ownership`, `rollout`, `lease`, `report`). Whether this node
may own something now is asked of the clock each time: a process that was stopped and wakes finds its lease over before
it has done anything.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from node.kernel import limits
from node.kernel.clock import Clock
from node.kernel.errors import (
    BoundExceeded,
    CatalogCorrupt,
    ClusterUnavailable,
    HeadraceError,
    PeerRefused,
    PeerUnavailable,
)
from node.kernel.supervise import Supervisor
from replication.catalog import Catalog, Node, problem
from replication.catalog_machine import CatalogMachine
from replication.catalog_raft import CatalogRaft
from replication.catalog_tables import table_rollout
from replication.commands import (
    Command,
    JoinNode,
    LeaveNode,
    RenewLease,
    SetSettings,
    Settings,
    TakeOver,
    decode_command,
    encode_command,
)
from replication.incarnation import begin_process
from replication.lease import Lease
from replication.ownership import NodeReport, PlanSettings, Progress, Reports, living, plan, takeover_wait_ms
from replication.raft_journal import disk_errors
from replication.raft_types import RaftSettings, RaftStatistics
from replication.report import REPORT_QUIET_S, PeerReport, ReportBook, decode_report, encode_report
from replication.rollout import rollout

log = structlog.get_logger(__name__)

_PLAN_S = 0.2
_RETRY_S = 1.0
_LEAVE_S = 0.1
_REFUSALS = (ClusterUnavailable, PeerRefused, BoundExceeded)


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """`agreed` is proposed once, by the first node, for the whole cluster; what the catalog says counts."""

    name: str
    raft: RaftSettings
    peer_address: str
    rack: str
    weight: float
    folder: Path
    """Beside the node's data: what is lost with it makes the node another incarnation."""
    agreed: Settings = field(default_factory=Settings)
    plan: PlanSettings = field(default_factory=PlanSettings)


@dataclass(frozen=True, slots=True)
class ClusterStatistics:
    name: str
    incarnation: int
    leader: str | None
    leads: bool
    ready: bool
    lease_left_ms: float
    leases_lost: int
    revision: int
    heard_ms_ago: Mapping[str, float]
    """At the leader: node -> how long ago it was heard of."""
    renewals: int
    reports_sent: int
    reports_failed: int
    reports_taken: int
    reports_dropped: int
    plans: int
    plan_commands: int
    plan_refused: int
    raft: RaftStatistics


class Cluster:
    """`send_report` sends a body to a peer's `peer_address` and raises PeerUnavailable or PeerRefused.

    `progress` says how far each partition on this node is, `verified` the offset of each one's verified snapshot.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        clock: Clock,
        supervisor: Supervisor,
        send_report: Callable[[str, bytes], Awaitable[None]],
        progress: Callable[[], Mapping[int, Progress]],
        verified: Callable[[], Mapping[int, int]],
    ) -> None:
        self.settings = settings
        self.name = settings.name
        self.incarnation = 0
        """0 until this node has joined."""
        self._clock = clock
        self._origin_ms = clock.now_ms() - clock.monotonic() * 1000
        self._supervisor = supervisor
        self._send_report = send_report
        self._progress = progress
        self._verified = verified
        self.observed: Mapping[str, bytes] = {}
        """What this node has seen of staged versions; to be set anew whenever that changes."""
        self.tries_models = False
        """Whether this node opens nothing yet that it is given: partitions move onto it only once it does."""
        self._machine = CatalogMachine(clock)
        self._raft = CatalogRaft(settings.raft, self._machine, self._raft_changed, clock)
        self._lease: Lease | None = None
        self._book = ReportBook(settings.plan)
        self._term_led = -1
        self._told: tuple[object, ...] = ()
        self._subscribers: list[Callable[[], None]] = []
        self._changed, self._renew_now, self._report_now, self._plan_now = (asyncio.Event() for _ in range(4))
        self._reported: tuple[object, ...] = ()
        self._reported_s = 0.0
        self._planned: tuple[object, ...] = ()
        self._had_lease = False
        self._leases_lost = self._renewals = self._reports_sent = self._reports_failed = 0
        self._plans = self._plan_commands = self._plan_refused = 0
        self._tasks: list[asyncio.Task[Any]] = []

    # --- life

    async def start(self) -> None:
        """Take part; there may be no leader yet, see `ready`. Raises ConfigError, CatalogCorrupt, StoreUnavailable."""
        with disk_errors(self.settings.folder, "made"):
            self.settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self._raft.start()
        work: dict[str, Coroutine[Any, Any, None]] = {
            "raft": self._raft.watch(),
            "membership": self._belong(),
            "lease": self._keep_lease(),
            "reports": self._report(),
            "plan": self._lead(),
        }
        self._tasks = [self._supervisor.start(f"cluster {what}", coroutine) for what, coroutine in work.items()]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._raft.stop()

    # --- what is known

    @property
    def catalog(self) -> Catalog:
        """The newest that this node has applied."""
        return self._machine.agreed.catalog

    @property
    def voters(self) -> Mapping[str, str]:
        """Who counts for a majority, name -> Raft address: also who was let join and has not come yet."""
        return self._raft.members

    @property
    def leader(self) -> str | None:
        return self._raft.leader

    @property
    def leads(self) -> bool:
        """Whether this node takes itself for the leader and has applied all that was agreed before it became so."""
        status = self._raft.status
        return status.is_leader and status.ready

    @property
    def ready(self) -> bool:
        """Whether there is a leader, its catalog is here, and this node is a member."""
        return self._raft.ready and self._is_member()

    def subscribe(self, changed: Callable[[], None]) -> None:
        """`changed` is called on the loop after the catalog, the leader or readiness changed; it must not raise."""
        self._subscribers.append(changed)

    async def agreed(self, wait_seconds_max: float = 5.0) -> Catalog:
        """The catalog with all that was agreed anywhere before this call. Raises ClusterUnavailable, BoundExceeded."""
        await self._raft.read_barrier(wait_seconds_max)
        return self.catalog

    def statistics(self) -> ClusterStatistics:
        now_s = self._clock.monotonic()
        return ClusterStatistics(
            name=self.name,
            incarnation=self.incarnation,
            leader=self.leader,
            leads=self.leads,
            ready=self.ready,
            lease_left_ms=self.lease_left_ms(),
            leases_lost=self._leases_lost,
            revision=self.catalog.revision,
            heard_ms_ago={
                name: self._origin_ms + now_s * 1000 - node.heard_ms for name, node in self.reports().nodes.items()
            },
            renewals=self._renewals,
            reports_sent=self._reports_sent,
            reports_failed=self._reports_failed,
            reports_taken=self._book.taken,
            reports_dropped=self._book.dropped,
            plans=self._plans,
            plan_commands=self._plan_commands,
            plan_refused=self._plan_refused,
            raft=self._raft.statistics(),
        )

    def _raft_changed(self) -> None:
        status = self._raft.status
        self._begin_term()
        if self._lease is not None:
            self._lease.came_back(self.catalog.leases.get(self.name, 0))
            if not self._had_lease and self.has_lease():
                self._had_lease = True
                self._report_now.set()
        endings = self._machine.agreed.endings
        told = (self.catalog.revision, status.leader, status.ready, self.leads, self.ready, endings)
        if told == self._told:
            return
        if status.leader is not None and told[1:5] != self._told[1:5]:
            self._renew_now.set()
            self._report_now.set()
        self._told = told
        self._changed.set()
        self._plan_now.set()
        for changed in self._subscribers:
            changed()

    def _begin_term(self) -> None:
        """Forget what was told to an earlier leader; to be called before a report is taken, which may come before the
        loop has heard that this node leads."""
        term = self._raft.status.term
        if self.leads and term != self._term_led:
            self._term_led = term
            self._book.begin(self._clock.monotonic())

    # --- commands

    async def propose(self, command: Command, wait_seconds_max: float = 5.0) -> None:
        """Return once the command is applied here; propose it again as often as you like.

        Raises PeerRefused with the catalog's reason, BoundExceeded, and ClusterUnavailable when the outcome is unknown.
        """
        reason = problem(self.catalog, command)
        if not reason:
            reason = await self._raft.propose(_checked(command), wait_seconds_max)
        if reason:
            raise PeerRefused(reason)

    # --- membership

    async def join(self, name: str, raft_address: str) -> None:
        """Let a node take part in Raft; it joins the catalog by itself once it runs.

        Raises ConfigError for a name or address that is taken or may not be, ClusterUnavailable.
        """
        await self._raft.join(name, raft_address)

    async def leave(self, name: str, wait_seconds_max: float = 10.0) -> None:
        """Remove a node that is drained or dead: out of Raft first, so that it can't join the catalog again.

        Raises PeerRefused when it still owns partitions, ConfigError for this node itself, ClusterUnavailable.
        """
        catalog = await self.agreed()
        reason = problem(catalog, LeaveNode(revision=catalog.revision, name=name))
        if reason:
            raise PeerRefused(reason)
        deadline_s = self._clock.monotonic() + wait_seconds_max
        await self._raft.leave(name, wait_seconds_max)
        while True:
            try:
                return await self.propose(LeaveNode(revision=self.catalog.revision, name=name))
            except PeerRefused:  # the leader has just given it a partition: it is silent now and loses that again
                if self._clock.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(_LEAVE_S)

    def _is_member(self) -> bool:
        member = self.catalog.nodes.get(self.name)
        return member is not None and self.incarnation > 0 and self._describes(member)

    def _describes(self, member: Node) -> bool:
        settings = self.settings
        wanted = (settings.raft.address, settings.peer_address, settings.rack, settings.weight, self.incarnation)
        return (member.raft_address, member.http_address, member.rack, member.weight, member.incarnation) == wanted

    async def _belong(self) -> None:
        """Join, and join again when the cluster has let this node back in after it was removed."""
        while True:
            if self._raft.ready and not self._is_member():
                try:
                    await self._join()
                    log.info("joined the cluster", incarnation=self.incarnation)
                except _REFUSALS as error:
                    log.warning("this node has not joined the cluster yet and tries again", reason=str(error))
                    await _pause(self._changed, _RETRY_S)
                self._renew_now.set()
            else:
                await _pause(self._changed, None)

    async def _join(self) -> None:
        settings, catalog = self.settings, await self.agreed()
        if self._lease is None:
            path = settings.folder / "incarnation"
            self.incarnation, first = begin_process(path, self.name, catalog, self._clock.now_ms())
            self._lease = Lease(first)
        member = catalog.nodes.get(self.name)
        if member is not None and member.incarnation > self.incarnation:
            raise HeadraceError(
                f"another process has joined the cluster as {self.name} while this one ran; stop it, or give it a name"
            )
        if catalog.settings_revision == 0:
            founded = settings.agreed if not catalog.nodes else catalog.settings
            await self.propose(SetSettings(revision=catalog.revision, settings=founded))
        await self.propose(
            JoinNode(
                revision=self.catalog.revision,
                name=self.name,
                raft_address=settings.raft.address,
                http_address=settings.peer_address,
                rack=settings.rack,
                weight=settings.weight,
                incarnation=self.incarnation,
                at_ms=self._clock.now_ms(),
            )
        )

    # --- the lease

    def may_own(self, partition: int, epoch: int) -> bool:
        """Whether this node owns the partition at this epoch and its lease holds now; to be asked before each step that
        others can see.
        """
        catalog = self.catalog
        if partition >= len(catalog.partitions):
            return False
        held = catalog.partitions[partition]
        return held.owner == self.name and held.epoch == epoch and self._lease_left_ms(catalog) > 0

    def has_lease(self) -> bool:
        return self.lease_left_ms() > 0

    def lease_left_ms(self) -> float:
        return self._lease_left_ms(self.catalog)

    def _lease_left_ms(self, catalog: Catalog) -> float:
        if self._lease is None or self._raft.closed:
            return 0.0
        number = catalog.leases.get(self.name)
        return self._lease.left_ms(number, self._clock.monotonic(), catalog.settings.lease_ms)

    async def _keep_lease(self) -> None:
        """Propose a renewal three times in a lease, and at once when there is a new leader."""
        while True:
            at_once = await _pause(self._renew_now, self.catalog.settings.lease_ms / 3000)
            has_lease = self.has_lease()
            if self._had_lease and not has_lease:
                self._leases_lost += 1
                log.warning("this node has lost its lease and owns nothing until a quorum answers")
            self._had_lease = has_lease
            if self._lease is None or not self.ready:
                continue
            number = self._lease.renew(self._clock.monotonic())
            command = RenewLease(
                revision=self.catalog.revision, name=self.name, incarnation=self.incarnation, number=number
            )
            self._renewals += 1
            with contextlib.suppress(ClusterUnavailable, BoundExceeded):
                self._raft.offer(encode_command(command), at_once)

    # --- what the leader is told

    def report_now(self) -> None:
        """To be called when this node has opened, released or caught up with a partition, or has tried its models: a
        move may wait for it."""
        self._report_now.set()

    def take_report(self, body: bytes) -> None:
        """What another node said. Raises PeerRefused when this node does not lead, or can't read it."""
        report = decode_report(body)
        if not self.leads:
            raise PeerRefused(f"node {self.name} does not lead the cluster; report to {self.leader or 'nobody yet'}")
        self._begin_term()
        if self._book.take(report, self._machine.agreed, self._clock.monotonic()):
            self._plan_now.set()

    def reports(self) -> Reports:
        """At the leader: what it has heard since it leads."""
        return self._book.reports(self._machine.agreed, self._origin_ms)

    def verified(self) -> Mapping[str, Mapping[int, int]]:
        """At the leader: node -> partition -> offset of its newest verified snapshot, of nodes that are there."""
        return self._book.verified(self._living(), self._machine.agreed)

    def observations(self) -> Sequence[Mapping[str, bytes]]:
        """At the leader: what each node that is there has seen of staged versions."""
        return self._book.observed(self._living(), self._machine.agreed)

    def _living(self) -> Collection[str]:
        agreed = self._machine.agreed
        reports = self._book.reports(agreed, self._origin_ms)
        return living(agreed.catalog, reports, self.now_ms(), self.settings.plan)

    async def _report(self) -> None:
        while True:
            await _pause(self._report_now, self.catalog.settings.lease_ms / 4000)
            leader = self.catalog.nodes.get(self.leader or "")
            # A node without a lease is as good as dead: the leader must not count it among the living.
            if leader is None or self._lease is None or not self.has_lease():
                continue
            news = (
                leader.name,
                self._raft.status.term,
                dict(self._progress()),
                dict(self._verified()),
                dict(self.observed),
                self.tries_models,
            )
            now_s = self._clock.monotonic()
            if news == self._reported and now_s < self._reported_s + REPORT_QUIET_S / 2:
                continue
            report = PeerReport(self.name, self.incarnation, self._lease.next_number(), *news[2:])
            if await self._tell(leader, report):
                self._reported, self._reported_s = news, now_s

    async def _tell(self, leader: Node, report: PeerReport) -> bool:
        try:
            if leader.name == self.name:
                self.take_report(encode_report(report))
            else:
                async with asyncio.timeout(limits.CLUSTER_REPORT_MS_MAX / 1000):
                    await self._send_report(leader.http_address, encode_report(report))
        except (PeerUnavailable, PeerRefused, TimeoutError) as error:
            self._reports_failed += 1
            log.debug("the leader could not be told of this node's partitions", leader=leader.name, reason=str(error))
            return False
        self._reports_sent += 1
        return True

    # --- planning, at the leader

    def now_ms(self) -> int:
        """What reports and moves are dated in: as even as the monotonic clock, and near other nodes' by its origin."""
        return int(self._origin_ms + self._clock.monotonic() * 1000)

    async def _lead(self) -> None:
        while True:
            await _pause(self._plan_now, self._next_look_s() if self.leads else None)
            if self.leads:
                await self._propose_all(self._plan())

    def _next_look_s(self) -> float:
        """Until a node's lease will surely have run out, if it is not heard of: looking later delays its takeover."""
        wait_ms = takeover_wait_ms(self.catalog.settings.lease_ms, self.settings.plan)
        now_ms, heard = self.now_ms(), self.reports().nodes
        left_ms = [heard[name].heard_ms + wait_ms - now_ms for name in self.catalog.nodes if name in heard]
        return min([_PLAN_S, *((left + 1) / 1000 for left in left_ms if left >= 0)])

    def _plan(self) -> Sequence[Command]:
        """What is to be done next; nothing at next to no cost when nothing changed since that was the answer."""
        agreed, settings, now_ms = self._machine.agreed, self.settings.plan, self.now_ms()
        catalog, reports = agreed.catalog, self._book.reports(agreed, self._origin_ms)
        alive = living(catalog, reports, now_ms, settings)
        state = (self._term_led, catalog.revision, self._book.changes, alive, self._silences(reports, now_ms))
        if state == self._planned and not any(held.move for held in catalog.partitions):
            return []
        self._plans += 1
        commands = next_commands(catalog, reports, alive, now_ms, settings)
        self._planned = () if commands else state
        return commands

    def _silences(self, reports: Reports, now_ms: int) -> tuple[tuple[str, bool, bool], ...]:
        """Node, whether it has reported lately, and whether it is not silent for so long that it is replaced."""
        settings = self.settings.plan
        wait_ms = takeover_wait_ms(self.catalog.settings.lease_ms, settings)
        replace_ms = max(wait_ms, settings.standby_replace_ms)
        found = []
        for name in self.catalog.nodes:
            node = reports.nodes.get(name, NodeReport(reports.since_ms, 0))
            reported = node.reported_ms is not None and now_ms - node.reported_ms < wait_ms
            found.append((name, reported, now_ms - max(node.heard_ms, reports.since_ms) < replace_ms))
        return tuple(found)

    async def _propose_all(self, commands: Sequence[Command]) -> None:
        outcomes = await asyncio.gather(
            *(self.propose(command, _RETRY_S) for command in commands), return_exceptions=True
        )
        self._plan_commands += len(commands)
        for command, outcome in zip(commands, outcomes, strict=True):
            if isinstance(outcome, _REFUSALS):
                self._plan_refused += 1
                if isinstance(command, TakeOver) and self._knew_too_little(command):
                    self._plan_now.set()
                log.info("what the leader planned was not agreed to", command=repr(command), reason=str(outcome))
            elif outcome is not None:
                raise outcome

    def _knew_too_little(self, command: TakeOver) -> bool:
        """A renewal that was under way when its node ended came first; it is known by now, and no other can come."""
        owner = self.catalog.partitions[command.partition].owner
        return bool(owner) and self.catalog.leases.get(owner, 0) != command.lease


def next_commands(
    catalog: Catalog, reports: Reports, alive: frozenset[str], now_ms: int, settings: PlanSettings
) -> Sequence[Command]:
    """What the leader proposes next, CLUSTER_PLAN_COMMANDS_MAX at most: of partitions first, since many versions may
    become ready with the death of the node that they waited for, and its partitions stand still until another has them.
    """
    tables = table_rollout(catalog, tuple(sorted(alive & catalog.nodes.keys())))
    commands = [*plan(catalog, reports, now_ms, settings), *rollout(catalog, alive), *tables]
    return commands[: limits.CLUSTER_PLAN_COMMANDS_MAX]


def _checked(command: Command) -> bytes:
    """Its bytes, which every node can decode. Raises BoundExceeded."""
    encoded = encode_command(command)
    try:
        decode_command(encoded)
    except CatalogCorrupt as failure:
        raise BoundExceeded(f"a field of a command is over its bound: {failure}") from None
    return encoded


async def _pause(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait for the event, at most so long, and reset it; whether it was there."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    happened = event.is_set()
    event.clear()
    return happened
