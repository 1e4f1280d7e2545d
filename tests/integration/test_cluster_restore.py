"""A whole cluster whose changelog was cut: a node that lost its disk, or never had one, goes on from a snapshot."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from cluster_support import Cluster, Load, lose_disk
from node_support import wait_until

from replication.cutter import Changelogs

PARTITIONS = 2


def replicas(cluster: Cluster, number: int) -> list[dict[str, Any]]:
    partitions = cluster.status().get("partitions", ())
    found = next((one for one in partitions if one["number"] == number), {"replicas": []})
    return [one for one in found["replicas"] if one["role"] != "left"]


def cut(cluster: Cluster) -> dict[int, int]:
    """Cut each changelog as the leader does, which waits ten minutes before it: behind what all replicas have
    verified, and with frames after it. Where each begins now."""

    def covered(number: int) -> int:
        offsets = [one["snapshot_offset"] or 0 for one in replicas(cluster, number)]
        return min(offsets) if len(offsets) == 2 else 0

    changelogs = Changelogs({"bootstrap_servers": cluster.kafka.address}, f"{cluster.application}.changelog")

    async def cut_all(before: dict[int, int]) -> dict[int, int]:
        try:
            return {number: await changelogs.cut(number, offset) for number, offset in before.items()}
        finally:
            await changelogs.close()

    covering = {
        number: wait_until(lambda number=number: covered(number), f"both have a snapshot of partition {number}")
        for number in range(PARTITIONS)
    }
    starts = asyncio.run(cut_all(covering))
    assert all(start > 0 for start in starts.values()), starts
    return starts


def restored(cluster: Cluster, name: str) -> dict[int, dict[str, Any]]:
    """The last restore from a snapshot of each partition, as the node's log tells."""
    lines = cluster.nodes[name].log.read_text(errors="replace").splitlines()
    told = [json.loads(line) for line in lines if "snapshot restored" in line]
    return {one["partition"]: one for one in told}


def test_a_disk_that_is_lost_after_the_changelog_was_cut_comes_back_from_snapshots_of_peers(cluster: Cluster) -> None:
    load = Load(cluster)
    with load:
        lost = cluster.settle()[0]
        starts = cut(cluster)
        held = {number for number in starts if lost in {one["node"] for one in replicas(cluster, number)}}
        assert not restored(cluster, lost)
        cluster.nodes[lost].kill()
        lose_disk(cluster.nodes[lost])
        cluster.start(lost)
        wait_until(lambda: held <= restored(cluster, lost).keys(), "restored from snapshots")
        cluster.settle()
        for number, told in restored(cluster, lost).items():
            assert told["source"] in cluster.nodes.keys() - {lost}
            assert told["offset"] >= starts[number]
            assert told["bytes_fetched"] > 0
    load.check()
    cluster.settle()
    said = cluster.headrace("verify")
    assert said.count("the same on 1 standbys") == PARTITIONS, said
