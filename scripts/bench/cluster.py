"""Headrace nodes that are one cluster, as subprocesses on one broker, each ended by its pid."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import harness
import workload
from network import LOOPBACK, Place

READY_S_MAX = 120.0
POLL_S = 0.05
REQUEST_S_MAX = 10.0
OPERATE_S_MAX = 60.0
Found = TypeVar("Found")
Settings = Mapping[str, Mapping[str, object]]


def get(url: str, wait_s_max: float = REQUEST_S_MAX) -> Any:
    """The JSON at an address. Raises OSError."""
    with urllib.request.urlopen(url, timeout=wait_s_max) as answer:
        return json.load(answer)


class Cluster:
    """Nodes by name, in folders of their own below `folder`; the first one's watched directory is `tenants`."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        bootstrap: str,
        topic: str,
        application: str,
        settings: Settings | None = None,
        places: Mapping[str, Place] | None = None,
    ) -> None:
        """`places` says where each node runs; else all are on the loopback."""
        self.nodes: dict[str, harness.Node] = {}
        self.request_s_max = REQUEST_S_MAX
        """How long a node may take to answer before the next one is asked."""
        where = {name: (places or {}).get(name, LOOPBACK) for name in names}
        raft = {name: f"{where[name].peers_host}:{harness.free_port()}" for name in names}
        for name in names:
            port, place = harness.free_port(), where[name]
            cluster = {"listen": raft[name], "peer_listen": f"{place.peers_host}:{harness.free_port()}"}
            given = settings or {}
            own: dict[str, dict[str, object]] = {
                **{section: dict(fields) for section, fields in given.items()},
                "node": {"name": name, "data_dir": "data", **given.get("node", {})},
                "tenants": {"directory": "tenants", **given.get("tenants", {})},
                "http": {"host": place.broker_host, **given.get("http", {})},
                "cluster": {**cluster, **given.get("cluster", {})},
                # A table of its own: what config() writes as JSON is no TOML for tables.
                "cluster.peers": dict(raft),
            }
            (folder / name / "tenants").mkdir(parents=True, exist_ok=True)
            config = workload.config(folder / name / "node.toml", bootstrap, topic, port, application, own)
            self.nodes[name] = harness.Node(config, port, place.broker_host, place.prefix)

    def tenants(self, name: str) -> Path:
        """The directory that this node watches for models."""
        return self.nodes[name].config.with_name("tenants")

    def start(self, names: Sequence[str] | None = None, wait_s_max: float = READY_S_MAX) -> None:
        """Start these nodes together (a quorum makes them ready) and wait until each is."""
        chosen = [self.nodes[name] for name in names or self.nodes]
        for node in chosen:
            node.start(wait_s_max=0)
        if wait_s_max:
            self.wait(lambda: all(node.ready() or node.ended for node in chosen), "ready nodes", wait_s_max)
        for node in chosen:
            if node.ended:
                raise RuntimeError(f"a node ended while it started; its log:\n{node.log_tail()}")

    def stop(self) -> None:
        """SIGTERM to all, one after the other."""
        for node in self.nodes.values():
            node.stop()

    def kill(self) -> None:
        for node in self.nodes.values():
            node.kill()

    def ask(self, path: str, node: str = "") -> Any:
        """The JSON that this node, or the first that answers, gives."""
        failure: OSError | None = None
        for name in [node] if node else list(self.nodes):
            try:
                return get(f"{self.nodes[name].url}{path}", self.request_s_max)
            except OSError as error:
                failure = error
        raise RuntimeError(f"no node answers {path}: {failure}")

    def operate(self, command: str, *arguments: str, at: str = "", check: bool = True) -> str:
        """`headrace COMMAND ARGUMENTS` at this node, or the first that lives; the last line of what it said.

        Raises RuntimeError with all it said, unless not to `check`, and when it takes over OPERATE_S_MAX.
        """
        living = [name for name, node in self.nodes.items() if node.started and not node.ended]
        config = self.nodes[at or living[0]].config
        try:
            done = subprocess.run(
                [sys.executable, "-m", "node", command, *arguments, "--config", str(config)],
                cwd=harness.ROOT,
                env=harness.as_installed(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=OPERATE_S_MAX,
            )
        except subprocess.TimeoutExpired as failure:
            raise RuntimeError(f"headrace {command} took over {OPERATE_S_MAX} s") from failure
        if done.returncode and check:
            raise RuntimeError(f"headrace {command} {' '.join(arguments)}: {done.stdout.strip()}")
        return done.stdout.strip().rpartition("\n")[2]

    def status(self) -> dict[str, Any]:
        """The body of /v1/cluster."""
        return dict(self.ask("/v1/cluster"))

    def wait(self, condition: Callable[[], Found], what: str, wait_s_max: float = READY_S_MAX) -> Found:
        """What the condition gives once that is true; a node that can't be asked yet counts as not true.

        Raises RuntimeError with the ends of the nodes' logs after `wait_s_max`.
        """
        deadline = time.monotonic() + wait_s_max
        while True:
            with contextlib.suppress(RuntimeError):
                if found := condition():
                    return found
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {name}:\n{node.log_tail(15)}" for name, node in self.nodes.items())
                raise RuntimeError(f"{what}: not within {wait_s_max} s\n{logs}")
            time.sleep(POLL_S)

    def wait_until_settled(
        self, partitions: int, standbys: int, frames_behind_max: int, wait_s_max: float = READY_S_MAX
    ) -> None:
        self.wait(
            lambda: settled(self.status(), partitions, standbys, frames_behind_max),
            f"{partitions} partitions with an owner and {standbys} standbys",
            wait_s_max,
        )


def settled(status: Mapping[str, Any], partitions: int, standbys: int, frames_behind_max: int) -> bool:
    """Whether every partition is served by an owner, stood by for, within the lag, and not about to move."""
    held = [
        found
        for found in status["partitions"]
        if not found["move"]
        and any(copy["role"] == "owner" and copy["serving"] for copy in found["replicas"])
        and sum(stands_by(copy, frames_behind_max) for copy in found["replicas"]) >= standbys
    ]
    return bool(status["complete"]) and len(held) == partitions


def stands_by(copy: Mapping[str, Any], frames_behind_max: int) -> bool:
    """Whether this copy is a standby that lacks at most so many frames."""
    behind = copy["frames_behind"]
    return copy["role"] == "standby" and behind is not None and behind <= frames_behind_max


def owners(status: Mapping[str, Any]) -> dict[int, str]:
    """Partition -> name of the node that owns it; '' for nobody."""
    return {found["number"]: found["owner"] for found in status["partitions"]}


def live_models(url: str) -> set[str]:
    """ "tenant/model" of those that a node calls live."""
    found = get(f"{url}/v1/models")["models"]
    return {f"{one['tenant']}/{one['model']}" for one in found if one["state"] == "live"}


def wait_for_models(nodes: Iterable[harness.Node], count: int, wait_s_max: float) -> None:
    """Until so many models are live on each of the nodes."""
    deadline = time.monotonic() + wait_s_max
    for node in nodes:
        while len(live_models(node.url)) < count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {count} live models within {wait_s_max} s; the log:\n{node.log_tail()}")
            time.sleep(POLL_S)


def standbys(status: Mapping[str, Any]) -> dict[int, list[str]]:
    """Partition -> names of the nodes that stand by for its owner."""
    return {
        found["number"]: [copy["node"] for copy in found["replicas"] if copy["role"] == "standby"]
        for found in status["partitions"]
    }


@contextlib.contextmanager
def running(
    folder: Path,
    names: Sequence[str],
    bootstrap: str,
    topic: str,
    application: str,
    settings: Settings | None = None,
    models: bool = True,
) -> Iterator[Cluster]:
    """A ready cluster, with the standard models dropped at its first node; killed at the end."""
    cluster = Cluster(folder, names, bootstrap, topic, application, settings)
    if models:
        workload.models(cluster.tenants(names[0]))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()
