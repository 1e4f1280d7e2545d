"""(P) Who should own and stand by for which partition: what the Raft leader proposes next, and the lease.

The lease. An owner may own until `lease_ms` of its own clock after the moment it *proposed* the latest `RenewLease`
that has since come back to it through the Raft log. By then it has applied all that was agreed before, so a renewed
lease also means that it knows of every change of owner up to then. The leader gives a silent node's partitions away
`takeover_wait_ms` after it applied the node's last renewal (as leader or before: it was proposed earlier still) or got
its last report; of a node that it has never heard of, after it became leader. `TakeOver` names that renewal and is
refused if a newer one comes before it in the log. So an owner that is cut off, or was paused and wakes, has stopped
before another starts, as long as no clock runs faster or slower than real time by more than `clock_drift`. Fencing by
Kafka does not depend on it.

A process that has ended owns nothing, and its lease is not waited for. That is known of another node when its side has
ended the connection and its host says that nobody listens on its Raft port: a kernel closes the sockets of a process
that is killed once its last thread has stopped, and a node gives its lease up before it closes the port itself.
It counts of that process only, no more once the node's next one has renewed the lease. A firewall that answers for a
living node would make it wrong: commits would still be fenced, and for the rest of a lease both might answer reads.

The plan makes one step for each partition at most, the most urgent first: a dead owner's partitions go at once to the
standby that is furthest; moves under way end or are cancelled; draining and balancing prepare a standby, wait until it
has caught up and its node has tried its models, and only then move. It keeps no memory: given the same catalog and
reports it says the same again.

A restart copies nothing: a silent node's partitions go to their standbys, but until it has been silent for
`standby_replace_ms` it keeps its standbys and nobody balances. It is the standby of what it owned, so what it gets back
later it has already. To restart a node without even a takeover: drain it, restart it once it owns nothing,
undrain it. A draining node gives up what it owns first and, while it runs, then its standbys: it ends with nothing.

A move in the owner's time: it sees the move, ends and commits its cycle, closes, and reports `released_revision`; the
leader (or the owner itself) proposes `CompleteMove`; the new owner sees that it owns, fences, folds the tail, goes on.
Only between the close and the fold's end does the partition stand still: two messages and one agreed command.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from node.kernel.limits import STANDBYS_MAX
from replication.catalog import Assignment, Catalog
from replication.commands import CancelMove, CompleteMove, PartitionCommand, SetStandbys, StartMove, TakeOver
from replication.placement import Member, target_owners, target_standbys


@dataclass(frozen=True, slots=True)
class Progress:
    """What a node says of one partition it holds on disk.

    `offset` is where the changelog goes on after what it has folded, and the lag is against the changelog's end; for an
    owner that has not opened the partition yet, the lag is what it has still to fold.
    """

    offset: int
    frames_behind: int
    ms_behind: int
    serving: bool = False
    """The owner has it open."""
    released_revision: int = 0
    """The owner has closed it for the move that it saw in the assignment of this revision."""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """Only what the incarnation in the catalog says counts: whoever takes reports drops those of any other."""

    heard_ms: int
    """When the leader last got its report or applied its `RenewLease`, whichever is later, by the leader's clock.

    It counts from before it led, too; but it must not be earlier than when the renewal that the catalog names came to
    this process, by the log or with a dump.
    """
    incarnation: int
    partitions: Mapping[int, Progress] = field(default_factory=dict)
    reported_ms: int | None = None
    """When the leader got the report that `partitions` are from; None: it has none yet.

    They are believed no longer than a silent node is taken for alive: a node that has crashed, come back and renewed
    its lease is heard of before it says how little of its partitions it still has.
    """
    tries_models: bool = False
    """It has just started and opens nothing that it is given until it has tried its models."""
    ended: bool = False
    """The process that has its lease has ended, so it holds no longer."""


@dataclass(frozen=True, slots=True)
class Reports:
    """What this leader has heard; it became leader at `since_ms` of its clock. A node it never heard of is left out."""

    since_ms: int
    nodes: Mapping[str, NodeReport]


@dataclass(frozen=True, slots=True)
class PlanSettings:
    clock_drift: float = 0.01
    """Every clock runs within this part of real time; quartz is a hundred times better, virtual machines are not."""
    margin_ms: int = 100
    """Beyond what is safe: a renewal that is a little late must not cost a node its partitions."""
    leader_wait_ms: int = 300
    """Nobody is taken for silent so soon after a leader began: while there was none, no lease could be renewed. So long
    it also waits at most until all have said how far they are, before it gives away what an ended process owned."""
    standby_replace_ms: int = 60_000
    """A silent standby is replaced after this: a restart must not copy its partitions elsewhere."""
    caught_up_frames: int = 20
    caught_up_ms: int = 2_000
    move_ms_max: int = 30_000
    """A move that its target lags behind is given up after this."""


def may_own(now_ms: float, last_quorum_ms: float | None, lease_ms: int) -> bool:
    """Whether an owner may go on; to be asked before every step that others can see.

    `last_quorum_ms` is this node's monotonic clock when it proposed its latest `RenewLease` that has come back to it;
    None: none has since the process started.
    """
    return last_quorum_ms is not None and now_ms - last_quorum_ms < lease_ms


def takeover_wait_ms(lease_ms: int, settings: PlanSettings) -> float:
    """How long a node must have been silent, by the leader's clock, before its lease is surely over by its own."""
    return lease_ms * (1 + settings.clock_drift) / (1 - settings.clock_drift) + settings.margin_ms


