"""Most or all nodes lose their disks at once, after the changelog was cut too: what comes back is right, and equal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from cluster_support import Cluster, Load, running
from node_support import Kafka, wait_until

PARTITIONS = 4
CUSTOMERS = 50


def loaded(cluster: Cluster) -> Load:
    """Events of each customer, and an inference for every one of them."""
    load = Load(cluster)
    load.send(10 * CUSTOMERS)
    load.check()
    return load


def cut_behind_snapshots(cluster: Cluster) -> dict[int, int]:
    """Cut each partition's changelog where all its replicas have a verified snapshot, as the leader does later."""

    def snapshots() -> dict[int, int]:
        cuts = {}
        for one in cluster.status().get("partitions", ()):
            offsets = [replica["snapshot_offset"] for replica in one["replicas"] if replica["role"] != "left"]
            if len(offsets) > 1 and all(offsets):
                cuts[one["number"]] = min(offsets)
        return cuts if len(cuts) == PARTITIONS else {}

    cluster.headrace("snapshot")
    cuts = wait_until(snapshots, "verified snapshots of owners and standbys")
    cluster.kafka.cut(f"{cluster.application}.changelog", cuts)
    return cuts


def test_all_disks_but_kafka_and_the_store_are_lost(
    kafka: str, tmp_path: Path, topic_names: Callable[[str], str]
) -> None:
    """A new cluster is founded on the old topics; the changelog was cut, so state is in the store by URL only."""
    broker = Kafka(kafka)
    topic = broker.create(topic_names("events"), PARTITIONS)
    url = f"file://{tmp_path}/store"
    with running(tmp_path, broker, topic, PARTITIONS, topic_names("restore"), snapshot_url=url) as cluster:
        cluster.settle()
        load = loaded(cluster)
        cuts = cut_behind_snapshots(cluster)

        def stored() -> bool:
            offsets = {
                number: [int(path.stem) for path in tmp_path.glob(f"store/*/{number}/*.json")] for number in cuts
            }
            return all(max(offsets[number], default=0) >= before for number, before in cuts.items())

        wait_until(stored, "snapshots in the store")
        cluster.kill()
        for node in cluster.nodes.values():
            shutil.rmtree(node.folder / "data")
        load.send(2 * CUSTOMERS)
        cluster.start()
        cluster.settle()
        load.check()
        sources = [one["source"] for node in cluster.nodes.values() for one in node.logged("snapshot restored")]
        assert sources.count("store") >= PARTITIONS, sources
        said = cluster.headrace("verify")
        assert said.count("the same on 1 standbys") == PARTITIONS, said
