"""(P) What nodes tell the leader of their partitions, and what the leader keeps of it.

The newest report of a node replaces the one before. It counts only if it is of the incarnation that the catalog names
and newer than the last, and no more once the node has renewed its lease as another process. A node that has nothing
new to say repeats itself once in REPORT_QUIET_S; in between, renewals of its lease say that it is there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Final

import msgspec

from node.kernel.errors import PeerRefused
from node.kernel.limits import CLUSTER_REPORT_BYTES_MAX
from replication.catalog import Catalog
from replication.catalog_machine import Agreed, Ending
from replication.commands import Name
from replication.lease import same_process
from replication.ownership import NodeReport, PlanSettings, Progress, Reports, caught_up

REPORT_QUIET_S: Final = 4.0


class PeerReport(msgspec.Struct, frozen=True):
    node: Name
    incarnation: int
    number: int
    partitions: dict[int, Progress]
    verified: dict[int, int]
    """Partition -> changelog offset of the newest snapshot that the node has and has verified."""
    observed: dict[str, bytes] = {}
    """Staged version -> what the node has seen of it, for whoever judges it."""
    tries_models: bool = False
    """It has just started and opens nothing that it is given until it has tried its models."""

    def turning_points(self, settings: PlanSettings) -> tuple[bool, dict[int, tuple[bool, int, bool]]]:
        """What a plan may be waiting for: a node that has tried its models, owners that opened or released a partition,
        standbys that have caught up."""
        return self.tries_models, {
            number: (held.serving, held.released_revision, caught_up(held, settings))
            for number, held in self.partitions.items()
        }


_decoder = msgspec.msgpack.Decoder(PeerReport)


def encode_report(report: PeerReport) -> bytes:
    return msgspec.msgpack.encode(report)


def decode_report(body: bytes) -> PeerReport:
    """Raises PeerRefused."""
    if len(body) > CLUSTER_REPORT_BYTES_MAX:
        raise PeerRefused(f"a report of {len(body)} bytes is over CLUSTER_REPORT_BYTES_MAX; the node has a fault")
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
        raise PeerRefused(f"a report can't be read ({failure}); run the same release on every node") from None


class ReportBook:
    """The leader's, of its present term; it plans by `settings`. Times are seconds of its monotonic clock."""

    def __init__(self, settings: PlanSettings) -> None:
        self._settings = settings
        self.changes = 0
        """Rises when a report says something else than the one before."""
        self.taken = 0
        self.dropped = 0
        self.begin(0.0)

    def begin(self, now_s: float) -> None:
        """This node has become leader: what was said to an earlier one may be old."""
        self.since_s = now_s
        self._told: dict[str, tuple[float, PeerReport]] = {}
        self.changes += 1

    def take(self, report: PeerReport, agreed: Agreed, now_s: float) -> bool:
        """Whether a plan may have waited for what the report says."""
        member = agreed.catalog.nodes.get(report.node)
        _, before = self._told.get(report.node, (0.0, None))
        late = before is not None and before.incarnation == report.incarnation and before.number >= report.number
        if member is None or member.incarnation != report.incarnation or late:
            self.dropped += 1
            return False
        self.taken += 1
        self._told[report.node] = (now_s, report)
        # What another process says is news, though it may say the same: what the one before said counted no more.
        if before is None or before.incarnation != report.incarnation or not same_process(before.number, report.number):
            self.changes += 1
            return True
        said = (before.partitions, before.verified, before.tries_models)
        if said != (report.partitions, report.verified, report.tries_models):
            self.changes += 1
        return before.turning_points(self._settings) != report.turning_points(self._settings)

    def reports(self, agreed: Agreed, origin_ms: float) -> Reports:
        """For `ownership`; `origin_ms` is what the planner's milliseconds are at 0 s of the monotonic clock."""
        nodes = {
            name: self._node_report(name, member.incarnation, agreed, origin_ms)
            for name, member in agreed.catalog.nodes.items()
            if name in self._told or name in agreed.renewed_s
        }
        return Reports(math.ceil(origin_ms + self.since_s * 1000), nodes)

    def _node_report(self, name: str, incarnation: int, agreed: Agreed, origin_ms: float) -> NodeReport:
        told_s, report = self._told.get(name, (-math.inf, None))
        heard_s = max(told_s, agreed.renewed_s.get(name, -math.inf))
        heard_ms = math.ceil(origin_ms + heard_s * 1000)
        ended = has_ended(agreed.endings.get(name), name, agreed.catalog, told_s)
        if report is None or not _is_of(report, agreed):
            return NodeReport(heard_ms, incarnation, ended=ended)
        reported_s = min(heard_s, told_s + REPORT_QUIET_S)
        reported_ms = math.floor(origin_ms + reported_s * 1000)
        return NodeReport(heard_ms, report.incarnation, report.partitions, reported_ms, report.tries_models, ended)

    def observed(self, names: Collection[str], agreed: Agreed) -> list[Mapping[str, bytes]]:
        """What each of these nodes has seen of staged versions."""
        return [report.observed for name, (_, report) in self._told.items() if name in names and _is_of(report, agreed)]

    def verified(self, names: Collection[str], agreed: Agreed) -> dict[str, Mapping[int, int]]:
        """Of these nodes: partition -> offset of the verified snapshot. What a lost disk had, or another process had
        verified, counts no more than its progress does."""
        return {
            name: report.verified
            for name, (_, report) in self._told.items()
            if name in names and _is_of(report, agreed)
        }


def has_ended(ending: Ending | None, name: str, catalog: Catalog, told_s: float) -> bool:
    """Whether the process that renewed the node's lease last has ended: not if another has since, nor if it said
    something, at `told_s`, after that was seen. Renewals that it had under way may still come back."""
    member = catalog.nodes.get(name)
    if ending is None or member is None or member.incarnation != ending.incarnation:
        return False
    return told_s <= ending.at_s and same_process(ending.number, catalog.leases.get(name, 0))


def _is_of(report: PeerReport, agreed: Agreed) -> bool:
    """Whether a report is of the process that the node has joined and renews its lease as."""
    member = agreed.catalog.nodes.get(report.node)
    renewed = agreed.catalog.leases.get(report.node, 0)
    return member is not None and member.incarnation == report.incarnation and same_process(report.number, renewed)