def living(catalog: Catalog, reports: Reports, now_ms: int, settings: PlanSettings) -> frozenset[str]:
    """The members whose process is not known to have ended or to be silent for a lease.

    Of a leader that has just begun none is silent, and none has ended until all others have said how far they are.
    """
    there = frozenset(name for name in catalog.nodes if not _has_ended(reports, name))
    if now_ms - reports.since_ms >= settings.leader_wait_ms:
        wait_ms = takeover_wait_ms(catalog.settings.lease_ms, settings)
        return frozenset(name for name in there if now_ms - _heard_ms(reports, name) < wait_ms)
    told = {name for name, report in reports.nodes.items() if report.reported_ms is not None}
    return there if there <= told else frozenset(catalog.nodes)


def _has_ended(reports: Reports, name: str) -> bool:
    return name in reports.nodes and reports.nodes[name].ended


def _heard_ms(reports: Reports, name: str) -> int:
    """Of whichever incarnation: the present one may have renewed its lease and not yet reported."""
    report = reports.nodes.get(name)
    return reports.since_ms if report is None else report.heard_ms


def caught_up(progress: Progress | None, settings: PlanSettings) -> bool:
    return (
        progress is not None
        and progress.frames_behind <= settings.caught_up_frames
        and progress.ms_behind <= settings.caught_up_ms
    )


def plan(catalog: Catalog, reports: Reports, now_ms: int, settings: PlanSettings) -> list[PartitionCommand]:
    """The leader's next commands, at most one a partition, all valid for `catalog` together.

    Takeovers come first, so whoever can propose only so many takes the first ones, and plans again once these are
    applied. `now_ms` is of the clock that the reports are dated by. For 4096 partitions on nine nodes one takes 10 ms
    when all is in order and up to 50 ms while it is not.
    """
    planner = _Planner(catalog, reports, now_ms, settings)
    planner.take_over()
    planner.attend_moves()
    targets = planner.target_owners()
    planner.move(targets, urgent=True)
    planner.place_standbys(targets)
    planner.move(targets, urgent=False)
    return list(planner.commands.values())


