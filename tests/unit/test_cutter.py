"""How far the leader would cut a changelog, over histories of snapshots that come, go and grow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from node.kernel.clock import ManualClock
from replication.catalog import Assignment, Catalog
from replication.commands import Settings
from replication.cutter import Changelogs, Cutter
from replication.ownership import NodeReport, Progress, Reports

DELAY_MS = 600
NAMES = ("a", "b", "c", "d")


@dataclass
class Leader:
    """What the leader knows; `snapshots` and `offsets` are node -> offset of partition 0."""

    holders_min: int = 2
    leads: bool = True
    owner: str = "a"
    standbys: tuple[str, ...] = ("b", "c")
    snapshots: dict[str, int] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)

    @property
    def catalog(self) -> Catalog:
        held = Assignment(owner=self.owner, epoch=1, standbys=self.standbys)
        return Catalog(settings=Settings(snapshot_holders_min=self.holders_min), partitions=(held,))

    def reports(self) -> Reports:
        told = {
            name: NodeReport(0, 1, {0: Progress(offset, 0, 0)} if offset >= 0 else {})
            for name, offset in self.offsets.items()
        }
        return Reports(0, told)

    def verified(self) -> Mapping[str, Mapping[int, int]]:
        """Of every node that is there, with or without a snapshot."""
        return {name: {0: self.snapshots[name]} if name in self.snapshots else {} for name in self.offsets}


async def _nothing_stored(partition: int) -> int:
    return 0


def cutter(leader: Leader, clock: ManualClock) -> Cutter:
    return Cutter(Changelogs({}, "shop-changelog"), leader, _nothing_stored, clock, DELAY_MS)


def test_it_is_cut_a_delay_later_and_only_as_far_as_it_still_may_be() -> None:
    clock, leader = ManualClock(), Leader(snapshots={"a": 50, "b": 40}, offsets={"a": 60, "b": 55, "c": 45})
    made = cutter(leader, clock)
    assert made._safe(0, 0) is None
    clock.advance(DELAY_MS - 1)
    assert made._safe(0, 0) is None
    clock.advance(1)
    cut = made._safe(0, 0)
    assert cut is not None
    assert (cut.before, cut.holders, cut.needed) == (40, {"a": 50, "b": 40}, {"a": 60, "b": 55, "c": 45})
    leader.offsets["c"] = 35
    cut = made._safe(0, 0)
    assert cut is not None
    assert cut.before == 35
    del leader.snapshots["b"]
    assert made._safe(0, 0) is None
    leader.snapshots["b"] = 40
    del leader.offsets["a"]
    assert made._safe(0, 0) is None


def test_a_store_behind_the_changelog_does_not_hold_it_back() -> None:
    clock = ManualClock()
    leader = Leader(snapshots={"a": 50, "b": 40}, offsets={"a": 60, "b": 55, "c": 0})
    made = cutter(leader, clock)
    made._safe(0, 20)
    clock.advance(DELAY_MS)
    cut = made._safe(0, 20)
    assert cut is not None
    assert cut.before == 40
    assert made._safe(0, 40) is None


def test_snapshots_of_nodes_without_a_part_in_the_partition_do_not_count() -> None:
    clock = ManualClock()
    leader = Leader(snapshots={"a": 50, "d": 50}, offsets={"a": 60, "b": 55, "d": 60})
    made = cutter(leader, clock)
    made._safe(0, 0)
    clock.advance(DELAY_MS)
    assert made._safe(0, 0) is None
    leader.standbys = ("b", "d")
    made._safe(0, 0)
    clock.advance(DELAY_MS)
    cut = made._safe(0, 0)
    assert cut is not None
    assert cut.before == 50


def test_snapshots_of_an_earlier_changelog_do_not_count() -> None:
    """Its topic was made again: nobody has what the new one holds, and only that its owner has not got so far tells."""
    clock = ManualClock()
    leader = Leader(snapshots={"a": 500, "b": 400, "c": 30}, offsets={"a": 60, "b": 55, "c": 60})
    made = cutter(leader, clock)
    made._safe(0, 0)
    clock.advance(DELAY_MS)
    assert made._safe(0, 0) is None
    leader.snapshots["a"] = 40
    made._safe(0, 0)
    clock.advance(DELAY_MS)
    cut = made._safe(0, 0)
    assert cut is not None
    assert (cut.before, cut.holders) == (30, {"a": 40, "c": 30})


async def test_others_have_their_turn_between_partitions() -> None:
    """Looking at all of 4096 takes more than a second, in which the leader would do nothing else."""

    class Whole(Changelogs):
        async def bounds(self, partition: int) -> tuple[int, int]:
            return 0, 60

    class Many(Leader):
        @property
        def catalog(self) -> Catalog:
            one = super().catalog
            return structs.replace(one, partitions=one.partitions * 64)

    leader = Many(snapshots={"a": 50, "b": 40}, offsets={"a": 60, "b": 55})
    made = Cutter(Whole({}, "shop-changelog"), leader, _nothing_stored, ManualClock(), DELAY_MS)
    looking = asyncio.ensure_future(made.round())
    turns = 0
    while not looking.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 64


moments = st.lists(
    st.tuples(
        st.integers(0, DELAY_MS),
        st.dictionaries(st.sampled_from(NAMES), st.integers(0, 50)),
        st.dictionaries(st.sampled_from(NAMES), st.integers(-1, 50)),
    ),
    max_size=20,
)


@given(moments, st.integers(1, 3), st.integers(0, 20))
def test_no_record_is_cut_that_a_holder_or_a_replica_may_need(
    history: list[tuple[int, dict[str, int], dict[str, int]]], holders_min: int, start: int
) -> None:
    clock, leader = ManualClock(), Leader(holders_min)
    made = cutter(leader, clock)
    possible: list[tuple[int, int]] = []
    for advance_ms, snapshots, offsets in history:
        clock.advance(advance_ms)
        leader.snapshots, leader.offsets = snapshots, offsets
        cut = made._safe(0, start)
        replicas = [name for name in ("a", "b", "c") if name in offsets]
        useful = [offsets[name] for name in replicas if offsets[name] >= start]
        holding = sorted(snapshots[name] for name in replicas if name in snapshots)
        if offsets.get("a", -1) >= 0:
            may = min([*useful, holding[-holders_min]]) if len(holding) >= holders_min else 0
            possible.append((clock.now_ms(), may))
        if cut is not None:
            assert cut.before > start
            assert offsets.get("a", -1) >= 0, "the owner has said where it is"
            assert all(cut.before <= offset for offset in useful)
            assert sum(offset >= cut.before for offset in holding) >= holders_min
            assert any(at <= clock.now_ms() - DELAY_MS and cut.before <= may for at, may in possible)
            start = cut.before
