"""The cluster in the words of the HTTP interface: the catalog, and what the leader has heard.

Only the leader gets the nodes' reports, so another node asks it and passes its answer on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from node.kernel.errors import HeadraceError
from node.serving.cluster import (
    ClusterAgreement,
    ClusterMember,
    ClusterModel,
    ClusterMove,
    ClusterPartition,
    ClusterRefusal,
    ClusterReplica,
    ClusterStatus,
    Role,
)
from replication.catalog import Assignment, Catalog
from replication.ownership import NodeReport, PlanSettings, Progress, Reports, caught_up, living

LEADER_PATH = "/peer/cluster"
LEADER_MS_MAX = 2_000


class Cluster(Protocol):
    """What the view needs of `replication.cluster.Cluster`."""

    @property
    def name(self) -> str: ...

    @property
    def catalog(self) -> Catalog: ...

    @property
    def voters(self) -> Mapping[str, str]: ...

    @property
    def leader(self) -> str | None: ...

    @property
    def leads(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    def has_lease(self) -> bool: ...

    def reports(self) -> Reports: ...

    def verified(self) -> Mapping[str, Mapping[int, int]]: ...

    def now_ms(self) -> int:
        """Of the clock that reports and moves are dated by, which a host's clock that is set does not change."""
        ...


class Peers(Protocol):
    """What the view needs of `replication.peers.PeerClient`."""

    async def ask(self, address: str, method: str, path: str, body: bytes = b"", wait_ms_max: int = ...) -> bytes: ...


class LocalClusterView:
    """`ClusterView` of one node. Whoever serves peers answers LEADER_PATH with `encoded`."""

    def __init__(self, cluster: Cluster, peers: Peers, plan: PlanSettings | None = None) -> None:
        self._cluster = cluster
        self._peers = peers
        self._plan = plan or PlanSettings()

    async def cluster(self) -> ClusterStatus:
        leader = self._cluster.catalog.nodes.get(self._cluster.leader or "")
        if self._cluster.leads or leader is None:
            return self.local()
        try:
            answer = await self._peers.ask(leader.http_address, "GET", LEADER_PATH, wait_ms_max=LEADER_MS_MAX)
            return msgspec.json.decode(answer, type=ClusterStatus)
        except (HeadraceError, msgspec.MsgspecError):
            return self.local()

    def unready(self) -> list[str]:
        if self._cluster.ready:
            return []
        return ["the cluster has no leader that this node can hear, or has not taken it in yet: see /v1/cluster"]

    def encoded(self) -> bytes:
        return msgspec.json.encode(self.local())

    def local(self) -> ClusterStatus:
        """What this node knows by itself."""
        cluster = self._cluster
        # After a pause it leads in its own eyes only, while others have moved on. Its lease tells, as partitions are
        # not given to others before that has ended.
        leads = cluster.leads and cluster.has_lease()
        heard = cluster.reports() if leads else None
        verified = cluster.verified() if leads else {}
        board = _Board(cluster.catalog, heard, verified, cluster.now_ms(), self._plan)
        status = board.status(cluster.name, cluster.leader, cluster.ready)
        known = cluster.catalog.nodes
        awaited = {name: at for name, at in sorted(cluster.voters.items()) if known and name not in known}
        return msgspec.structs.replace(status, awaited=awaited)


