"""What the Raft shell takes and tells: the state machine it replicates, its settings, its status."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from node.kernel import limits
from node.kernel.errors import BoundExceeded, ConfigError


class StateMachine(Protocol):
    """What is replicated. Called on the Raft thread only; deterministic; `apply` never raises."""

    def apply(self, command: bytes) -> str:
        """Apply one committed command; what its proposer is told."""
        ...

    def dump(self) -> bytes:
        """The whole state, for `restore`."""
        ...

    def restore(self, data: bytes) -> None:
        """Become the dumped state."""
        ...

    def ended(self, member: str) -> None:
        """The process of this member has ended, by what the network says; not replicated."""
        ...

    def connected(self, member: str) -> None:
        """A process of this member is there; not replicated."""
        ...


def _host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether "host:port" can only be reached from this machine. Names other than localhost may be anything."""
    host = _host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_problems(address: str) -> list[str]:
    host, _, port = address.rpartition(":")
    if host and port.isascii() and port.isdigit() and 0 < int(port) < 65536:
        return []
    return [f"cluster address {address!r} is not HOST:PORT with a port from 1 to 65535"]


@dataclass(frozen=True, slots=True)
class RaftSettings:
    """`peers` maps the name of every member to its address; a new folder starts from it, an old one knows better. A new
    cluster is founded once all of them are there; from then on a majority will do.

    The times suit one data centre: heartbeats every 125 ms, and a follower stands for election after 400 to 700 ms
    without one, drawn anew each time. Shorter ones find a dead leader sooner and take a leader for dead whose process
    was held up for that long. One whose process is gone is not waited for. A leader that no majority has answered for
    `quorum_lost_ms` steps down.
    """

    name: str
    listen: str
    peers: Mapping[str, str]
    folder: Path
    secret: bytes | None = field(default=None, repr=False)
    heartbeat_ms: int = 125
    election_ms_min: int = 400
    election_ms_max: int = 700
    """The first of those who wait stands for election: the later, the longer a dead leader's partitions wait."""
    succession_ms: int = 100
    """When the leader's process is gone its followers stand for election one after the other, so far apart: enough for
    the votes of the one before, and little enough that leases outlive some who can't be elected."""
    quorum_lost_ms: int = 1_000
    connection_lost_ms: int = 2_000
    reconnect_ms: int = 250
    compaction_entries: int = 10_000
    compaction_ms: int = 3_600_000
    command_bytes_max: int = limits.CLUSTER_COMMAND_BYTES_MAX
    commands_per_second_max: int = limits.CLUSTER_COMMANDS_PER_SECOND_MAX
    sync: bool = True
    """Whether log entries are synced to disk before they are acknowledged; without, a power cut may lose them."""

    @property
    def address(self) -> str:
        """What other nodes reach this one by."""
        return self.peers.get(self.name, self.listen)

    def members(self) -> dict[str, str]:
        """Address -> name, this node included."""
        return {address: name for name, address in {**self.peers, self.name: self.address}.items()}

    def check(self) -> None:
        """Raises ConfigError with one line for each mistake."""
        addresses = [self.listen, *self.peers.values()]
        problems = [problem for address in addresses for problem in address_problems(address)]
        problems += secret_problems(self.secret, addresses)
        if len(self.members()) != len({*self.peers, self.name}):
            problems.append("two nodes of the cluster have one address; give each its own")
        if len(self.members()) > limits.CLUSTER_NODES_MAX:
            problems.append(f"a cluster has at most {limits.CLUSTER_NODES_MAX} nodes that vote")
        if not 3 * self.heartbeat_ms < self.election_ms_min < self.election_ms_max <= self.connection_lost_ms:
            problems.append(
                "cluster times must keep 3 * heartbeat_ms < election_ms_min < election_ms_max <= connection_lost_ms"
            )
        if not self.heartbeat_ms < self.quorum_lost_ms:
            problems.append("quorum_lost_ms must be more than heartbeat_ms")
        if self.compaction_entries < 2 or self.compaction_ms <= 0 or self.commands_per_second_max < 1:
            problems.append("compaction_entries must be 2 or more, compaction_ms and commands_per_second_max positive")
        if not 0 < self.command_bytes_max <= limits.CLUSTER_COMMAND_BYTES_MAX:
            problems.append(f"command_bytes_max must be from 1 to {limits.CLUSTER_COMMAND_BYTES_MAX}")
        if problems:
            raise ConfigError(problems)


def secret_problems(secret: bytes | None, addresses: list[str]) -> list[str]:
    if secret is not None:
        if len(secret) < limits.CLUSTER_SECRET_BYTES_MIN:
            return [f"the cluster secret is shorter than {limits.CLUSTER_SECRET_BYTES_MIN} bytes; make a longer one"]
        return []
    open_to_others = [address for address in addresses if not is_loopback(address)]
    if not open_to_others:
        return []
    return [
        f"the cluster address {open_to_others[0]} is not loopback and there is no cluster secret: whoever reaches the "
        "port could run code on this node; give every node the same secret"
    ]


@dataclass(frozen=True, slots=True)
class RaftStatus:
    """What the Raft thread last saw; replaced as a whole. `members` maps name to address."""

    leader: str | None = None
    is_leader: bool = False
    ready: bool = False
    members: Mapping[str, str] = field(default_factory=dict)
    term: int = 0
    index: int = 0
    commit_index: int = 0


@dataclass(frozen=True, slots=True)
class RaftStatistics:
    name: str
    leader: str | None
    members: Mapping[str, str]
    ready: bool
    term: int
    index: int
    commit_index: int
    log_entries: int
    log_bytes: int
    compactions: int
    compactions_failed: int
    proposals: int
    proposals_retried: int
    proposals_failed: int
    ticks_failed: int
    strangers_refused: int


class CommandRate:
    """A token bucket that holds one second's commands."""

    def __init__(self, per_second_max: int, now_s: float) -> None:
        self._per_second_max = per_second_max
        self._tokens = float(per_second_max)
        self._filled_s = now_s

    def take(self, now_s: float) -> None:
        """Raises BoundExceeded."""
        rate = self._per_second_max
        self._tokens = min(float(rate), self._tokens + (now_s - self._filled_s) * rate)
        self._filled_s = now_s
        if self._tokens < 1:
            raise BoundExceeded(f"more than {rate} catalog commands a second on this node; ask again later")
        self._tokens -= 1
