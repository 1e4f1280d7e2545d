"""What failover, restore and overhead work out for themselves: when a side is ready, and what its figures are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.config import load_config
from replication.frame import FrameAssembler, encode_frame

BENCH = Path(__file__).resolve().parent.parent.parent / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import cluster  # noqa: E402
import failover  # noqa: E402
import kafka_streams  # noqa: E402
import overhead  # noqa: E402
import restore  # noqa: E402
import state_rows  # noqa: E402
import workload  # noqa: E402


def copy(node: str, role: str, behind: int | None = 0, serving: bool = False, **fields: Any) -> dict[str, Any]:
    found = {"node": node, "role": role, "frames_behind": behind, "serving": serving, "offset": 10}
    return {**found, "snapshot_offset": None, **fields}


def status(*partitions: list[dict[str, Any]], complete: bool = True, move: object = None) -> dict[str, Any]:
    listed = [
        {"number": number, "owner": copies[0]["node"], "replicas": copies, "move": move}
        for number, copies in enumerate(partitions)
    ]
    return {"complete": complete, "partitions": listed}


OWNER, STANDBY = copy("a", "owner", serving=True), copy("b", "standby")


# --- Headrace's side ------------------------------------------------------------------------------------------------


def test_a_cluster_is_settled_once_every_partition_is_served_and_stood_by_for() -> None:
    whole = status([OWNER, STANDBY], [OWNER, STANDBY])
    assert cluster.settled(whole, 2, 1, 0)
    assert not cluster.settled(whole, 3, 1, 0)
    assert not cluster.settled(whole, 2, 2, 0)
    assert not cluster.settled({**whole, "complete": False}, 2, 1, 0)
    assert not cluster.settled(status([OWNER, STANDBY], move={"to": "b"}), 1, 1, 0)
    assert not cluster.settled(status([copy("a", "owner"), STANDBY]), 1, 1, 0)


def test_a_standby_that_lags_does_not_count() -> None:
    for behind in (None, 4):
        lagging = status([OWNER, copy("b", "standby", behind)])
        assert not cluster.settled(lagging, 1, 1, 3)
    assert cluster.settled(status([OWNER, copy("b", "standby", 3)]), 1, 1, 3)
    assert not cluster.settled(status([OWNER, copy("b", "left")]), 1, 1, 3)


def test_owners_are_told_by_partition() -> None:
    assert cluster.owners(status([OWNER], [copy("c", "owner")])) == {0: "a", 1: "c"}


def test_nodes_take_the_configuration_of_a_cluster(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    made = cluster.Cluster(tmp_path, names, "127.0.0.1:9", "events", "bench", {"cluster": {"standbys": 2}})
    configs = [load_config(node.config) for node in made.nodes.values()]
    assert [config.node.name for config in configs] == list(names)
    sections = [config.cluster for config in configs if config.cluster is not None]
    assert [section.standbys for section in sections] == [2, 2, 2]
    assert sections[0].peers == sections[2].peers
    assert [section.listen for section in sections] == [sections[0].peers[name] for name in names]
    addresses = {section.listen for section in sections} | {section.peer_listen for section in sections}
    assert len(addresses) == 6


def test_what_a_node_has_serves_and_has_snapshots_of_is_counted() -> None:
    held = status(
        [copy("a", "owner", serving=True, snapshot_offset=10), copy("b", "standby", 0, snapshot_offset=9)],
        [copy("a", "owner", snapshot_offset=10), copy("b", "standby", 100)],
        [copy("b", "owner", serving=True), copy("a", "left", None)],
    )
    held["members"] = [{"name": "a", "fresh": True}, {"name": "b", "fresh": True}]
    assert (restore.serves(held, "a"), restore.serves(held, "b")) == (1, 1)
    assert (restore.caught_up(held, "a"), restore.caught_up(held, "b")) == (1, 2)
    held["members"][1]["fresh"] = False
    assert (restore.caught_up(held, "a"), restore.caught_up(held, "b")) == (1, 0), "its last words do not count"
    assert (restore.snapshots_of(held, "a"), restore.snapshots_of(held, "b")) == (2, 0)


# --- Kafka Streams' side --------------------------------------------------------------------------------------------

LINE = '{"state":"RUNNING","active":[0, 2],"standby":[1],"lag":7,"restored":5,"running_s":1.250}'


def test_the_last_whole_report_counts() -> None:
    earlier = LINE.replace("RUNNING", "REBALANCING")
    for lines in ([LINE], [earlier, LINE], [earlier, LINE, LINE[:30]], ["noise", LINE]):
        report = kafka_streams.parsed(lines)
        assert report == kafka_streams.Report("RUNNING", frozenset({0, 2}), frozenset({1}), 7, 5, 1.25)
    assert kafka_streams.parsed([]) == kafka_streams.Report()


@pytest.mark.parametrize(
    ("second", "wanted"),
    [
        (kafka_streams.Report("RUNNING", frozenset({1}), frozenset({0}), 3), True),
        (kafka_streams.Report("REBALANCING", frozenset({1}), frozenset({0}), 3), False),
        (kafka_streams.Report("RUNNING", frozenset({1}), frozenset({0}), 9), False),
        (kafka_streams.Report("RUNNING", frozenset({1}), frozenset({0}), -1), False),
        (kafka_streams.Report("RUNNING", frozenset({0, 1}), frozenset({0}), 3), False),
        (kafka_streams.Report("RUNNING", frozenset({1}), frozenset(), 3), False),
    ],
)
def test_streams_are_settled_as_a_cluster_is(second: kafka_streams.Report, wanted: bool) -> None:
    first = kafka_streams.Report("RUNNING", frozenset({0}), frozenset({1}), 0)
    assert kafka_streams.settled([first, second], 2, 1, 5) is wanted


# --- failover's figures ---------------------------------------------------------------------------------------------


def test_the_fastest_way_to_tune_counts() -> None:
    times = {"headrace": [1.0, 2.0, 9.0], "default": [40.0, 50.0], "tuned": [6.0], "tuned_more": [3.0, 3.0, 8.0]}
    assert failover.compared(times) == {
        "median_s": 2.0,
        "ratio_to_kafka_streams_default": 22.5,
        "ratio_to_kafka_streams_tuned": 1.5,
    }
    assert failover.compared({"headrace": [2.0], "default": [8.0]}).keys() == failover.AIMS.keys() - {
        "ratio_to_kafka_streams_tuned"
    }
    assert failover.figures(times["headrace"])["worst_s"] == 9.0


@pytest.mark.parametrize(("kills", "rounds"), [(10, 2), (3, 2), (1, 1), (7, 3)])
def test_rounds_share_the_kills(kills: int, rounds: int) -> None:
    parts = failover.rounds_of(kills, rounds)
    assert [kill for part in parts for kill in part] == list(range(kills))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- restore's rows -------------------------------------------------------------------------------------------------


def test_copies_are_the_same_rows_under_other_names() -> None:
    images = np.arange(12.0).reshape(4, 3)
    rows = state_rows.Rows([b"c%d" % number for number in range(4)], images, 2, b"layout", {0: {"events": 5}})
    found: dict[bytes, tuple[int, list[float]]] = {}
    progress: dict[int, dict[str, int]] = {}
    assembler = FrameAssembler()
    for partition, frame in state_rows.frames_of(rows, 3, 2):
        for record in encode_frame(frame):
            read = assembler.add(record)
        assert read is not None
        progress.setdefault(partition, {}).update(read.progress)
        assert (read.layout == b"layout") == (not read.customers)
        for customer, row in zip(read.customers, read.rows.tolist(), strict=True):
            assert customer not in found
            found[customer] = (partition, row)
    assert progress == {0: {"events": 5}, 1: {}}
    assert len(found) == 12
    for name, (partition, row) in found.items():
        original = rows.customers.index(name.partition(b"-")[2])
        assert row == images[original].tolist()
        assert partition == state_rows.copied([name.partition(b"-")[2]], int(name[:4]), 2)[1][0]


def test_a_month_of_events_lasts_a_month() -> None:
    events = [event for part in state_rows.month_of_events(5_000) for event in part.times_ms.tolist()]
    assert len(events) == 5_000
    assert events[0] == workload.FIRST_TIME_MS
    assert events == sorted(events)
    assert 0.99 < (events[-1] - events[0]) / state_rows.MONTH_MS <= 1


# --- overhead's figures ---------------------------------------------------------------------------------------------


def test_bytes_on_disk_are_those_of_the_records(tmp_path: Path) -> None:
    for number, size in ((0, 100), (1, 20)):
        folder = tmp_path / f"events-{number}"
        folder.mkdir()
        (folder / "00000000000000000000.log").write_bytes(bytes(size))
        (folder / "00000000000000000000.index").write_bytes(bytes(4096))
    assert overhead.topic_bytes(tmp_path, "events", 2) == 120


def test_what_owners_have_done_counts_and_standbys_must_be_as_far() -> None:
    def node(*partitions: tuple[str, int]) -> dict[str, Any]:
        return {"partitions": [{"role": role, "counters": {"events": count}} for role, count in partitions]}

    assert overhead.events_done([node(("owner", 6), ("standby", 4)), node(("owner", 3))]) == 9
    even = status([copy("a", "owner", offset=7), copy("b", "standby", offset=7), copy("c", "left", offset=3)])
    assert overhead.folded_by_standbys(even)
    for offset in (6, None):
        assert not overhead.folded_by_standbys(status([OWNER], [OWNER, copy("b", "standby", offset=offset)]))


def test_what_is_added_is_the_difference() -> None:
    found = {
        name: overhead.Costs(9, 1, cpu, 0, cpu / 2, 0, 0, 100 * cpu)
        for name, cpu in zip(("alone", "cluster", "standby"), (10.0, 12.0, 18.0), strict=True)
    }
    assert overhead.added(found) == {
        "raft": {"nodes_cpu_us": 2.0, "broker_cpu_us": 1.0, "network_bytes": 200.0},
        "standby": {"nodes_cpu_us": 6.0, "broker_cpu_us": 3.0, "network_bytes": 600.0},
    }
