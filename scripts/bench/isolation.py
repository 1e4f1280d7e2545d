"""A node under hostile and broken models, and a node with 200 models of 50 tenants.

The hostile suite (`hostile.py`): groups of hostile tenants share a node with two honest ones. A case is contained when
its attack is stopped and told where its tenant reads, nothing outside was reached, nothing of it runs on, the node is
the same process and ready, and each honest tenant has exactly one right inference for every event.
The crowd: how long the node takes to run all of the models, what each tenant's worker takes of memory that it shares
with nobody, and what the workers cost while no event comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import hostile
import hostile_making
import hostile_watch
import numpy as np
import workload

AIMS = {
    "contained": f">= {len(hostile.CASES)}",
    "hostile_models": ">= 30",
    "mb_per_tenant": "<= 25",
    "idle_cpu_s": "<= 0.1",
}
HONEST = {"steady": 2.0, "other": 3.0}
"""Tenant -> weight of the amount in its model, whose output is that product plus 1."""
GROUP = 6
EVENTS_BEFORE, EVENTS_AFTER = 20, 60
WAIT_S_MAX, PATIENT_S_MAX = 60.0, 300.0
POLL_S = 0.05
SECRET = "HEADRACE_BENCH_SECRET"
TENANTS = 50
CROWD_EVENTS = 400
SETTLE_S, IDLE_S = 15.0, 30.0
"""Before the idle time begins, the node measures the memory of workers that have done something."""
MIB = 1 << 20


@dataclass(slots=True)
class Feed:
    """The events of one node and what it made of them. Amounts count up, so each names its event."""

    address: str
    application: str
    sent: list[float] = field(default_factory=list)
    found: dict[str, Counter[float]] = field(default_factory=dict)
    """Tenant -> outputs."""
    _next: dict[int, int] = field(default_factory=dict)

    def send(self, amounts: Sequence[float]) -> None:
        asyncio.run(self._send(amounts))
        self.sent += amounts

    async def _send(self, amounts: Sequence[float]) -> None:
        from aiokafka import AIOKafkaProducer

        producer = AIOKafkaProducer(bootstrap_servers=self.address, acks="all")
        async with asyncio.timeout(WAIT_S_MAX):
            await producer.start()
            try:
                sent = []
                for number, amount in enumerate(amounts, start=len(self.sent)):
                    customer = number % 40
                    event = {
                        "type": "transaction",
                        "customer": f"c{customer:05d}",
                        "time": workload.FIRST_TIME_MS + 1000 * number,
                        "amount": amount,
                    }
                    partition = workload.partition_of(customer)
                    sent.append(await producer.send("events", json.dumps(event).encode(), partition=partition))
                await asyncio.gather(*sent)
            finally:
                await producer.stop()

    def read(self) -> None:
        asyncio.run(self._read())

    async def _read(self) -> None:
        from aiokafka import AIOKafkaConsumer, TopicPartition

        consumer = AIOKafkaConsumer(bootstrap_servers=self.address, isolation_level="read_committed")
        places = [TopicPartition(f"{self.application}.inferences", number) for number in range(workload.PARTITIONS)]
        async with asyncio.timeout(WAIT_S_MAX):
            await consumer.start()
            try:
                ends = await consumer.end_offsets(places)
                consumer.assign(places)
                for place in places:
                    consumer.seek(place, self._next.get(place.partition, 0))
                while any([await consumer.position(place) < ends[place] for place in places]):
                    for place, records in (await consumer.getmany(timeout_ms=100)).items():
                        for record in records:
                            self._take(json.loads(record.value))
                        self._next[place.partition] = records[-1].offset + 1
            finally:
                await consumer.stop()

    def _take(self, inference: dict[str, Any]) -> None:
        self.found.setdefault(inference["tenant"], Counter())[round(inference["outputs"]["score"], 6)] += 1

    def wrong(self, tenant: str, weight: float) -> str:
        """How the tenant's outputs differ from one right inference an event; '' when they do not."""
        expected = Counter(round(weight * amount + 1, 6) for amount in self.sent)
        found = self.found.get(tenant, Counter())
        if found == expected:
            return ""
        return f"{tenant}: {(expected - found).total()} missing, {(found - expected).total()} wrong or doubled"


# --- the hostile suite ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Attack:
    """One case as it runs: its tenant, what it is aimed at and what was found."""

    case: hostile_making.Case
    tenant: str
    aims: hostile_watch.Aims
    problems: list[str] = field(default_factory=list)


