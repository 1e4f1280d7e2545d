"""A node's part in the cluster as a process of its own, with real peer HTTP; its partitions are only spoken of.

What a node would do with a partition, this process says it does: serve what it may own, release what is to move, be
level as a standby. Orders and answers: see `order_lines`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec
import uvloop
from order_lines import run

from node.kernel.clock import SystemClock
from node.kernel.supervise import Supervisor
from replication.cluster import Cluster, ClusterSettings
from replication.commands import Command, Settings
from replication.ownership import PlanSettings, Progress
from replication.peer_client import PeerClient
from replication.peer_messages import PeerCall, PeerReply, PeerRoute
from replication.peer_server import PeerServer
from replication.raft_types import RaftSettings

REPORT = "/peer/report"
COMMANDS = {kind.__struct_config__.tag: kind for kind in get_args(Command)}


class Process:
    def __init__(self, given: dict[str, Any]) -> None:
        secret = given["secret"].encode() if given.get("secret") else None
        folder, clock, name = Path(given["folder"]), SystemClock(), given["name"]
        raft = RaftSettings(
            name, given["peers"][name], given["peers"], folder / "raft", secret, **given.get("raft", {})
        )
        self.settings = ClusterSettings(
            name,
            raft,
            given["peer_listen"],
            given.get("rack", ""),
            1.0,
            folder,
            Settings(**{"lease_ms": 1000} | given.get("agreed", {})),
            PlanSettings(**given.get("plan", {})),
        )
        self.supervisor = Supervisor()
        self.client = PeerClient(name, secret, clock)
        self.server = PeerServer(given["peer_listen"], name, secret, clock, [PeerRoute("POST", REPORT, self.reported)])
        self.cluster = Cluster(self.settings, clock, self.supervisor, self.send_report, self.progress, lambda: {0: 7})
        self.looks = given.get("looks", True)
        """Off to measure what an idle cluster costs."""
        self.changes = 0
        self.released: dict[int, int] = {}

        self.seen: dict[tuple[int, int], tuple[float, float]] = {}
        """(partition, epoch) -> monotonic seconds of the first and last look at which it was served here."""

    async def start(self) -> None:
        self.looking = asyncio.create_task(self.look())
        await self.client.start()
        await self.server.start()
        self.cluster.subscribe(self.changed)
        await self.cluster.start()

    async def stop(self) -> None:
        self.looking.cancel()
        await self.cluster.stop()
        await self.server.stop()
        await self.client.stop()

    def changed(self) -> None:
        self.changes += 1
        for partition, held in enumerate(self.cluster.catalog.partitions):
            moving = held.move is not None and held.owner == self.cluster.name
            if moving and self.released.get(partition) != held.revision:
                self.released[partition] = held.revision
                self.cluster.report_now()

    async def look(self) -> None:
        while self.looks:
            self.look_once()
            await asyncio.sleep(0.01)

    def look_once(self) -> None:
        partitions = self.cluster.catalog.partitions
        for partition, progress in self.progress().items():
            if progress.serving:
                now_s = time.monotonic()
                key = (partition, partitions[partition].epoch)
                self.seen[key] = (self.seen.get(key, (now_s, now_s))[0], now_s)

    async def served(self, order: dict[str, Any]) -> Any:
        return [[*key, *times_s] for key, times_s in self.seen.items()]

    async def send_report(self, address: str, body: bytes) -> None:
        await self.client.ask(address, "POST", REPORT, body)

    async def reported(self, call: PeerCall) -> PeerReply:
        self.cluster.take_report(call.body)
        return PeerReply()

    def progress(self) -> Mapping[int, Progress]:
        cluster, found = self.cluster, {}
        for partition, held in enumerate(cluster.catalog.partitions):
            if held.owner == cluster.name or cluster.name in held.standbys:
                serving = held.move is None and cluster.may_own(partition, held.epoch)
                found[partition] = Progress(5, 0, 0, serving, self.released.get(partition, 0))
        return found

    async def status(self, order: dict[str, Any]) -> Any:
        cluster = self.cluster
        catalog = cluster.catalog
        return {
            **msgspec.to_builtins(cluster.statistics()),
            "nodes": msgspec.to_builtins(catalog.nodes),
            "partitions": msgspec.to_builtins(catalog.partitions),
            "lease_ms": catalog.settings.lease_ms,
            "owned": [p for p, held in enumerate(catalog.partitions) if cluster.may_own(p, held.epoch)],
            "changes": self.changes,
            "members": dict(cluster.statistics().raft.members),
            "verified": msgspec.to_builtins(cluster.verified()) if cluster.leads else {},
            "failure": repr(self.supervisor.failure),
            "repr": repr(self.settings) + repr(cluster.statistics()),
        }

    async def propose(self, order: dict[str, Any]) -> Any:
        fields = {"revision": self.cluster.catalog.revision} | order["command"]
        if "settings" in fields and fields["do"] == "settings":
            fields["settings"] = Settings(**fields["settings"])
        command = COMMANDS[fields.pop("do")](**fields)
        await self.cluster.propose(command, order.get("wait_s", 5.0))
        return self.cluster.catalog.revision

    async def agreed(self, order: dict[str, Any]) -> Any:
        return (await self.cluster.agreed(order.get("wait_s", 5.0))).revision

    async def join(self, order: dict[str, Any]) -> Any:
        await self.cluster.join(order["name"], order["address"])

    async def leave(self, order: dict[str, Any]) -> Any:
        await self.cluster.leave(order["name"])

    async def cpu(self, order: dict[str, Any]) -> Any:
        """Seconds of CPU time of the process, and of the clock, so far."""
        return [time.process_time(), time.monotonic()]


if __name__ == "__main__":
    run(Process, uvloop.run)
