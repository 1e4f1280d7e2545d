"""A cluster of node processes on a real broker, under load: nodes are killed, paused, drained, added, replaced.

Whatever happens, each event ends in exactly one inference, the right one, and copies of a partition are equal.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster_support import FRAMES_BEHIND_MAX, Cluster, Load, lose_disk, serves
from node_support import Node, children, drop, linear, status_file, wait_until

PARTITIONS = 4


def verify(cluster: Cluster) -> None:
    """Owner and standby have the same rows, as the nodes themselves find."""
    cluster.settle()
    said = cluster.headrace("verify")
    assert "differ" not in said, said


def test_owners_that_die_or_are_paused_are_taken_over_from(cluster: Cluster) -> None:
    load = Load(cluster)
    with load:
        wait_until(lambda: set(cluster.owners().values()) == set(cluster.nodes), "partitions are dealt out evenly")
        before = cluster.settle()
        dead = before[0]
        cluster.nodes[dead].kill()
        owners = wait_until(lambda: alive if dead not in (alive := cluster.owners()).values() else {}, "taken over")
        assert owners
        cluster.start(dead)
        paused = cluster.settle()[1]
        epochs = {one["number"]: one["epoch"] for one in cluster.status()["partitions"] if one["owner"] == paused}
        cluster.nodes[paused].pause()
        others = [name for name in cluster.nodes if name != paused]

        def taken() -> bool:
            found = [one for name in others for one in partitions_seen_by(cluster, name)]
            return bool(found) and all(one["owner"] != paused and serves(one) for one in found)

        wait_until(taken, "taken over from the paused node")
        cluster.nodes[paused].resume()
        cluster.settle()
        now = {one["number"]: one["epoch"] for one in cluster.status()["partitions"]}
        assert all(now[number] > epoch for number, epoch in epochs.items())
    load.check()
    verify(cluster)
    told = cluster.nodes[paused].get("/v1/status")["cluster_parts"]
    assert told["agreement"]["leases_lost"] >= 1, "it was paused for longer than its lease"
    parts = {"standbys", "snapshots", "changelog_cuts", "model_files", "table_files", "peers_asked", "peers_answered"}
    assert told.keys() == {"agreement"} | parts


def partitions_seen_by(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    """What /v1/cluster of this node says of all partitions; none while it does not know what the leader does."""
    try:
        found = cluster.nodes[name].get("/v1/cluster")
    except OSError:
        return []
    return list(found["partitions"]) if found["complete"] else []


def test_nodes_are_drained_join_and_leave_under_load(cluster: Cluster) -> None:
    load = Load(cluster)
    with load:
        owners = cluster.settle()
        drained = owners[0]
        said = cluster.headrace("drain", drained, "--wait")
        assert f"{drained} owns nothing and can be stopped" in said
        assert drained not in cluster.settle().values()
        assert cluster.nodes[drained].stop() == 0
        cluster.start(drained)
        cluster.headrace("undrain", drained)
        wait_until(lambda: drained in cluster.owners().values(), "owns again")

        gone = next(name for name in ("n3", "n2") if name != cluster.status()["leader"])
        cluster.nodes[gone].kill()
        wait_until(lambda: gone in silent(cluster), "known to be silent")
        cluster.headrace("leave", gone, "--dead")
        cluster.make("n4")
        cluster.headrace("join", "n4", cluster_address(cluster, "n4"))
        cluster.nodes["n4"].start(wait_s_max=0)
        with models_on_trial(cluster.nodes["n4"]):
            wait_until(lambda: copies(cluster, "n4"), "the replacement has caught up with a partition")
            told = wait_until(lambda: member(cluster, "n4"), "told of as a member")
            assert (told["tries_models"], told["owns"]) == (True, 0)
        wait_until(lambda: "n4" in cluster.owners().values(), "the replacement owns partitions")

        leaving = next(name for name in ("n3", "n2") if name != gone)
        cluster.headrace("leave", leaving)
        assert cluster.nodes[leaving].stop() == 0
        assert leaving not in cluster.settle().values()
        assert {one["name"] for one in cluster.status()["members"]} == {"n1", "n4"}

        drop(cluster.nodes["n1"].models, "shop/twice", linear(2), {"amount": "event.amount"})
        version = cluster.nodes["n1"].live("shop/twice")
        for name in cluster.living():
            wait_until(lambda name=name: live_version(cluster, name) == version, f"live on {name}")  # type: ignore[misc]
        since = len(load.events)
        wait_until(lambda: len(load.events) > since + 100, "events for the new model")
    load.check()
    assert len(cluster.inferences(100, "twice")) >= 100
    verify(cluster)


@contextlib.contextmanager
def models_on_trial(node: Node) -> Iterator[None]:
    """What its workers are forked from stands still meanwhile, so that no model can be tried."""

    def found() -> list[int]:
        with contextlib.suppress(OSError):
            commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(node.pid)}
            return [pid for pid, command in commands.items() if b"tenants.warm_server" in command]
        return []

    (warm,) = wait_until(found, "its warm server")
    os.kill(warm, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(warm, signal.SIGCONT)


def copies(cluster: Cluster, name: str) -> list[int]:
    """The partitions that the node has caught up with as a standby."""
    return [
        one["number"]
        for one in cluster.status().get("partitions", ())
        for copy in one["replicas"]
        if (copy["node"], copy["role"]) == (name, "standby") and copy["frames_behind"] in range(FRAMES_BEHIND_MAX + 1)
    ]


def cluster_address(cluster: Cluster, name: str) -> str:
    line = next(line for line in cluster.nodes[name].config.read_text().splitlines() if line.startswith("listen"))
    return line.split('"')[1]


def silent(cluster: Cluster) -> set[str]:
    return {one["name"] for one in cluster.status().get("members", ()) if one["fresh"] is False}


def live_version(cluster: Cluster, name: str) -> str:
    """The version of shop/twice that runs on this node, as its own API says."""
    models = cluster.nodes[name].get("/v1/models")["models"]
    found = [one["sha256"] for one in models if (one["model"], one["state"]) == ("twice", "live")]
    return str(found[0]) if found else ""


def test_a_lost_disk_and_all_nodes_killed_at_once(cluster: Cluster) -> None:
    load = Load(cluster)
    with load:
        lost = cluster.settle()[2]
        incarnation = member(cluster, lost)["incarnation"]
        cluster.nodes[lost].kill()
        lose_disk(cluster.nodes[lost])
        cluster.start(lost)
        wait_until(lambda: member(cluster, lost).get("incarnation", 0) > incarnation, "joins as a new incarnation")
        cluster.settle()
        wait_until(lambda: lost in cluster.owners().values(), "owns partitions again")

        for name in cluster.living():
            os.kill(cluster.nodes[name].pid, 9)
        cluster.kill()
        cluster.start()
        cluster.settle()
    load.check()
    verify(cluster)
    assert status_file(cluster.nodes["n1"].models, "shop/spend")["state"] == "live"
    customer = load.events[-1]["customer"]
    answers = []
    for name in cluster.living():
        try:
            answers.append(cluster.nodes[name].get(f"/v1/customers/{customer}?at=last"))
        except OSError:
            continue
    assert len(answers) >= 2, "owner and standby answer"
    assert len({one["profile"]["events"] for one in answers}) == 1


def member(cluster: Cluster, name: str) -> dict[str, Any]:
    return next((one for one in cluster.status().get("members", ()) if one["name"] == name), {})