class Arena:
    """A node with honest tenants."""

    def __init__(self, node: harness.Node, feed: Feed, folder: Path) -> None:
        self.node = node
        self.feed = feed
        self.folder = folder
        self.tenants = folder / "tenants"
        self.late_s = 0.0
        """How long an honest tenant's first model took to be live beside models that load for ever."""
        self._numbers = iter(range(1, 1 << 30))

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.node.url + path, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def workers(self) -> list[int]:
        """Processes below the warm server, which is below the node."""
        return [worker for server in children(self.node.pid) for worker in children(server)]

    def settle_honest(self) -> None:
        for tenant, weight in HONEST.items():
            hostile_making.pair(self.tenants / tenant, hostile_making.stored(hostile_making.linear(weight, offset=1.0)))
        _until(lambda: all(self.state(tenant) == "live" for tenant in HONEST), WAIT_S_MAX, "the honest tenants live")
        self.send(EVENTS_BEFORE)
        _until(lambda: len(self.workers()) == len(HONEST), WAIT_S_MAX, "a worker of each honest tenant")

    def state(self, tenant: str, model: str = hostile_making.MODEL) -> str:
        try:
            told = json.loads((self.tenants / tenant / f"{model}.status.json").read_text())
        except (OSError, ValueError):
            return ""
        return str(told["state"])

    def send(self, count: int) -> None:
        amounts = [1000.0 + next(self._numbers) for _ in range(count)]
        self.feed.send(amounts)

    def honest_wrong(self) -> list[str]:
        """Waits until they have answered; what is still wrong then."""

        def wrong() -> list[str]:
            self.feed.read()
            return [text for tenant, weight in HONEST.items() if (text := self.feed.wrong(tenant, weight))]

        with contextlib.suppress(TimeoutError):
            _until(lambda: not wrong(), WAIT_S_MAX, "the honest tenants' outputs")
        return wrong()

    def attack(self, cases: Sequence[hostile_making.Case], patient: bool) -> list[Attack]:
        """Run the cases as tenants side by side, and take them away again."""
        with contextlib.ExitStack() as stack:
            attacks = [self._dropped(case, stack) for case in cases]
            seconds = PATIENT_S_MAX if patient else WAIT_S_MAX
            if patient:
                self.late_s = self._newcomer()
            _quietly(lambda: all(self._taken(attack) for attack in attacks), seconds)
            self.send(EVENTS_BEFORE)
            self.feed.send([hostile_making.TRIGGER])
            self.send(EVENTS_AFTER)
            _quietly(lambda: all(self._told(attack) for attack in attacks), seconds)
            for attack in attacks:
                self._judge(attack)
            shared = self.honest_wrong()
            for attack in attacks:
                self._remove(attack)
            shared += self._left()
            for attack in attacks:
                attack.problems += shared
        return attacks

    def _newcomer(self) -> float:
        trials = len(HONEST) + 2
        _quietly(lambda: len(self.workers()) >= trials, WAIT_S_MAX)
        began = time.monotonic()
        place = self.tenants / "late"
        hostile_making.pair(place, hostile_making.stored(hostile_making.linear(1.0)))
        _quietly(lambda: self.state("late") == "live", PATIENT_S_MAX)
        taken_s = time.monotonic() - began
        shutil.rmtree(place)
        return round(taken_s, 2)

    def _dropped(self, case: hostile_making.Case, stack: contextlib.ExitStack) -> Attack:
        tenant = f"h{next(self._numbers):05d}"
        folder = self.folder / "aims" / tenant
        folder.parent.mkdir(exist_ok=True)
        aims = stack.enter_context(hostile_watch.aims(folder))
        place = self.tenants / tenant
        case.write(place, aims.target(self.node.pid, tuple(self.workers()), SECRET))
        aims.note()
        if not place.is_symlink():
            with contextlib.suppress(FileExistsError):
                settings = os.open(place / "tenant.toml", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                os.write(settings, b"memory_mb = 256\n")
                os.close(settings)
        return Attack(case, tenant, aims)

    def _taken(self, attack: Attack) -> bool:
        """Whether the node has said what becomes of the pair, and its model would get the next event."""
        if attack.case.told == "ignored":
            return True
        if attack.case.told == "refused":
            return self.state(attack.tenant) == "refused"
        return self.state(attack.tenant) == "live"

    def _told(self, attack: Attack) -> bool:
        case, tenant = attack.case, attack.tenant
        match case.told:
            case "printed":
                return any(hostile_making.BLOCKED in line for line in self._printed(tenant))
            case "failed":
                return self._failed(tenant) > 0
            case "lost":
                return any(one["tenant"] == tenant and one["restarts"] for one in self.get("/v1/status")["tenants"])
            case "ignored":
                return self.state(tenant) != "live"
            case _:
                return self.state(tenant) == case.told

    def _failed(self, tenant: str) -> int:
        partitions = self.get("/v1/status")["partitions"]
        return sum(one["counters"].get(f"failed {tenant}/{hostile_making.MODEL}", 0) for one in partitions)

    def _printed(self, tenant: str) -> list[str]:
        try:
            return [line["text"] for line in self.get(f"/v1/tenants/{tenant}/log")["lines"]]
        except urllib.error.HTTPError:
            return []

    def _judge(self, attack: Attack) -> None:
        if not self._taken(attack):
            attack.problems.append(f"its state is {self.state(attack.tenant)!r}")
        if not self._told(attack):
            attack.problems.append(f"not {attack.case.told} where its tenant reads")
        attack.problems += [line for line in self._printed(attack.tenant) if hostile_making.REACHED in line]
        attack.problems += attack.aims.reached()

    def _remove(self, attack: Attack) -> None:
        place = self.tenants / attack.tenant
        if place.is_symlink():
            place.unlink()
        else:
            shutil.rmtree(place)

    def _left(self) -> list[str]:
        """What runs on of tenants that are gone, and what became of the node."""
        _quietly(lambda: len(self.workers()) <= len(HONEST) and not _strangers(), WAIT_S_MAX)
        found = []
        if len(self.workers()) > len(HONEST):
            found.append(f"{len(self.workers()) - len(HONEST)} workers too many")
        if strangers := _strangers():
            found.append(f"processes of workers' users that no node knows: {strangers}")
        if self.node.ended:
            found.append("the node has ended")
        elif not self.node.ready():
            found.append("the node is not ready")
        return found


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(") ")[2].split()[1]) == pid:
                    found.append(int(entry.name))
    return found