class _Board:
    """One answer in the making; `reports` is None on a node that can't be sure to lead."""

    def __init__(
        self,
        catalog: Catalog,
        reports: Reports | None,
        verified: Mapping[str, Mapping[int, int]],
        now_ms: int,
        plan: PlanSettings,
    ) -> None:
        self._catalog = catalog
        self._reports = reports
        self._verified = verified
        self._now_ms = now_ms
        self._plan = plan
        self._living = None if reports is None else living(catalog, reports, now_ms, plan)

    def status(self, node: str, leader: str | None, ready: bool) -> ClusterStatus:
        settings = self._catalog.settings
        return ClusterStatus(
            node=node,
            leader=leader,
            complete=self._reports is not None,
            ready=ready,
            revision=self._catalog.revision,
            now_ms=self._now_ms,
            settings=ClusterAgreement(
                standbys=settings.standby_count,
                lease_ms=settings.lease_ms,
                moves_max=settings.moves_max,
                builds_max=settings.builds_max,
                snapshot_holders_min=settings.snapshot_holders_min,
            ),
            members=self._members(leader),
            partitions=[self._partition(number, held) for number, held in enumerate(self._catalog.partitions)],
            models=list(self._models()),
            refusals=[
                ClusterRefusal(command=one.command, reason=one.reason, revision=one.revision)
                for one in self._catalog.refusals
            ],
        )

    # members

    def _members(self, leader: str | None) -> list[ClusterMember]:
        owns = Counter(held.owner for held in self._catalog.partitions)
        stands_by = Counter(name for held in self._catalog.partitions for name in held.standbys)
        return [
            ClusterMember(
                name=name,
                raft_address=node.raft_address,
                peer_address=node.http_address,
                rack=node.rack,
                weight=node.weight,
                incarnation=node.incarnation,
                draining=node.draining,
                leader=name == leader,
                lease=self._catalog.leases.get(name, 0),
                heard_ms=self._heard_ms(name),
                fresh=self._fresh(name),
                tries_models=self._tries_models(name),
                owns=owns[name],
                stands_by=stands_by[name],
            )
            for name, node in sorted(self._catalog.nodes.items())
        ]

    def _report(self, name: str) -> NodeReport | None:
        """Of its present incarnation; an earlier one's disk is gone."""
        report = self._reports.nodes.get(name) if self._reports is not None else None
        node = self._catalog.nodes.get(name)
        return report if report is not None and node is not None and report.incarnation == node.incarnation else None

    def _heard_ms(self, name: str) -> int | None:
        report = self._reports.nodes.get(name) if self._reports is not None else None
        return None if report is None else max(0, self._now_ms - report.heard_ms)

    def _fresh(self, name: str) -> bool | None:
        """As the plan sees it: a new leader gives every node as long as a lease to be heard."""
        return None if self._living is None else name in self._living

    # partitions

    def _progress(self, number: int, name: str) -> Progress | None:
        report = self._report(name)
        return None if report is None else report.partitions.get(number)

    def _partition(self, number: int, held: Assignment) -> ClusterPartition:
        others = self._catalog.nodes.keys() - {held.owner, *held.standbys}
        left = [name for name in others if self._progress(number, name) is not None]
        roles: list[tuple[str, Role]] = [(held.owner, "owner")] if held.owner else []
        roles += [(name, "standby") for name in held.standbys]
        roles += [(name, "left") for name in sorted(left)]
        return ClusterPartition(
            number=number,
            owner=held.owner,
            epoch=held.epoch,
            replicas=[self._replica(number, name, role) for name, role in roles],
            move=self._move(number, held),
            reason=self._reason(number, held),
        )

    def _replica(self, number: int, name: str, role: Role) -> ClusterReplica:
        progress = self._progress(number, name)
        snapshot = self._verified.get(name, {}).get(number)
        if progress is None:
            return ClusterReplica(node=name, role=role, snapshot_offset=snapshot)
        return ClusterReplica(
            node=name,
            role=role,
            offset=progress.offset,
            frames_behind=progress.frames_behind,
            ms_behind=progress.ms_behind,
            serving=progress.serving,
            snapshot_offset=snapshot,
        )

    def _move(self, number: int, held: Assignment) -> ClusterMove | None:
        move = held.move
        if move is None:
            return None
        owner = self._progress(number, held.owner)
        if owner is not None and owner.released_revision == held.revision:
            waits_for = f"{move.to} to take over"
        elif self._fresh(held.owner) is False:
            waits_for = f"{held.owner} to be heard of again, or its lease to end"
        else:
            waits_for = f"{held.owner} to finish its cycle and close the partition"
        since_ms = max(0, self._now_ms - move.at_ms)
        return ClusterMove(source=move.source, to=move.to, why=move.why, since_ms=since_ms, waits_for=waits_for)

    def _reason(self, number: int, held: Assignment) -> str:
        if not held.owner:
            return "no owner yet: no node was heard of that could have it"
        if held.move is not None:
            return f"moves to {held.move.to}: {held.move.why}"
        if self._fresh(held.owner) is False:
            return f"{held.owner} is silent, and no other node can take over"
        node, progress = self._catalog.nodes.get(held.owner), self._progress(number, held.owner)
        if node is not None and node.draining:
            return f"{held.owner} is draining: {self._waits_for_standby(number, held)}"
        if self._reports is not None and (progress is None or not progress.serving):
            behind = "" if progress is None else f", {progress.frames_behind} frames behind"
            return f"{held.owner} has not opened it yet{behind}"
        return ""

    def _waits_for_standby(self, number: int, held: Assignment) -> str:
        moving = sum(other.move is not None for other in self._catalog.partitions)
        complete = [name for name in held.standbys if caught_up(self._progress(number, name), self._plan)]
        if complete and all(self._tries_models(name) for name in complete):
            return f"{' and '.join(complete)} caught up, and must try the models first"
        if complete:
            return f"waits for its turn, {moving} of at most {self._catalog.settings.moves_max} moves are in progress"
        if not held.standbys:
            return "it has no standby that could take over"
        return "no standby has caught up yet"

    def _tries_models(self, name: str) -> bool:
        report = self._report(name)
        return report is not None and report.tries_models

    # models

    def _models(self) -> Iterable[ClusterModel]:
        """Retired versions are not waited for."""
        members = set(self._catalog.nodes)
        for _, model in sorted(self._catalog.models.items()):
            for version in model.versions.values():
                missing = members - self._catalog.holders.get(version.blob, {}).keys()
                if missing and version.state != "retired":
                    yield ClusterModel(
                        tenant=model.tenant,
                        model=model.model,
                        version=version.version[:12],
                        state=version.state,
                        waits_for=sorted(missing),
                    )
