"""A node of a Raft cluster as a process of its own: settings as JSON in argv, orders and answers as JSON lines.

Its state machine is a map of keys to values. Every command has an id, and one seen before changes nothing, so that
a command proposed twice counts once: `duplicates` says how many there were.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from order_lines import run

from replication.catalog_raft import CatalogRaft
from replication.raft_types import RaftSettings


class KeyValues:
    """`state` is replaced as a whole; its dictionary only grows, and only the Raft thread changes it."""

    def __init__(self) -> None:
        self.state: tuple[int, dict[str, Any], frozenset[str]] = (0, {}, frozenset())
        self.duplicates = 0
        self.gone: frozenset[str] = frozenset()

    def apply(self, command: bytes) -> str:
        """The number of the command."""
        order = json.loads(command)
        number, values, seen = self.state
        if order["id"] in seen:
            self.duplicates += 1
        else:
            values[order["key"]] = order["value"]
            seen = seen if order.get("bulk") else seen | {order["id"]}
        self.state = (number + 1, values, seen)
        return str(number + 1)

    def dump(self) -> bytes:
        number, values, seen = self.state
        return json.dumps([number, values, sorted(seen)]).encode()

    def ended(self, member: str) -> None:
        self.gone |= {member}

    def connected(self, member: str) -> None:
        self.gone -= {member}

    def restore(self, data: bytes) -> None:
        number, values, seen = json.loads(data)
        self.state = (number, values, frozenset(seen))


def settings_of(given: dict[str, Any]) -> RaftSettings:
    secret = given.pop("secret", None)
    return RaftSettings(**given | {"folder": Path(given["folder"]), "secret": secret.encode() if secret else None})


class Process:
    def __init__(self, given: dict[str, Any]) -> None:
        self.machine = KeyValues()
        self.changes = 0
        self.raft = CatalogRaft(settings_of(given), self.machine, self.changed)

    async def start(self) -> None:
        await self.raft.start()

    async def stop(self) -> None:
        await self.raft.stop()

    def changed(self) -> None:
        self.changes += 1

    async def propose(self, order: dict[str, Any]) -> Any:
        return int(await self.raft.propose(json.dumps(order["command"], ensure_ascii=False).encode(), order["wait_s"]))

    async def bulk(self, order: dict[str, Any]) -> Any:
        """Many keys, sixteen at a time; the number done."""

        async def some(first: int) -> None:
            for number in range(first, order["count"], 16):
                command = {"id": "", "key": f"{order['prefix']}{number}", "value": number, "bulk": True}
                await self.raft.propose(json.dumps(command).encode(), order["wait_s"])

        await asyncio.gather(*(some(first) for first in range(16)))
        return order["count"]

    async def latency(self, order: dict[str, Any]) -> Any:
        """Milliseconds of each of `count` commands or barriers, one after the other."""
        taken = []
        for number in range(order["count"]):
            begun = time.perf_counter()
            if order.get("barrier"):
                await self.raft.read_barrier()
            else:
                await self.propose({"command": {"id": "", "key": "k", "value": number, "bulk": True}, "wait_s": 5})
            taken.append((time.perf_counter() - begun) * 1000)
        return taken

    async def barrier(self, order: dict[str, Any]) -> Any:
        return await self.raft.read_barrier(order["wait_s"])

    async def ready(self, order: dict[str, Any]) -> Any:
        return await self.raft.wait_ready(order["wait_s"])

    async def get(self, order: dict[str, Any]) -> Any:
        return self.machine.state[1].get(order["key"])

    async def count(self, order: dict[str, Any]) -> Any:
        return sum(1 for key in list(self.machine.state[1]) if key.startswith(order["prefix"]))

    async def join(self, order: dict[str, Any]) -> Any:
        return await self.raft.join(order["name"], order["address"])

    async def leave(self, order: dict[str, Any]) -> Any:
        return await self.raft.leave(order["name"])

    async def status(self, order: dict[str, Any]) -> Any:
        statistics = self.raft.statistics()
        return {
            **{name: getattr(statistics, name) for name in statistics.__slots__},
            "is_leader": self.raft.is_leader,
            "duplicates": self.machine.duplicates,
            "changes": self.changes,
            "cpu_s": time.process_time(),
            "repr": repr(self.raft.settings),
        }


if __name__ == "__main__":
    run(Process)