def _strangers() -> list[int]:
    """Processes of the user ids that workers get (where a node runs as root) that no warm server has forked."""
    from node.kernel.limits import TENANTS_MAX
    from tenants.sandbox import OWN_USER_FIRST

    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if OWN_USER_FIRST <= entry.stat().st_uid < OWN_USER_FIRST + TENANTS_MAX:
                    parent = (entry / "stat").read_text().rpartition(") ")[2].split()[1]
                    if b"tenants.warm_server" not in Path(f"/proc/{parent}/cmdline").read_bytes():
                        found.append(int(entry.name))
    return found


def _until(condition: Callable[[], bool], seconds_max: float, what: str) -> None:
    deadline = time.monotonic() + seconds_max
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not in {seconds_max:g} s")
        time.sleep(POLL_S)


def _quietly(condition: Callable[[], bool], seconds_max: float) -> None:
    """Wait for it; whether it came about is judged afterwards."""
    with contextlib.suppress(TimeoutError):
        _until(condition, seconds_max, "")


def _groups(cases: Sequence[hostile_making.Case]) -> Iterator[tuple[Sequence[hostile_making.Case], bool]]:
    ordinary = [case for case in cases if not case.patient]
    for first in range(0, len(ordinary), GROUP):
        yield ordinary[first : first + GROUP], False
    patient = [case for case in cases if case.patient]
    if patient:
        yield [*patient, *(case for case in patient if case.at_load)], True  # twice: as many as there are trial slots


def suite(folder: Path, address: str, cases: Sequence[hostile_making.Case]) -> dict[str, Any]:
    os.environ[SECRET] = "x"
    port = harness.free_port()
    config = _config(
        folder / "hostile", address, port, {"allow_globals": list(hostile_making.ALLOW_GLOBALS), "rescan_s": 1}
    )
    attacks: list[Attack] = []
    with harness.running_node(config, port) as node:
        arena = Arena(node, Feed(address, "hostile"), config.parent)
        arena.settle_honest()
        for group, patient in _groups(cases):
            began = time.monotonic()
            attacks += arena.attack(group, patient)
            names = ", ".join(case.name for case in group)
            print(f"{time.monotonic() - began:.1f} s: {names}", file=sys.stderr, flush=True)
            for attack in attacks[-len(group) :]:
                if attack.problems:
                    print(f"  {attack.case.name}: {attack.problems[:4]}", file=sys.stderr, flush=True)
        events = len(arena.feed.sent)
    problems: dict[str, list[str]] = {}
    for attack in attacks:
        problems.setdefault(attack.case.name, []).extend(attack.problems[:8])
    stopped_by = {case.name: case.stopped_by for case in cases}
    return {
        "contained": sum(not found for found in problems.values()),
        "cases": {name: found or stopped_by[name] for name, found in problems.items()},
        "live_beside_endless_loads_s": arena.late_s,
        "honest_inferences_right": events * len(HONEST),
    }


# --- the crowd ------------------------------------------------------------------------------------------------------


