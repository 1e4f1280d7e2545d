"""Versions in stages in a cluster of node processes under load: judged together, moved by the catalog, on all alike."""

from __future__ import annotations

from typing import Any

from cluster_support import SUMS, Cluster, Load
from node_support import MANIFEST, drop, linear, status_file, wait_until

PARTITIONS = 4
NAME = "shop/spend"
SHADOW = '{ stage = "shadow", rows_min = 1500, agreement_min = 0.99 }'
CANARY = '{ stage = "canary", share = 0.4, rows_min = 200 }'
PATIENT = '{ stage = "shadow", rows_min = 1000000, tolerance = 0 }'


def put(cluster: Cluster, *stages: str) -> str:
    """Drop a version with the same outputs at the first node; its number once the cluster has staged it."""
    told = cluster.nodes["n1"].models
    head = MANIFEST.replace("[features]", f"[rollout]\nstages = [{', '.join(stages)}]\n[features]")
    drop(told, NAME, linear(1, 1), SUMS, head)
    wait_until(lambda: status_file(told, NAME)["state"] == "shadow", "the first stage")
    return str(status_file(told, NAME)["version"])


def detail(cluster: Cluster, name: str) -> dict[str, Any]:
    return cluster.nodes[name].get(f"/v1/models/{NAME}")


def live(cluster: Cluster, name: str) -> str:
    return next(one["sha256"] for one in detail(cluster, name)["versions"] if one["state"] == "live")


def test_a_version_is_judged_by_what_all_nodes_see_though_the_leader_dies(cluster: Cluster) -> None:
    first = live(cluster, "n1")
    load = Load(cluster)
    with load:
        cluster.settle()
        second = put(cluster, SHADOW, CANARY)
        leader = cluster.status()["leader"]
        cluster.nodes[leader].kill()
        cluster.start(leader)
        for name in cluster.nodes:
            wait_until(lambda name=name: live(cluster, name) == second, f"live on {name}")  # type: ignore[misc]
        third = put(cluster, PATIENT)
        other = next(name for name in cluster.nodes if name != "n1")
        said = cluster.headrace("rollback", NAME, "--reason", "not today", at=other)
        assert f"{third[:12]} quarantined" in said
        wait_until(lambda: status_file(cluster.nodes["n1"].models, NAME)["state"] == "quarantined", "told its tenant")
        back = cluster.headrace("rollback", NAME, "--version", second[:8], at=other)
        assert f"{first[:12]} live" in back
        for name in cluster.nodes:
            wait_until(lambda name=name: live(cluster, name) == first, f"back on {name}")  # type: ignore[misc]
    load.check()
    for name in cluster.nodes:
        changes = [(one["version"], one["to"], one["who"]) for one in detail(cluster, name)["history"]]
        assert changes[:4] == [
            (first, "live", "n1"),
            (second, "shadow", "n1"),
            (second, "canary 0.4", "auto"),
            (second, "live", "auto"),
        ]
        assert [to for _, to, _ in changes[4:]] == ["shadow", "quarantined", "quarantined", "live"]
