"""A network of this bench's own: each node in a network namespace, with one link to its peers and one to the broker.

Two bridges here, and for each node two veth pairs: a node can be cut off from its peers while it still reaches Kafka,
or the other way round, or from both. A cut takes the link off its bridge, so packets vanish without a word, as when a
switch dies. Needs root. Everything has this process's number in its name and is removed at the end, also when the bench
fails; what one that was killed left behind is removed by the next.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

IP_S_MAX = 20.0
SUBNETS = {"peers": "198.18", "broker": "198.19"}
"""Set aside for benchmarks of networks (RFC 2544): nobody's hosts are there."""
OURS = re.compile(r"hr([0-9]+)[pbn]")


class NoNetwork(Exception):
    """Namespaces can't be made here; the message is what `ip` said."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node runs: its address among its peers, the one that broker and clients see, and its namespace."""

    name: str
    peers_host: str
    broker_host: str
    links: Mapping[str, str]
    """"peers" and "broker" -> this side's end of the link; none on the loopback."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """Put before a command, it becomes the command inside."""
        return ("ip", "netns", "exec", self.name) if self.name else ()


LOOPBACK = Place("", "127.0.0.1", "127.0.0.1", {})


class Network:
    def __init__(self, nodes: Sequence[str]) -> None:
        pid = os.getpid()
        self._tag = f"hr{pid}"
        self._octet = pid % 250 + 1
        self.broker_host = f"{SUBNETS['broker']}.{self._octet}.1"
        """This machine's address that all nodes reach: for the broker to listen on."""
        self._bridges = {"peers": f"{self._tag}p", "broker": f"{self._tag}b"}
        self.places = {
            name: Place(
                f"{self._tag}n{number}",
                f"{SUBNETS['peers']}.{self._octet}.{number + 10}",
                f"{SUBNETS['broker']}.{self._octet}.{number + 10}",
                {kind: f"{bridge}{number}" for kind, bridge in self._bridges.items()},
            )
            for number, name in enumerate(nodes)
        }
        self._cut: set[tuple[str, str]] = set()

    def make(self) -> None:
        for kind, bridge in self._bridges.items():
            ip("link", "add", bridge, "type", "bridge")
            ip("addr", "add", f"{SUBNETS[kind]}.{self._octet}.1/24", "dev", bridge)
            ip("link", "set", bridge, "up")
        for place in self.places.values():
            ip("netns", "add", place.name)
            ip("-n", place.name, "link", "set", "lo", "up")
            for kind, link in place.links.items():
                host = place.peers_host if kind == "peers" else place.broker_host
                ip("link", "add", link, "type", "veth", "peer", "name", kind, "netns", place.name)
                ip("link", "set", link, "master", self._bridges[kind], "up")
                ip("-n", place.name, "addr", "add", f"{host}/24", "dev", kind)
                ip("-n", place.name, "link", "set", kind, "up")

    def cut(self, node: str, kinds: Sequence[str]) -> None:
        """Let nothing of this node pass any more."""
        for kind in kinds:
            self._cut.add((node, kind))
            ip("link", "set", self.places[node].links[kind], "nomaster")

    def mend(self, node: str) -> None:
        for kind in [kind for name, kind in sorted(self._cut) if name == node]:
            ip("link", "set", self.places[node].links[kind], "master", self._bridges[kind])
            self._cut.discard((node, kind))

    def remove(self) -> None:
        """All of it, whatever is there; processes inside have to be ended before."""
        remove(self._tag)


def ip(*arguments: str) -> None:
    """Raises NoNetwork."""
    try:
        done = subprocess.run(
            ["ip", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=IP_S_MAX
        )
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise NoNetwork(f"ip {' '.join(arguments)}: {failure}") from failure
    if done.returncode:
        raise NoNetwork(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def remove(tag: str) -> None:
    for name in _names(Path("/run/netns"), tag):
        with contextlib.suppress(NoNetwork):
            ip("netns", "del", name)
    for name in _names(Path("/sys/class/net"), tag):
        with contextlib.suppress(NoNetwork):
            ip("link", "del", name)


def _names(folder: Path, tag: str) -> list[str]:
    return sorted(name for name in _listed(folder) if re.fullmatch(rf"{tag}[pbn][0-9]*", name))


def _listed(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.exists() else []


def remove_left_over() -> None:
    """What benches left that are no more."""
    names = [*_listed(Path("/run/netns")), *_listed(Path("/sys/class/net"))]
    for pid in {found[1] for name in names if (found := OURS.match(name))}:
        if not Path(f"/proc/{pid}").exists():
            remove(f"hr{pid}")


@contextlib.contextmanager
def network(nodes: Sequence[str]) -> Iterator[Network]:
    """Raises NoNetwork where this user may not make one."""
    remove_left_over()
    made = Network(nodes)
    try:
        made.make()
        yield made
    finally:
        made.remove()
