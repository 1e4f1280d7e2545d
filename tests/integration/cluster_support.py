"""Whole clusters for tests: node processes as one cluster on a real broker, broken and mended by pid."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from node_support import Kafka, Node, event, harness, linear, wait_until

NAMES = ("n1", "n2", "n3")
COMMAND_S_MAX = 60
FRAMES_BEHIND_MAX = 5
SUMS = {"amount": "event.amount", "spent": "sum(transaction.amount, '30d')"}
"""Features of shop/spend: an inference is its event's amount and the customer's sum so far."""


class Cluster:
    """Nodes n1, n2… on one topic; none is started yet. `settings` are more of [cluster]."""

    def __init__(
        self, folder: Path, kafka: Kafka, topic: str, partitions: int, application: str, **settings: object
    ) -> None:
        self.kafka = kafka
        self.topic = topic
        self.partitions = partitions
        self.application = application
        self._settings = settings
        self._folder = folder
        self._secret = folder / "secret"
        self._secret.write_text("a secret of the test's own")
        self._raft: dict[str, str] = {}
        self.nodes: dict[str, Node] = {}

    def make(self, *names: str) -> None:
        """Write the nodes' configs: each lists these and all made before as peers."""
        self._raft |= {name: f"127.0.0.1:{harness.free_port()}" for name in names}
        for name in names:
            cluster = {
                "listen": self._raft[name],
                "peer_listen": f"127.0.0.1:{harness.free_port()}",
                "secret_file": str(self._secret),
                "snapshot_interval_s": 2,
                **self._settings,
            }
            self.nodes[name] = Node(
                self._folder / name,
                self.kafka,
                [self.topic],
                self.application,
                node={"name": name, "data_dir": "data"},
                cluster=cluster,
                cluster__peers=dict(self._raft),
            )

    def start(self, *names: str) -> None:
        """Start these nodes, or all, and wait until each is ready."""
        chosen = [self.nodes[name] for name in names or self.nodes]
        for node in chosen:
            node.start(wait_s_max=0)
        for node in chosen:
            wait_until(lambda node=node: node.ready() or node.ended, f"{node.config} ready")  # type: ignore[misc]
            assert not node.ended, node.log_tail()

    def kill(self) -> None:
        for node in self.nodes.values():
            node.kill()

    # what it says

    def living(self) -> list[str]:
        return [name for name, node in self.nodes.items() if node.started and not node.ended]

    def status(self) -> dict[str, Any]:
        """/v1/cluster of the first node that answers with what the leader knows; empty when none does."""
        for name in self.living():
            with contextlib.suppress(OSError):
                found = self.nodes[name].get("/v1/cluster")
                if found["complete"]:
                    return found
        return {}

    def owners(self) -> dict[int, str]:
        """Partition -> owner that has it open and stays; empty while one has none."""
        found = {one["number"]: one["owner"] for one in self.status().get("partitions", ()) if serves(one)}
        return found if len(found) == self.partitions else {}

    def settle(self, standbys: int = 1) -> dict[int, str]:
        """Wait until each partition is open at its owner, and stood by for by so many that lag little; the owners."""

        def settled() -> dict[int, str]:
            partitions = self.status().get("partitions", ())
            fit = [one for one in partitions if serves(one) and caught_up(one) >= standbys]
            return {one["number"]: one["owner"] for one in fit} if len(fit) == self.partitions else {}

        try:
            return wait_until(settled, "a settled cluster")
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{json.dumps(self.status(), indent=1)[:6000]}\n{self.logs()}") from None

    def logs(self) -> str:
        return "\n".join(f"--- {name}\n{node.log_tail(12)}" for name, node in self.nodes.items())

    def headrace(self, *arguments: str, at: str = "", code: int = 0) -> str:
        """What a command prints, asked by the config of a living node; its exit code has to be `code`."""
        config = self.nodes[at or self.living()[0]].config
        done = subprocess.run(
            [sys.executable, "-m", "node", *arguments, "--config", str(config)],
            cwd=harness.ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
        )
        assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout + done.stderr

    def inferences(self, count: int, model: str = "spend") -> list[dict[str, Any]]:
        """All committed inferences of the model, once they are at least so many."""

        def committed() -> list[dict[str, Any]]:
            found = self.kafka.inferences(self.application, self.partitions)
            return [one for one in found if one["model"] == model]

        try:
            return wait_until(lambda: found if len(found := committed()) >= count else [], f"{count} inferences")
        except AssertionError as failure:
            there = f"{len(committed())} of {count} inferences are there"
            said = json.dumps(self.status(), indent=1)[:6000]
            raise AssertionError(f"{str(failure)[:200]}; {there}\n{said}\n{self.logs()}") from None


def lose_disk(node: Node) -> None:
    """Away at once: what inspects a copy outlives a killed node for a moment, and would be in the way of deleting."""
    lost = len(list(node.folder.glob("lost-*")))
    (node.folder / "data").rename(node.folder / f"lost-{lost}")


def serves(partition: Mapping[str, Any]) -> bool:
    """Whether it is open at its owner, and not about to move."""
    return not partition["move"] and any(one["role"] == "owner" and one["serving"] for one in partition["replicas"])


def caught_up(partition: Mapping[str, Any]) -> int:
    """How many standbys lag little."""
    behind = [one["frames_behind"] for one in partition["replicas"] if one["role"] == "standby"]
    return sum(frames is not None and frames <= FRAMES_BEHIND_MAX for frames in behind)


class Load:
    """Events of a few customers, sent without a break while it is entered; `events` are all that were sent."""

    EVERY_S = 0.05
    EVENTS = 20

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.events: list[dict[str, Any]] = []
        self._ending = threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Load:
        self._ending.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        assert self._thread is not None
        self._thread.join()
        assert self._failure is None, self._failure

    def send(self, count: int) -> None:
        first = len(self.events)
        events = [event(f"c{number % 50}", number) for number in range(first, first + count)]
        self._cluster.kafka.produce(self._cluster.topic, events, self._cluster.partitions)
        self.events += events

    def _run(self) -> None:
        try:
            while not self._ending.wait(self.EVERY_S):
                self.send(self.EVENTS)
        except Exception as failure:
            self._failure = failure

    def check(self) -> None:
        """Exactly one inference for each event sent, each its amount and the customer's sum so far."""
        sums: Counter[str] = Counter()
        expected = []
        for one in self.events:
            sums[one["customer"]] += one["amount"]
            expected.append((one["customer"], one["time"], one["amount"] + sums[one["customer"]]))
        inferences = self._cluster.inferences(len(expected))
        found = [(one["customer"], one["time"], one["outputs"]["score"]) for one in inferences]
        twice = [trigger for trigger, count in Counter(found).items() if count > 1]
        assert sorted(found) == sorted(expected), f"{len(twice)} twice, such as {twice[:3]}\n{self._cluster.logs()}"


@contextlib.contextmanager
def running(
    folder: Path,
    kafka: Kafka,
    topic: str,
    partitions: int,
    application: str,
    names: Sequence[str] = NAMES,
    **settings: object,
) -> Iterator[Cluster]:
    """A ready cluster, the model shop/spend dropped at its first node and live on all; killed at the end."""
    from node_support import drop

    cluster = Cluster(folder, kafka, topic, partitions, application, **settings)
    cluster.make(*names)
    drop(cluster.nodes[names[0]].models, "shop/spend", linear(1, 1), SUMS)
    try:
        cluster.start()
        cluster.nodes[names[0]].live("shop/spend")
        yield cluster
    finally:
        for node in cluster.nodes.values():
            with contextlib.suppress(RuntimeError):
                node.resume()
        cluster.kill()
