"""Most or all nodes lose their disks at once, after the changelog was cut too: what comes back is right, and equal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

from cluster_support import Cluster, Load, lose_disk, running
from node_support import Kafka, Node, wait_until

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


def reason(node: Node) -> str:
    """Why it is not ready, once it answers."""
    with contextlib.suppress(URLError):
        return node.unready()
    return ""


def test_two_of_three_disks_are_lost_and_an_operator_accepts_it(cluster: Cluster) -> None:
    cluster.settle()
    load = loaded(cluster)
    members = {one["name"]: one["incarnation"] for one in cluster.status()["members"]}
    cluster.kill()
    empty = [cluster.nodes[name] for name in ("n2", "n3")]
    for node in empty:
        lose_disk(node)
    refused = cluster.headrace("accept-loss", at="n2", code=1)
    assert "start it once" in refused
    load.send(2 * CUSTOMERS)
    for node in cluster.nodes.values():
        node.start(wait_s_max=0)
    for node in cluster.nodes.values():
        wait_until(lambda node=node: "no leader" in reason(node), "it says that there is no leader")  # type: ignore[misc]
    wait_until(lambda: (empty[0].folder / "data" / "cluster" / "raft" / "node").exists(), "its catalog is begun")
    assert "a node runs on" in cluster.headrace("accept-loss", at="n2", code=1)
    cluster.nodes["n2"].stop()
    assert "n2 votes with the catalog it has" in cluster.headrace("accept-loss", at="n2")
    cluster.start("n2")
    cluster.settle()
    load.check()
    now = {one["name"]: one["incarnation"] for one in cluster.status()["members"]}
    assert now["n1"] == members["n1"], "the catalog is that of the disk that was kept"
    assert all(now[name] > members[name] for name in ("n2", "n3"))
    cluster.headrace("verify")


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
            lose_disk(node)
        cluster.start()
        cluster.settle()
        for name in cluster.living():  # the catalog was lost too, and the model with it
            wait_until(lambda name=name: runs_the_model(cluster, name), f"the model runs on {name} again")  # type: ignore[misc]
        load.send(2 * CUSTOMERS)
        load.check()
        sources = [one["source"] for node in cluster.nodes.values() for one in node.logged("snapshot restored")]
        assert sources.count("store") >= PARTITIONS, sources
        said = cluster.headrace("verify")
        assert said.count("the same on 1 standbys") == PARTITIONS, said


def runs_the_model(cluster: Cluster, name: str) -> bool:
    models = cluster.nodes[name].get("/v1/models")["models"]
    return [one["state"] for one in models if one["model"] == "spend"] == ["live"]