class _Planner:
    """One plan in the making; lives for one call."""

    def __init__(self, catalog: Catalog, reports: Reports, now_ms: int, settings: PlanSettings) -> None:
        self.catalog = catalog
        self.reports = reports
        self.now_ms = now_ms
        self.settings = settings
        self.commands: dict[int, PartitionCommand] = {}
        self.heard = {name: report for name, report in reports.nodes.items() if self._is_member(name, report)}
        self.silent_ms = {name: now_ms - _heard_ms(reports, name) for name in catalog.nodes}
        self.dead = catalog.nodes.keys() - living(catalog, reports, now_ms, settings)
        self.fresh = {name for name in self.heard if name not in self.dead}
        wait_ms = takeover_wait_ms(catalog.settings.lease_ms, settings)
        self.told = {
            name
            for name in self.fresh
            if (at_ms := self.heard[name].reported_ms) is not None and now_ms - at_ms < wait_ms
        }
        self.moving = sum(held.move is not None for held in catalog.partitions)
        replace_ms = max(settings.standby_replace_ms, wait_ms)
        self.gone = {name for name, silent_ms in self.silent_ms.items() if silent_ms >= replace_ms}
        emptying = any(held.owner and self.draining(held.owner) for held in catalog.partitions)
        self.balance = self.dead <= self.gone and not emptying
        """A node that may come back any moment finds its copies where they were, and nothing rearranged."""

    def _is_member(self, name: str, report: NodeReport) -> bool:
        """A report of an earlier incarnation is of a disk that is gone."""
        node = self.catalog.nodes.get(name)
        return node is not None and node.incarnation == report.incarnation

    def draining(self, name: str) -> bool:
        return name in self.catalog.nodes and self.catalog.nodes[name].draining

    def progress(self, partition: int, name: str) -> Progress | None:
        """Of a node that said so lately; None for one that did not, or has nothing of the partition."""
        return self.heard[name].partitions.get(partition) if name in self.told else None

    def complete(self, partition: int, name: str) -> bool:
        return caught_up(self.progress(partition, name), self.settings)

    def ready(self, partition: int, name: str) -> bool:
        """Whether the partition would go on there at once."""
        return self.complete(partition, name) and not self.heard[name].tries_models

    def undecided(self) -> Iterator[tuple[int, Assignment]]:
        for partition, held in enumerate(self.catalog.partitions):
            if partition not in self.commands:
                yield partition, held

    # dead owners

    def take_over(self) -> None:
        """What a dead node owned goes on at once; what nobody owned yet is dealt out evenly."""
        owned = Counter(held.owner for held in self.catalog.partitions)
        for partition, held in enumerate(self.catalog.partitions):
            if held.owner and held.owner in self.catalog.nodes and held.owner not in self.dead:
                continue
            heir = self._heir(partition, held, owned)
            if heir is not None:
                owned[heir] += 1
                why = self._why_taken(held.owner)
                self.commands[partition] = TakeOver(
                    revision=self.catalog.revision,
                    partition=partition,
                    epoch=held.epoch,
                    to=heir,
                    lease=self.catalog.leases.get(held.owner, 0),
                    why=why,
                )

    def _why_taken(self, owner: str) -> str:
        if not owner:
            return "first owner"
        return f"{owner} has ended" if _has_ended(self.reports, owner) else f"{owner} is silent"

    def _heir(self, partition: int, held: Assignment, owned: Mapping[str, int]) -> str | None:
        """The furthest standby, of those that can go on at once; without one, whoever has most of the partition on
        disk, or else owns least."""

        def rank(name: str) -> tuple[bool, bool, int, bool, int, str]:
            progress = self.progress(partition, name)
            offset = progress.offset if progress is not None and held.owner else -1
            waits = not self.ready(partition, name)
            return (self.draining(name), waits, -offset, name not in held.standbys, owned[name], name)

        standbys = [name for name in held.standbys if name in self.fresh]
        return min(standbys or [name for name in self.fresh if name != held.owner], key=rank, default=None)

    # moves under way

    def attend_moves(self) -> None:
        for partition, held in self.undecided():
            move = held.move
            if move is None:
                continue
            owner = self.progress(partition, held.owner)
            why = self._move_is_lost(partition, held)
            if why:
                self.commands[partition] = CancelMove(
                    revision=self.catalog.revision, partition=partition, epoch=held.epoch, to=move.to, why=why
                )
            elif owner is not None and owner.released_revision == held.revision:
                self.commands[partition] = CompleteMove(
                    revision=self.catalog.revision, partition=partition, epoch=held.epoch, to=move.to
                )

    def _move_is_lost(self, partition: int, held: Assignment) -> str:
        assert held.move is not None
        to = held.move.to
        if to not in self.catalog.nodes or to in self.dead:
            return f"{to} is gone"
        if self.draining(to):
            return f"{to} is draining"
        late = self.now_ms - held.move.at_ms > self.settings.move_ms_max
        if not late or to not in self.fresh or self.ready(partition, to):
            return ""
        return f"{to} tries its models" if self.complete(partition, to) else f"{to} lags"

    # owners

    def target_owners(self) -> list[str]:
        members = [
            Member(node.name, node.rack, node.weight)
            for node in self.catalog.nodes.values()
            if not node.draining and node.name not in self.dead
        ]
        owners, standbys = [], []
        for partition, held in enumerate(self.catalog.partitions):
            command = self.commands.get(partition)
            cancelled = isinstance(command, CancelMove)
            taken = command.to if isinstance(command, TakeOver) else held.owner
            owners.append(held.move.to if held.move and not cancelled and taken == held.owner else taken)
            standbys.append(held.standbys)
        return target_owners(members, owners, standbys, self._ready_standbys, self.balance)

    def _ready_standbys(self, partition: int) -> list[str]:
        return [name for name in self.catalog.partitions[partition].standbys if self.ready(partition, name)]

    def move(self, targets: list[str], urgent: bool) -> None:
        """Start moves onto standbys that have caught up; urgent are those off draining nodes and owners that lag."""
        for partition, held in self.undecided():
            if self.moving >= self.catalog.settings.moves_max:
                return
            if held.move is not None or not held.owner:
                continue
            to, why = self._wanted_move(partition, held, targets[partition], urgent)
            if to and self.ready(partition, to) and not self.draining(to):
                self.moving += 1
                self.commands[partition] = StartMove(
                    revision=self.catalog.revision,
                    partition=partition,
                    epoch=held.epoch,
                    to=to,
                    why=why,
                    at_ms=max(0, self.now_ms),
                )

    def _wanted_move(self, partition: int, held: Assignment, target: str, urgent: bool) -> tuple[str, str]:
        """Where to, of the standbys, and why; ('', '') for nowhere."""
        if not urgent:
            return (target, "balance") if target != held.owner and target in held.standbys else ("", "")
        if self.draining(held.owner):
            return self._best_standby(partition, target), f"{held.owner} is draining"
        owner = self.progress(partition, held.owner)
        if owner is not None and not owner.serving and not caught_up(owner, self.settings):
            return self._best_standby(partition, target), f"{held.owner} lags"
        return "", ""

    def _best_standby(self, partition: int, target: str) -> str:
        ready = [name for name in self._ready_standbys(partition) if not self.draining(name)]
        if target in ready:
            return target
        return min(ready, key=lambda name: -self.heard[name].partitions[partition].offset, default="")

    # standbys

    def place_standbys(self, targets: list[str]) -> None:
        """A draining node keeps its standbys until it owns nothing: whoever drains it to restart it does so then."""
        owners = {held.owner for held in self.catalog.partitions}
        members = [
            Member(node.name, node.rack, node.weight)
            for node in self.catalog.nodes.values()
            if node.name not in self.gone and (not node.draining or node.name in owners or node.name in self.dead)
        ]
        takers = frozenset(name for name in self.fresh if not self.draining(name))
        wanted = target_standbys(
            members, takers, targets, self._candidates(targets), self.catalog.settings.standby_count, self.balance
        )
        building = self._building()
        for partition, held in self.undecided():
            if held.move is not None or not held.owner:
                continue
            if targets[partition] == held.owner and wanted[partition] == held.standbys:
                continue
            standbys = self._next_standbys(partition, held, targets[partition], wanted[partition])
            added = [name for name in standbys if name not in held.standbys]
            allowed = max(0, self.catalog.settings.builds_max - building)
            standbys = tuple(name for name in standbys if name not in added[allowed:])
            building += len(added[:allowed])
            if standbys != held.standbys:
                self.commands[partition] = SetStandbys(
                    revision=self.catalog.revision, partition=partition, epoch=held.epoch, standbys=standbys
                )

    def _candidates(self, targets: list[str]) -> list[tuple[str, ...]]:
        """Today's standbys as they will be after the change of owner that is wanted: roles are swapped."""
        return [
            held.standbys
            if target == held.owner or not held.owner
            else tuple(dict.fromkeys((*(name for name in held.standbys if name != target), held.owner)))
            for held, target in zip(self.catalog.partitions, targets, strict=True)
        ]

    def _building(self) -> int:
        return sum(
            name in self.fresh and not self.complete(partition, name)
            for partition, held in enumerate(self.catalog.partitions)
            for name in held.standbys
        )

    def _next_standbys(self, partition: int, held: Assignment, target: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """What is wanted, the target owner, and of the others those that are needed until enough have caught up.

        So a draining or silent node stays a standby where too few others are left: a copy is not given up for nothing.
        And while the owner itself has yet to open the partition none is dropped: it may be the only one with the state.
        """
        goal = [name for name in wanted if name != held.owner]
        if target != held.owner and target in self.catalog.nodes:
            goal.append(target)
        spare = [name for name in held.standbys if name not in goal]
        complete = sum(self.complete(partition, name) for name in goal)
        count = max(len(goal), self.catalog.settings.standby_count)
        needed = max(0, count - complete) if self._owner_has_it(partition, held.owner) else len(spare)
        spare.sort(key=lambda name: (not self.complete(partition, name), self.silent_ms[name]))
        keep = {*goal, *spare[:needed]}
        kept = tuple(name for name in held.standbys if name in keep)
        added = tuple(name for name in goal if name not in held.standbys)
        return (*kept, *added)[:STANDBYS_MAX]

    def _owner_has_it(self, partition: int, owner: str) -> bool:
        progress = self.progress(partition, owner)
        return progress is not None and (progress.serving or caught_up(progress, self.settings))