def _crowd_models() -> list[bytes]:
    """Of the kinds that tenants send: two linear, one scaled, one of trees; ten columns each."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, labels = workload.training_rows(np.random.default_rng(workload.SEED))
    rows, labels = rows[:2000] / np.abs(rows).max(axis=0), labels[:2000]
    made = (
        LogisticRegression(max_iter=1000),
        LogisticRegression(max_iter=1000, C=0.1),
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        HistGradientBoostingClassifier(max_iter=30, random_state=1),
    )
    return [hostile_making.stored(model.fit(rows, labels)) for model in made]


def crowd(folder: Path, address: str, tenants: int) -> dict[str, Any]:
    port = harness.free_port()
    config = _config(folder / "crowd", address, port, {})
    models = _crowd_models()
    manifest = workload.manifest("transaction")
    for number in range(tenants):
        for place, model in enumerate(models):
            hostile_making.pair(config.parent / "tenants" / f"t{number:02d}", model, manifest, f"m{place}")
    names = [(f"t{number:02d}", f"m{place}") for number in range(tenants) for place in range(len(models))]
    found: dict[str, Any] = {"tenants": tenants, "models": len(names)}
    for start in ("first_start", "restart"):
        began = time.monotonic()
        with harness.running_node(config, port) as node:
            found[f"{start}_ready_s"] = round(time.monotonic() - began, 2)
            arena = Arena(node, Feed(address, "crowd"), config.parent)
            _all_run(arena, names)
            found[f"{start}_s"] = round(time.monotonic() - began, 2)
            if start == "restart":
                found.update(_memory(arena))
                time.sleep(SETTLE_S)
                before = node.cpu()
                time.sleep(IDLE_S)
                spent = node.cpu() - before
                found["idle_cpu_s"] = round(spent.below_s, 3)
                found["idle_node_cpu_s"] = round(spent.own_s, 3)
    return found


def _all_run(arena: Arena, names: Sequence[tuple[str, str]]) -> None:
    """Wait until every model is live and has answered rows."""
    _until(lambda: all(arena.state(*name) == "live" for name in names), PATIENT_S_MAX, "all models live")
    arena.send(CROWD_EVENTS)
    _until(lambda: _answered(arena, names), PATIENT_S_MAX, "rows answered by every model")


def _answered(arena: Arena, names: Sequence[tuple[str, str]]) -> bool:
    models = arena.get("/v1/models")["models"]
    done = {(one["tenant"], one["model"]) for one in models if one["cost"]["rows"] and not one["cost"]["rows_queued"]}
    return done >= set(names)


def _memory(arena: Arena) -> dict[str, Any]:
    """MiB of each worker that no other process shares, and its part of what is shared, by the kernel's figures."""
    servers = children(arena.node.pid)
    private, proportional = [], []
    for pid in arena.workers():
        figures = _rollup(pid)
        private.append(sum(value for name, value in figures.items() if name.startswith("Private_")) / 1024)
        proportional.append(figures["Pss"] / 1024)
    return {
        "mb_per_tenant": round(statistics.mean(private), 2),
        "mb_per_tenant_max": round(max(private), 2),
        "pss_mb_per_tenant": round(statistics.mean(proportional), 2),
        "warm_server_rss_mb": round(sum(_rollup(pid)["Rss"] for pid in servers) / 1024, 1),
    }


def _rollup(pid: int) -> dict[str, int]:
    """KiB by name."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


# --- both -----------------------------------------------------------------------------------------------------------


def _config(folder: Path, address: str, port: int, tenants: dict[str, object]) -> Path:
    (folder / "tenants").mkdir(parents=True)
    for place in (folder.parent, folder):
        place.chmod(0o755)  # the sandbox is what is tested, not the folder's mode
    settings: dict[str, dict[str, object]] = {
        "cycle": {"commit_interval_ms": 20, "inference_deadline_ms": 500},
        "tenants": {"directory": "tenants", "settle_ms": 50, **tenants},
    }
    return workload.config(folder / "node.toml", address, "events", port, folder.name, settings)


def main(quick: bool) -> harness.Result:
    cases = hostile.named(hostile.QUICK) if quick else hostile.CASES
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder = Path(name)
        with harness.broker(folder / "kafka") as broker:
            asyncio.run(workload.create_topic(broker.address, "events"))
            attacked = suite(folder, broker.address, cases)
            crowded = crowd(folder, broker.address, 5 if quick else TENANTS)
    values = {
        "contained": attacked.pop("contained"),
        "hostile_models": len(cases),
        "mb_per_tenant": crowded["mb_per_tenant"],
        "idle_cpu_s": crowded["idle_cpu_s"],
    }
    return harness.Result(values, {"hostile": attacked, "crowd": crowded, "idle_s": IDLE_S})
