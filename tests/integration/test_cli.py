"""The command line as its users run it: a process of its own, against real files and a real HTTP server."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from http_support import MemoryView

from node.config import HttpSection
from node.kernel.clock import ManualClock
from node.kernel.errors import NotFound
from node.kernel.limits import HTTP_MODELS_MAX
from node.kernel.types import ModelName
from node.serving.cluster import (
    ClusterAgreement,
    ClusterMember,
    ClusterModel,
    ClusterMove,
    ClusterPartition,
    ClusterRefusal,
    ClusterReplica,
    ClusterStatus,
)
from node.serving.server import HttpServer
from node.serving.view import (
    AsOf,
    BacklogStatus,
    CustomerFeatures,
    CustomerInferences,
    CustomerState,
    ModelCost,
    ModelInfo,
    Models,
    NodeStatus,
    PartitionStatus,
    SharedFeatures,
    TenantShare,
    TenantStatus,
    Waiting,
)

ROOT = Path(__file__).parents[2]
GOOD = '[events]\ntypes = ["search"]\n[events.fields]\namount = "number"\n'
CLUSTER = """
[node]
name = "n1"
[cluster]
listen = "127.0.0.1:7100"
peers = { n1 = "127.0.0.1:7100" }
peer_listen = "127.0.0.1:7101"
"""
SECONDS_MAX = 30


class Ran(NamedTuple):
    code: int | None
    out: str
    err: str


async def headrace(*arguments: str) -> Ran:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "node", *arguments),
        cwd=ROOT,
        env={**os.environ, "http_proxy": "http://127.0.0.1:9", "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), SECONDS_MAX)
    return Ran(process.returncode, out.decode(), err.decode())


WAITING = Waiting(rows=1_040, seconds=75.04, bytes=9, shed={"overload": 1_200, "age": 3})


class OneNode:
    """A node to look at: partition 0 runs, partition 1 waits."""

    def status(self) -> NodeStatus:
        counters = {"events": 1_234_567, "late": 8, "dead_letters not_json": 3, "dead_letters too_deep": 4}
        backlog = {"shop/bid": BacklogStatus(rows=40, chunks=2, oldest_ms=9), "ads/click": BacklogStatus(2, 1, 5)}
        return NodeStatus(
            node="mill",
            started_ms=0,
            now_ms=93_784_000,
            partitions=[
                PartitionStatus(number=0, phase="running", lag=77, counters=counters, backlog=backlog),
                PartitionStatus(number=1, phase="waiting", reason="Kafka does not answer [bold]\x1b[31m"),
            ],
            tenants=[
                TenantStatus(
                    tenant="shop", cpu_seconds=12.34, cpu_share=0.25, calls=5000, worker="running", waiting=WAITING
                )
            ],
        )

    def unready(self) -> Sequence[str]:
        return ["partition 1 waits: Kafka does not answer"]

    def shared_features(self) -> SharedFeatures:
        return SharedFeatures(features=[], refused={})

    def models(self) -> Sequence[ModelInfo]:
        cost = ModelCost(ms_per_row=0.0125, calls=5000, rows=160_000, rows_queued=2)
        live = ModelInfo(
            tenant="shop", model="bid", version="0123456789ab", sha256="f" * 64, state="live", events=["search"],
            outputs=["score"], cost=cost, waiting=WAITING,
        )  # fmt: skip
        broken = ModelInfo(
            tenant="ads", model="click", version="", sha256="", state="refused", reasons=["no such\nfield: [red]x"]
        )
        return [live, broken]

    def share(self, tenant: str) -> TenantShare:
        return MemoryView().share(tenant)

    async def customer(self, customer: str, at: AsOf) -> CustomerState:
        raise NotFound(customer)

    async def features(self, customer: str, model: ModelName, at: AsOf) -> CustomerFeatures:
        raise NotFound(customer)

    async def inferences(self, customer: str, at: AsOf) -> CustomerInferences:
        raise NotFound(customer)


class ThreeNodes:
    """A cluster to look at: partition 1 moves, n3 is silent."""

    complete = True

    def unready(self) -> Sequence[str]:
        return [] if self.complete else ["no leader is heard"]

    async def cluster(self) -> ClusterStatus:
        move = ClusterMove(source="n2", to="n1", why="n2 is draining", since_ms=1_500, waits_for="n1 to take over")
        return ClusterStatus(
            node="n1",
            leader="n1" if self.complete else None,
            complete=self.complete,
            ready=True,
            revision=7,
            now_ms=0,
            settings=ClusterAgreement(standbys=1, lease_ms=1000, moves_max=2, builds_max=4, snapshot_holders_min=2),
            members=[
                ClusterMember(name="n1", raft_address="n1:1", peer_address="n1:2", leader=True, heard_ms=12, owns=1),
                ClusterMember(name="n2", raft_address="n2:1", peer_address="n2:2", draining=True, fresh=True, rack="b"),
                ClusterMember(name="n3", raft_address="n3:1", peer_address="n3:2", fresh=False, heard_ms=86_000),
            ],
            partitions=[
                ClusterPartition(
                    number=0,
                    owner="n1",
                    epoch=3,
                    replicas=[
                        ClusterReplica(node="n1", role="owner", offset=5, serving=True, snapshot_offset=4),
                        ClusterReplica(node="n2", role="standby", offset=3, frames_behind=2, ms_behind=1_040),
                        ClusterReplica(node="n3", role="left", snapshot_offset=1_000),
                    ],
                ),
                ClusterPartition(number=1, owner="n2", epoch=1, replicas=[], move=move, reason="moves to n1: drain"),
            ],
            models=[ClusterModel(tenant="shop", model="bid", version="ab12", state="passed", waits_for=["n3"])],
            refusals=[ClusterRefusal(command="live", reason="no file [red]", revision=3)],
            awaited={"n4": "n4:1"},
        )


@pytest.fixture
async def url() -> AsyncIterator[str]:
    server = HttpServer(OneNode(), HttpSection(port=0), ManualClock())
    await server.start()
    yield f"http://{server.address}"
    await server.stop()


@pytest.fixture
async def cluster_url() -> AsyncIterator[str]:
    server = HttpServer(OneNode(), HttpSection(port=0), ManualClock(), cluster=ThreeNodes())
    await server.start()
    yield f"http://{server.address}"
    await server.stop()


def row(text: str, start: str) -> str:
    """The one line of a table that begins with `start`, blanks squeezed."""
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return " ".join(line.split())


async def test_check_sums_up_a_good_file(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(f'{GOOD}[profile]\nspend = "sum(search.amount)"\n')
    ran = await headrace("check", "--config", str(tmp_path / "good.toml"))
    assert (ran.code, ran.err) == (0, "")
    assert "no mistakes" in ran.out.splitlines()[0]
    assert "amount (number)" in ran.out
    assert row(ran.out, "  profile ") == "profile spend"
    assert "headrace.inferences, headrace.changelog, headrace.dead-letters" in ran.out
    assert os.listdir(tmp_path) == ["good.toml"]


async def test_a_watched_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(GOOD)
    folder, missing = tmp_path / "tenants", ", which is not there: no model is taken until it is made or mounted"
    for expected in (missing, ""):
        ran = await headrace("check", "--config", str(tmp_path / "good.toml"))
        assert (ran.code, row(ran.out, "  tenants ")) == (0, f"tenants {folder}{expected}")
        assert folder.exists() == (expected == ""), "it is never made"
        folder.mkdir(exist_ok=True)


@pytest.mark.parametrize("command", ["check", "run"])
async def test_each_mistake_is_a_line(tmp_path: Path, command: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f'{GOOD}[cycle]\nevnts_max = 1\ncommit_interval_ms = "fast"\n')
    ran = await headrace(command, "--config", str(path))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines() == [
        f"{path}: [cycle] evnts_max is not known; did you mean events_max?",
        f'{path}: [cycle] commit_interval_ms is "fast"; allowed: an integer from 1 to 10000',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[profile]\nspend = "sum(search.none)"', "profile 'spend': "),
        ('[profile]\nspend = "((("', "profile 'spend': "),
        ('[profile]\nevents = "count(search)"', "profile 'events': this name is built in"),
        (f'{CLUSTER}snapshot_url = "foo://bar/x"', "cluster.snapshot_url: no driver for foo://bar/x ("),
    ],
)
async def test_what_would_end_the_node_is_a_mistake(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f"{GOOD}{text}\n")
    ran = await headrace("check", "--config", str(path))
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert ran.err.startswith(f"{path}: {expected}")


@pytest.mark.parametrize("url", ["file:///folder", "s3://bucket/x"])
async def test_a_store_that_has_a_driver_is_not_asked_for_anything(tmp_path: Path, url: str) -> None:
    (tmp_path / "good.toml").write_text(f'{GOOD}{CLUSTER}snapshot_url = "{url}"\n')
    ran = await headrace("check", "--config", str(tmp_path / "good.toml"))
    assert (ran.code, ran.err) == (0, "")


async def test_check_without_the_file(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    ran = await headrace("check", "--config", str(path))
    assert ran == (1, "", f"{path}: the file can't be read: No such file or directory\n")


async def test_status_as_tables(url: str) -> None:
    ran = await headrace("status", "--url", url)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "not ready  mill  exactly once  up 1 d 2 h"
    assert lines[1].strip() == "partition 1 waits: Kafka does not answer"
    assert row(ran.out, "0 ") == "0 owner running 77 1,234,567 8 7 42"
    assert row(ran.out, "1 ").endswith(r"Kafka does not answer [bold]\x1b[31m")
    assert row(ran.out, "shop ") == "shop running 1.0 12.3 25% 5,000 0 1,040 75.0 s 3 age, 1,200 overload 0"


async def test_models_as_tables(url: str) -> None:
    ran = await headrace("models", "--url", url)
    assert (ran.code, ran.err) == (0, "")
    assert (
        row(ran.out, "shop/bid ")
        == "shop/bid 0123456789ab live search score 0.013 5,000 160,000 2 1,040 75.0 s 3 age, 1,200 overload"
    )
    assert row(ran.out, "ads/click ").startswith("ads/click refused")
    assert r"ads/click: no such\nfield: [red]x" in ran.out


async def test_models_of_all_pages_are_shown() -> None:
    class Many(OneNode):
        def models(self) -> Sequence[ModelInfo]:
            every, one = range(2 * HTTP_MODELS_MAX + 1), super().models()[0]
            return [msgspec.structs.replace(one, sha256=f"{number:064x}") for number in every]

    server = HttpServer(Many(), HttpSection(port=0), ManualClock())
    await server.start()
    try:
        ran = await headrace("models", "--json", "--url", f"http://{server.address}")
    finally:
        await server.stop()
    answer = msgspec.json.decode(ran.out, type=Models)
    assert [int(model.sha256, 16) for model in answer.models] == list(range(2 * HTTP_MODELS_MAX + 1))
    assert answer.next is None


async def test_a_share_is_explained(url: str) -> None:
    ran = await headrace("explain-share", "ads", "--url", url)
    assert (ran.code, ran.err) == (0, "")
    assert row(ran.out, "ads: ") == "ads: weight 2, 1 CPU slots"
    assert row(ran.out, "10 s ") == "10 s 3.25 2.00 1.25 25% 30% 1,290 800 500 turn"
    assert "  8.0 s: rows waited while others had the 1 CPU slots" in ran.out.splitlines()
    assert r"a\x1b[2J" in ran.out
    ran = await headrace("explain-share", "nobody", "--url", url)
    assert (ran.code, ran.out) == (1, "")
    assert "404: no tenant nobody is known here" in ran.err


@pytest.mark.parametrize("command", [["export", "training"], ["check-training"]])
async def test_a_broker_that_is_not_there_is_one_line(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "good.toml").write_text(f'{GOOD}[kafka]\nbootstrap = ["127.0.0.1:1"]\n')
    ran = await headrace(*command, "ads/bid", "--config", str(tmp_path / "good.toml"))
    last = ran.err.splitlines()[-1]
    assert (ran.code, ran.out, last.startswith("open topic headrace.rows: "), "Unclosed" in ran.err) == (
        1,
        "",
        True,
        False,
    )


@pytest.mark.parametrize("name", ["ads", "ads/", "/bid", "ads/bid/x"])
async def test_what_names_no_model_is_told_so(url: str, tmp_path: Path, name: str) -> None:
    (tmp_path / "good.toml").write_text(GOOD)
    config = ("--config", str(tmp_path / "good.toml"))
    for command in (["rollout"], ["promote", *config], ["rollback", *config]):
        ran = await headrace(command[0], name, *command[1:], "--url", url)
        assert (ran.code, ran.out, ran.err) == (1, "", f"{name} is no model; say TENANT/MODEL\n")


async def test_answers_as_json(url: str) -> None:
    ran = await headrace("status", "--json", "--url", url)
    assert msgspec.json.decode(ran.out, type=NodeStatus).partitions == OneNode().status().partitions
    assert msgspec.json.decode(ran.out)["cluster"] is None
    ran = await headrace("models", "--json", "--url", f"{url}/")
    answered = msgspec.json.decode(ran.out, type=Models).models
    assert {model.model: model for model in answered} == {model.model: model for model in OneNode().models()}
    assert len(answered) == len(OneNode().models())


async def test_status_of_a_cluster(cluster_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = await headrace("status", "--url", cluster_url)
    assert (ran.code, ran.err) == (0, "")
    assert row(ran.out, "cluster") == "cluster led by n1"
    assert row(ran.out, "n1 ") == "n1 leads 1 0 12 0 n1:2"
    assert row(ran.out, "n2 ") == "n2 draining b 0 0 0 n2:2"
    assert row(ran.out, "n3 ") == "n3 silent 0 0 86,000 0 n3:2"
    zero, one = (" ".join(line.split()) for line in ran.out.splitlines() if " n1 " in line or " n2 " in line)
    assert zero == "0 n1 3 n2 2 frames, 1,040 ms behind, n3 (not to have it) n1 4, n3 1,000"
    assert one == "1 n2 1 moves to n1: drain; since 1,500 ms, waits for n1 to take over"
    assert "shop/bid ab12 waits for its file on n3" in ran.out
    assert "refused: live: no file [red]" in ran.out
    assert row(ran.out, "n4 ").startswith("n4 at n4:1 may join and has not come: it counts for a majority as one")
    ran = await headrace("status", "--json", "--url", cluster_url)
    cluster = msgspec.json.decode(ran.out)["cluster"]
    assert msgspec.convert(cluster, ClusterStatus) == await ThreeNodes().cluster()
    monkeypatch.setattr(ThreeNodes, "complete", False)
    ran = await headrace("status", "--url", cluster_url)
    assert row(ran.out, "cluster").startswith("cluster no leader as n1 knows it")
    assert row(ran.out, "  no leader is heard")


@pytest.mark.parametrize("command", ["status", "models"])
@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("http://127.0.0.1:1", "no node answers at http://127.0.0.1:1/v1/"),
        ("http://[::1", "no node answers at http://[::1/v1/"),
        ("http://bad host:1", "no node answers at http://bad host:1/v1/"),
        ("file:///etc", "file:///etc is no address of a node"),
        ("{url}/elsewhere", "/elsewhere/v1/"),
    ],
)
async def test_a_node_that_cannot_be_reached_is_one_line(url: str, command: str, place: str, words: str) -> None:
    ran = await headrace(command, "--url", place.replace("{url}", url))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert words in ran.err


async def test_an_answer_that_is_no_node_is_one_line() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(replies.pop(0))
        writer.close()

    replies = [b"HTTP/1.0 200 OK\r\n\r\n<html>", b"HTTP/1.0 200 OK\r\n\r\n[]", b"nonsense\r\n\r\n", b""]
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        while replies:
            ran = await headrace("status", "--url", f"http://127.0.0.1:{port}")
            assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)


SASL = """
[kafka]
security_protocol = "SASL_SSL"
sasl_mechanism = "PLAIN"
sasl_username = "node"
sasl_password_env = "KAFKA_NO_SUCH"
"""
FOR_RUNNING_NODES = (
    *(("drain", "n2"), ("undrain", "n2"), ("join", "n2", "127.0.0.1:7200"), ("leave", "n2"), ("settings",)),
    *(("snapshot",), ("verify",), ("table", "rollback", "prices"), ("table", "drop", "prices")),
)


async def test_no_command_for_running_nodes_needs_the_password_of_kafka(tmp_path: Path) -> None:
    """Whoever says it may have no right to that, and it is not used."""
    path = tmp_path / "node.toml"
    path.write_text(GOOD + SASL + CLUSTER.replace("7101", "1"))
    everything = await asyncio.gather(*(headrace(*command, "--config", str(path)) for command in FOR_RUNNING_NODES))
    for command, ran in zip(FOR_RUNNING_NODES, everything, strict=True):
        assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1), command
        expected = f"{tmp_path}/data/operator-token can't be read" if command[0] == "table" else "127.0.0.1:1 can't be"
        assert ran.err.startswith(expected), command


async def test_a_secret_of_the_cluster_that_is_gone_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(f'{GOOD}{CLUSTER}secret_env = "CLUSTER_NO_SUCH"\n')
    ran = await headrace("undrain", "n2", "--config", str(path))
    assert ran == (1, "", "[cluster] secret_env is CLUSTER_NO_SUCH; allowed: a variable that is set\n")


async def test_a_check_that_could_not_be_kept_is_not_begun(tmp_path: Path) -> None:
    path, data = tmp_path / "node.toml", tmp_path / "data"
    path.write_text(f'{GOOD}[kafka]\nbootstrap = ["127.0.0.1:1"]\n')
    data.mkdir()
    (data / "consistency").write_text("a file in the folder's place")
    ran = await headrace("check-training", "ads/bid", "--config", str(path))
    assert ran == (1, "", f"{data}/consistency can't be written: File exists\n")


async def test_help_and_version() -> None:
    ran = await headrace("--version")
    assert (ran.code, ran.out.startswith("headrace")) == (0, True)
    ran = await headrace("--help")
    assert all(command in ran.out for command in ("run", "check", "status", "models"))
    assert (await headrace("check")).code == 2


@pytest.mark.parametrize("command", ["check", "status"])
async def test_quick_commands_import_nothing_heavy(tmp_path: Path, command: str) -> None:
    (tmp_path / "good.toml").write_text(GOOD)
    arguments = {"check": ["--config", str(tmp_path / "good.toml")], "status": ["--url", "http://127.0.0.1:1"]}
    code = (
        "import sys; from node.__main__ import app\n"
        f"try: app({[command, *arguments[command]]!r})\n"
        "except SystemExit: pass\n"
        "print('loaded:', *{'numpy', 'aiohttp', 'aiokafka', 'rocksdict', 'structlog', 'asyncio'} & set(sys.modules))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), SECONDS_MAX)
    assert out.decode().splitlines()[-1] == "loaded:"
