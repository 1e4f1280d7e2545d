"""The watched directory with real files, real workers and a real blob store."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import pytest_asyncio
from sklearn.linear_model import LogisticRegression
from structlog.testing import capture_logs
from waiting import until

from node.app import row_refusal
from node.kernel import limits
from node.kernel.clock import SystemClock
from node.kernel.errors import StoreUnavailable
from node.kernel.supervise import Supervisor
from node.kernel.types import EventSchema, FeatureRows, ModelName, Quota
from replication.blobs import BlobStore
from tenants import transitions
from tenants.cpu_time import cpu_seconds
from tenants.manifest import TenantCaps
from tenants.pool import ModelPool
from tenants.registry import Action, ConfigureTenant, GoLive, RemoveTenant, Retire, Snapshot
from tenants.sandbox import SandboxSettings
from tenants.trials import TRIAL_ATTEMPTS_MAX
from tenants.watch import Blobs, ModelWatcher, WatchSettings
from tenants.workers import WarmServer

from hostile_making import evaluated  # isort: skip

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = EventSchema(("transaction", "search"), {"amount": "number", "age": "number"})
RNG = np.random.default_rng(3)
X = RNG.normal(size=(100, 2))
MANIFEST = b'on = ["transaction"]\n[features]\namount = "event.amount"\nage = "event.age"\n'
BID = ModelName("ads", "bid")


class Evil:
    """A file that runs a command when it is unpickled, if nobody stops it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def model_file(regularisation: float = 1.0, columns: int = 2) -> bytes:
    return dumped(LogisticRegression(C=regularisation).fit(X[:, :columns], X[:, 0] > 0))


def dumped(model: object) -> bytes:
    stream = io.BytesIO()
    joblib.dump(model, stream)
    return stream.getvalue()


class Node:
    """A watcher on a directory of its own; `start` again is a restart."""

    def __init__(self, folder: Path, server: WarmServer) -> None:
        self.root = folder / "watched"
        self.root.mkdir()
        self.folder = folder
        self.server = server
        self.blobs = BlobStore(folder / "blobs")
        self.clock = SystemClock()
        self.actions: list[Action] = []
        self.snapshots: list[Snapshot] = []
        self.supervisor = Supervisor()

    async def start(
        self,
        settle_ms: int = 60,
        rescan_ms: int = 500,
        caps: TenantCaps = TenantCaps(),  # noqa: B008
    ) -> ModelWatcher:
        self.supervisor = Supervisor()
        settings = WatchSettings(self.root, self.folder / "registry.json", caps, settle_ms, rescan_ms, row_refusal)
        self.watcher = ModelWatcher(
            settings, SCHEMA, self.server,
            Blobs(self.blobs.put, self.blobs.get, self.blobs.names, self.blobs.delete), self.clock, self.supervisor,
            self.snapshots.append, self.actions.append,
        )  # fmt: skip
        await self.watcher.start()
        return self.watcher

    async def stop(self) -> None:
        assert self.supervisor.failure is None, "a background task died"
        await self.supervisor.stop()

    def drop(self, name: ModelName, manifest: bytes | None = MANIFEST, model: bytes | None = None) -> None:
        folder = self.root / name.tenant
        folder.mkdir(exist_ok=True)
        for suffix, content in ((".joblib", model), (".toml", manifest)):
            if content is not None:
                temporary = folder / f".{name.model}{suffix}"
                temporary.write_bytes(content)
                temporary.rename(folder / f"{name.model}{suffix}")

    def status(self, name: ModelName = BID) -> dict[str, object]:
        with contextlib.suppress(FileNotFoundError):
            told = json.loads((self.root / name.tenant / f"{name.model}.status.json").read_bytes())
            assert isinstance(told, dict)
            return told
        return {}

    def live(self) -> dict[ModelName, str]:
        return {version.name: version.version for version, _ in self.watcher.snapshot.live}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[WarmServer]:
    server = WarmServer(SandboxSettings(required=frozenset()), SystemClock())
    await server.start()
    yield server
    await server.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def node(tmp_path: Path, server: WarmServer) -> AsyncIterator[Node]:
    node = Node(tmp_path, server)
    yield node
    await node.stop()


async def test_a_dropped_pair_goes_live_and_says_so_beside_it(node: Node) -> None:
    await node.start()
    node.drop(BID, model=model_file())
    await until(lambda: node.status().get("state") == "live")
    told = node.status()
    assert told["columns"] == ["amount", "age"]
    assert told["class"] == "LogisticRegression"
    assert isinstance(told["seconds_per_row"], float)
    assert told["version"] == node.live()[BID]
    assert node.blobs.get(str(told["sha256"])) == model_file()
    assert [type(action) for action in node.actions] == [ConfigureTenant, GoLive]
    assert node.snapshots[-1].live == node.watcher.snapshot.live


async def test_a_new_file_replaces_the_old_and_a_bad_one_does_not(node: Node) -> None:
    await node.start()
    node.drop(BID, model=model_file())
    await until(lambda: BID in node.live())
    first = node.live()[BID]

    node.drop(BID, manifest=None, model=model_file(columns=1))
    await until(lambda: node.status().get("state") == "refused")
    assert "bid.joblib" in str(node.status()["problems"])
    assert node.live()[BID] == first

    node.drop(BID, manifest=b'on = ["transaction"]\n[features]\namount = "event.amont"\nage = 3\n', model=None)
    await until(lambda: "amont" in str(node.status().get("problems")))
    assert len(node.status()["problems"]) >= 2  # type: ignore[arg-type]
    assert node.live()[BID] == first
    running = node.status()["running"]
    assert isinstance(running, dict)
    assert running["version"] == first

    node.drop(BID, model=model_file(0.01))
    await until(lambda: node.live()[BID] != first)
    assert [type(action) for action in node.actions[-2:]] == [GoLive, Retire]


async def test_a_pair_that_is_still_written_is_not_taken(node: Node) -> None:
    watcher = await node.start(settle_ms=1000)
    (node.root / "ads").mkdir()
    (node.root / "ads" / "bid.toml").write_bytes(MANIFEST)
    whole = model_file()
    with (node.root / "ads" / "bid.joblib").open("wb") as slow:
        for chunk in pieces(whole, 8):
            before = watcher.statistics().scans
            slow.write(chunk)
            slow.flush()
            await until(lambda before=before: watcher.statistics().scans > before)  # type: ignore[misc]
            assert watcher.statistics().trials == 0
    await until(lambda: BID in node.live())
    assert watcher.statistics().trials == 1, "the halves were never tried"


def pieces(content: bytes, count: int) -> Iterator[bytes]:
    size = -(-len(content) // count)
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def test_a_file_that_changes_while_it_is_copied_is_taken_as_it_is_then(node: Node) -> None:
    first, second = model_file(), model_file(0.01)
    put = node.blobs.put
    copied: list[str] = []

    def put_and_replace(path: Path) -> str:
        copied.append(put(path))
        if len(copied) == 1:
            (node.root / "ads" / "bid.joblib").write_bytes(second)
        return copied[-1]

    node.blobs.put = put_and_replace  # type: ignore[assignment, method-assign]
    watcher = await node.start()
    node.drop(BID, model=first)
    await until(lambda: BID in node.live())
    assert watcher.statistics().trials == 1
    assert watcher.snapshot.live[0][0].blob == copied[-1] != copied[0]


async def test_a_file_that_attacks_is_refused_and_does_nothing(node: Node, tmp_path: Path) -> None:
    await node.start()
    mark = tmp_path / "mark"
    node.drop(BID, model=dumped(Evil(f"touch {mark}")))
    await until(lambda: node.status().get("state") == "refused")
    assert "system" in str(node.status()["problems"])
    assert not mark.exists()
    assert node.live() == {}


async def test_links_out_of_the_folder_pipes_and_hidden_names_are_not_read(node: Node, tmp_path: Path) -> None:
    secret = tmp_path / "secret.toml"
    secret.write_bytes(MANIFEST)
    await node.start()
    node.drop(BID, manifest=None, model=model_file())
    (node.root / "ads" / "bid.toml").symlink_to(secret)
    await until(lambda: node.status().get("state") == "refused")
    assert "plain file" in str(node.status()["problems"])

    os.mkfifo(node.root / "ads" / "pipe.joblib")
    (node.root / "ads" / "pipe.toml").write_bytes(MANIFEST)
    (node.root / "ads" / ".hidden.joblib").write_bytes(model_file())
    (node.root / "ads" / ".hidden.toml").write_bytes(MANIFEST)
    node.drop(ModelName("ads", "good"), model=model_file())
    await until(lambda: ModelName("ads", "good") in node.live())
    assert set(node.watcher.snapshot.models) == {BID, ModelName("ads", "good")}


def windowed(windows: range) -> bytes:
    """A manifest of two features and two aggregates of each window, which has tiles of its own."""
    calls = [f"{function}(transaction.amount, '{days}d')" for days in windows for function in ("std", "max")]
    total = " + ".join(f"({' + '.join(calls[at : at + 10])})" for at in range(0, len(calls), 10))  # not nested too deep
    return f'on = ["transaction"]\n[features]\namount = "event.amount"\nage = "{total}"\n'.encode()


async def test_a_model_that_no_row_can_hold_beside_the_live_ones_is_refused(node: Node) -> None:
    await node.start()
    node.drop(BID, model=model_file(), manifest=windowed(range(10, 55)))
    await until(lambda: node.status().get("state") == "live")
    other = ModelName("bank", "other")
    node.drop(other, model=model_file(), manifest=windowed(range(60, 105)))
    await until(lambda: node.status(other).get("state") == "refused")
    assert "other.toml" in str(node.status(other)["problems"])
    assert "ROW_SLOTS_MAX" in str(node.status(other)["problems"])
    assert set(node.live()) == {BID}
    node.drop(other, model=model_file(), manifest=windowed(range(60, 62)))
    await until(lambda: other in node.live())


async def test_a_name_that_is_no_text_stops_nobody(node: Node) -> None:
    await node.start()
    (node.root / "ads").mkdir()
    for name, content in ((b"\xff.toml", MANIFEST), (b"\xff.joblib", model_file())):
        (node.root / "ads" / os.fsdecode(name)).write_bytes(content)
    node.drop(BID, model=model_file())
    await until(lambda: node.status().get("state") == "live")
    assert set(node.watcher.snapshot.models) == {BID}
    assert any("udcff" in line for line in node.watcher.statistics().ignored)


async def test_a_tenant_hears_of_a_name_that_can_not_be_taken_until_it_is_mended(node: Node) -> None:
    await node.start(rescan_ms=100)
    upper, settings = ModelName("ads", "Upper"), ModelName("ads", "tenant")
    node.drop(upper, model=model_file())
    await until(lambda: "ads/Upper: a model is named with a-z" in str(node.status(settings).get("ignored")))
    assert (node.status(settings)["state"], node.status(upper)) == ("live", {})
    (node.root / "ads" / "tenant.toml").write_text("weight = 2.5\nwieght = 3\n")
    await until(lambda: node.status(settings)["state"] == "refused")
    assert len(node.status(settings)["ignored"]) == 1  # type: ignore[arg-type]
    for suffix in (".toml", ".joblib"):
        (node.root / "ads" / f"Upper{suffix}").rename(node.root / "ads" / f"bid{suffix}")
    await until(lambda: node.status(settings)["ignored"] == [])
    await until(lambda: BID in node.live())
    (node.root / "ads" / "tenant.toml").unlink()
    await until(lambda: node.status(settings) == {})


async def test_the_model_file_of_a_refused_manifest_is_not_copied(node: Node) -> None:
    await node.start()
    node.drop(BID, manifest=b'on = ["transaction"]\n[features]\namount = "event.amont"\n', model=model_file())
    await until(lambda: node.status().get("state") == "refused")
    assert "amont" in str(node.status()["problems"])
    assert node.blobs.names() == []


async def test_a_pair_that_may_be_taken_once_it_was_read_is_looked_at_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = await node.start(rescan_ms=60_000)
    await watcher.set_quota("ads", Quota(models_max=0))
    loop, may_take, answers = asyncio.get_running_loop(), transitions.may_take, []

    def granted_meanwhile(*asked: Any) -> bool:
        answers.append(may_take(*asked))
        if len(answers) == 1:
            asyncio.run_coroutine_threadsafe(watcher.set_quota("ads", Quota(models_max=1)), loop).result()
        return answers[-1]

    monkeypatch.setattr(transitions, "may_take", granted_meanwhile)
    node.drop(BID, model=model_file())
    await until(lambda: BID in node.live(), seconds_max=20)
    assert answers[0] is False


async def test_too_large_a_file_is_refused_unread(node: Node) -> None:
    await node.start()
    node.drop(BID, model=model_file())
    await until(lambda: BID in node.live())
    with (node.root / "ads" / "bid.joblib").open("wb") as sparse:
        sparse.truncate(limits.MODEL_BYTES_MAX + 1)
    await until(lambda: node.status().get("state") == "refused")
    assert str(limits.MODEL_BYTES_MAX) in str(node.status()["problems"])
    assert BID in node.live()


async def test_a_pair_that_was_refused_is_tried_again_once_its_tenant_did_as_it_was_told(node: Node) -> None:
    watcher = await node.start()
    (node.root / "ads").mkdir()
    settings = node.root / "ads" / "tenant.toml"
    settings.write_text("memory_mb = 64\n")
    large = LogisticRegression().fit(X, X[:, 0] > 0)
    large.padding_ = RNG.random(36 * limits.MIB // 8)
    node.drop(BID, model=dumped(large))
    await until(lambda: "more memory" in str(node.status().get("problems")))
    settings.write_text("memory_mb = 1024\n")
    await until(lambda: BID in node.live())

    node.drop(BID, model=model_file(columns=1))
    await until(lambda: node.status().get("state") == "refused")
    before = watcher.statistics()
    await until(lambda: watcher.statistics().scans >= before.scans + 3)
    assert watcher.statistics().trials == before.trials, "unchanged, it is not tried again"
    os.utime(node.root / "ads" / "bid.joblib", ns=(0, 1))
    await until(lambda: watcher.statistics().trials == before.trials + 1)
    await until(lambda: node.status().get("state") == "refused")


async def test_a_disk_that_is_not_read_fails_no_trial(node: Node) -> None:
    get, reads = node.blobs.get, []

    def unreadable_once(sha256: str) -> bytes:
        reads.append(sha256)
        match len(reads):
            case 1:
                raise StoreUnavailable("the disk could not be read")
            case 2:
                node.blobs.delete(sha256)
        return get(sha256)

    node.blobs.get = unreadable_once  # type: ignore[method-assign]
    watcher = await node.start()
    node.drop(BID, model=model_file())
    await until(lambda: "the disk could not be read" in watcher.statistics().last_error)
    assert node.status()["state"] == "candidate"
    await until(lambda: BID in node.live())
    assert len(reads) >= 3, "what was gone from the store was put there again"


async def test_a_trial_that_ends_with_the_warm_server_is_made_again(tmp_path: Path) -> None:
    settings = SandboxSettings(required=frozenset(), extra_globals=("builtins eval call",))
    node = Node(tmp_path, WarmServer(settings, SystemClock()))
    watcher = await node.start()
    node.drop(BID, model=evaluated("while True: pass"))
    seen: set[int] = set()
    for _ in range(TRIAL_ATTEMPTS_MAX + 1):
        (worker,) = await until(lambda: {pid for pid in children(node.server) if busy(pid)} - seen)
        seen.add(worker)
        os.kill(node.server._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        await until(lambda worker=worker: not Path(f"/proc/{worker}").exists())  # type: ignore[misc]
    await until(lambda: {pid for pid in children(node.server) if busy(pid)} - seen)
    assert node.status()["state"] == "candidate"
    node.drop(BID, model=model_file())
    await until(lambda: BID in node.live())
    assert watcher.statistics().trials >= 2
    await node.stop()
    await node.server.stop()


def children(server: WarmServer) -> set[int]:
    process = server._process
    if process is None:
        return set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return {int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()}
    return set()


def busy(pid: int) -> bool:
    """Whether it has computed for longer than it takes to lock a worker down."""
    return cpu_seconds(pid) > 0.5


async def test_deleting_the_pair_retires_the_model(node: Node) -> None:
    await node.start()
    node.drop(BID, model=model_file())
    await until(lambda: node.status().get("state") == "live")
    (node.root / "ads" / "bid.joblib").unlink()
    before = node.watcher.statistics().scans
    await until(lambda: node.watcher.statistics().scans > before + 1)
    assert BID in node.live(), "half a pair is a file being replaced, not a deletion"
    (node.root / "ads" / "bid.toml").unlink()
    await until(lambda: BID not in node.live())
    await until(lambda: node.status() == {})
    assert isinstance(node.actions[-1], Retire)


async def test_a_root_that_is_empty_retires_nobody_as_its_volume_may_not_be_mounted(node: Node, tmp_path: Path) -> None:
    watcher = await node.start()
    node.drop(BID, model=model_file())
    await until(lambda: node.status().get("state") == "live")
    shutil.move(node.root / "ads", tmp_path / "away")
    before = watcher.statistics().scans
    await until(lambda: watcher.statistics().scans >= before + 4)
    assert BID in node.live(), "longer ago than the settle time"
    assert "is empty" in watcher.statistics().last_error

    shutil.move(tmp_path / "away", node.root / "ads")
    other = ModelName("mail", "bid")
    node.drop(other, model=model_file())
    await until(lambda: node.status(other).get("state") == "live")
    assert watcher.statistics().trials == 2, "what is found again needs no trial"
    shutil.rmtree(node.root / "ads")
    await until(lambda: set(node.live()) == {other})


async def test_a_directory_that_is_not_there_is_told_once_until_it_is_back(node: Node, tmp_path: Path) -> None:
    watcher = await node.start(rescan_ms=100)
    node.drop(BID, model=model_file())
    await until(lambda: node.status().get("state") == "live")

    async def looked_again() -> int:
        before = watcher.statistics().scans
        await until(lambda: watcher.statistics().scans >= before + 4)
        return sum(line["event"] == "watched directory not there" for line in logged)

    with capture_logs() as logged:
        for times in (1, 2):
            shutil.move(node.root / "ads", tmp_path / "away")
            assert await looked_again() == times
            assert "is empty" in watcher.statistics().last_error
            shutil.move(tmp_path / "away", node.root / "ads")
            assert await looked_again() == times
    assert BID in node.live()


async def test_more_folders_or_files_than_are_looked_at_delete_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def looked_again() -> None:
        before = watcher.statistics().scans
        await until(lambda: watcher.statistics().scans >= before + 3)

    watcher = await node.start(rescan_ms=100)
    names = {ModelName("mail", "bid"), ModelName("shop", "bid")}
    for name in names:
        node.drop(name, model=model_file())
    (node.root / "mail" / "tenant.toml").write_text("weight = 2.5\n")
    await until(lambda: set(node.live()) == names)
    monkeypatch.setattr(limits, "TENANTS_MAX", 2)
    node.drop(BID, model=model_file())
    await looked_again()
    assert set(node.live()) == names, "the newer name comes first, and not instead"
    assert "there are 2 tenants already" in watcher.statistics().ignored[0]

    monkeypatch.setattr(limits, "TENANT_FOLDER_ENTRIES_MAX", 0)
    await looked_again()
    assert set(node.live()) == names
    assert watcher.snapshot.tenants["mail"].weight == 2.5, "nor are settings taken for deleted"
    assert any("mail/: has more than 0 files" in line for line in watcher.statistics().ignored)
    monkeypatch.undo()
    shutil.rmtree(node.root / "mail")
    await until(lambda: set(node.live()) == {BID, ModelName("shop", "bid")})


async def test_a_folder_removed_and_made_again_is_still_watched(node: Node) -> None:
    watcher = await node.start()
    node.drop(BID, model=model_file())
    await until(lambda: node.status().get("state") == "live")  # the watcher writes nothing more into the folder
    (node.root / "other").mkdir()
    shutil.rmtree(node.root / "ads")
    await until(lambda: any(isinstance(action, RemoveTenant) for action in node.actions))
    for name in ("bid", "later"):
        node.drop(ModelName("ads", name), model=model_file())
        await until(lambda name=name: ModelName("ads", name) in node.live())  # type: ignore[misc]

    moved = node.root.with_name("moved")
    node.root.rename(moved)
    await until(lambda: "can't be read" in watcher.statistics().last_error)
    assert BID in node.live(), "a directory that is not there retires nobody"
    moved.rename(node.root)
    node.drop(ModelName("ads", "latest"), model=model_file())
    await until(lambda: ModelName("ads", "latest") in node.live())


async def test_nothing_is_watched_below_a_tenant_s_folder_nor_where_a_link_in_it_leads(
    node: Node, tmp_path: Path
) -> None:
    """A link to / would have the whole machine watched, and a folder that can't be read ends the watch for all."""
    elsewhere = tmp_path / "elsewhere"
    for folder in (elsewhere / "deep", node.root / "ads" / "old" / "older"):
        folder.mkdir(parents=True)
    (node.root / "ads" / "link").symlink_to(elsewhere)
    await node.start(rescan_ms=60_000)
    await until(lambda: folders_watched() == 2)
    node.drop(BID, model=model_file())
    await until(lambda: node.status().get("state") == "live")
    node.drop(ModelName("new", "bid"), model=model_file())
    await until(lambda: folders_watched() == 3)


def folders_watched() -> int:
    """By this process."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "inotify" in os.readlink(descriptor):
                told = Path(f"/proc/self/fdinfo/{descriptor.name}").read_text()
                count += sum(line.startswith("inotify") for line in told.splitlines())
    return count


async def test_tenant_settings_apply_at_run_time_and_mistakes_are_answered(node: Node) -> None:
    await node.start()
    (node.root / "ads").mkdir()
    settings = node.root / "ads" / "tenant.toml"
    settings.write_text("weight = 2.5\nmemory_mb = 600\n")
    await until(lambda: node.watcher.snapshot.tenants.get("ads") and node.watcher.snapshot.tenants["ads"].weight == 2.5)
    settings.write_text("wieght = 3\n")
    tenant = ModelName("ads", "tenant")
    await until(lambda: node.status(tenant).get("state") == "refused")
    assert "wieght" in str(node.status(tenant)["problems"])
    assert node.watcher.snapshot.tenants["ads"].weight == 2.5, "the settings from before stay"
    settings.unlink()
    await until(lambda: node.watcher.snapshot.tenants["ads"].weight == 1.0)


@pytest.mark.parametrize("settings", [None, "", "wieght = 1\n"])
async def test_the_operators_caps_hold_for_a_tenant_that_asks_for_nothing(node: Node, settings: str | None) -> None:
    await node.start(caps=TenantCaps(memory_mb_max=600, models_max=1))
    (node.root / "ads").mkdir()
    if settings is not None:
        (node.root / "ads" / "tenant.toml").write_text(settings)
    for name in (BID, ModelName("ads", "other")):
        node.drop(name, model=model_file())
    names = {BID, ModelName("ads", "other")}
    await until(lambda: {node.status(name).get("state") for name in names} == {"live", "refused"})
    assert node.watcher.snapshot.settings("ads").memory_mb == 600


async def test_shared_features_over_a_quota_are_taken_once_it_is_raised(node: Node) -> None:
    watcher = await node.start(rescan_ms=60_000, caps=TenantCaps(window_bytes_max=100))
    (node.root / "ads").mkdir()
    text = '[features.orders]\nversion = 1\nexpression = "count(transaction, \'30d\')"\ndescription = "Orders"\n'
    (node.root / "ads" / "features.toml").write_text(text)
    features = ModelName("ads", "features")
    await until(lambda: node.status(features).get("state") == "refused", seconds_max=20)
    assert watcher.refusals("ads") == {"window_bytes_max": 1}
    await watcher.set_quota("ads", Quota(window_bytes_max=128))
    await until(lambda: node.status(features).get("state") == "live", seconds_max=20)


async def test_a_status_file_that_could_not_be_written_is_written_once_it_can_be(node: Node) -> None:
    watcher = await node.start(rescan_ms=100)
    shared = '[features.x]\nversion = 1\nexpression = "event.amount"\ndescription = "x"\n'
    stand_ins = [node.root / "ads" / f"{name}.status.json" for name in ("bid", "tenant", "features")]
    for stand_in in stand_ins:
        stand_in.mkdir(parents=True)  # no file can be renamed to it, whoever the node runs as
    (node.root / "ads" / "tenant.toml").write_text("weight = 2.5\n")
    (node.root / "ads" / "features.toml").write_text(shared)
    node.drop(BID, model=model_file(columns=1))
    await until(lambda: [one.newest.state for one in watcher.snapshot.models.values() if one.newest] == ["refused"])
    before = watcher.statistics().scans
    await until(lambda: watcher.statistics().scans >= before + 2)
    for stand_in in stand_ins:
        stand_in.rmdir()
    await until(lambda: node.status().get("state") == "refused")
    await until(lambda: node.status(ModelName("ads", "tenant")).get("state") == "live")
    await until(lambda: node.status(ModelName("ads", "features")).get("in_force") == ["features.ads.x.v1"])


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Nobody can open the file, root neither: this process has a lease on it."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    descriptor = os.open(path, os.O_RDWR)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    try:
        yield
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)


async def test_a_file_that_can_be_read_after_all_is_taken_though_it_did_not_change(node: Node) -> None:
    await node.start(rescan_ms=100)
    folder = node.root / "ads"
    node.drop(BID, model=model_file(), manifest=None)
    with unreadable(folder / "bid.joblib"):
        node.drop(BID)
        await until(lambda: node.status().get("state") == "refused")
        assert node.status()["problems"] == [
            "bid.joblib: can't be read: Resource temporarily unavailable; make it readable for the node's user"
        ]
    await until(lambda: BID in node.live())

    shared = '[features.x]\nversion = 1\nexpression = "event.amount"\ndescription = "x"\n'
    for name, text in (("tenant", "weight = 2.5\n"), ("features", shared)):
        hidden, told = folder / f".{name}", ModelName("ads", name)
        hidden.write_text(text)
        with unreadable(hidden):
            hidden.rename(folder / f"{name}.toml")
            await until(lambda told=told: node.status(told).get("state") == "refused")  # type: ignore[misc]
            assert f"{name}.toml: can't be read" in str(node.status(told)["problems"])
        await until(lambda told=told: node.status(told)["state"] == "live")  # type: ignore[misc]
    assert node.watcher.snapshot.tenants["ads"].weight == 2.5


async def test_a_restarted_node_is_live_at_once_without_a_trial(node: Node) -> None:
    await node.start()
    node.drop(BID, model=model_file())
    await until(lambda: node.status().get("state") == "live")
    live = node.watcher.snapshot.live
    await node.stop()
    node.actions.clear()

    watcher = await node.start()
    assert watcher.snapshot.live == live
    assert [type(action) for action in node.actions] == [ConfigureTenant, GoLive]
    await until(lambda: watcher.statistics().scans > 3)
    assert watcher.statistics().trials == 0


async def test_what_the_pool_cannot_run_is_told_beside_the_file(node: Node) -> None:
    watcher = await node.start()
    node.drop(BID, model=model_file())
    await until(lambda: BID in node.live())
    watcher.failing(BID, node.live()[BID], "it needs more memory than the tenant has", True)
    await until(lambda: node.status().get("state") == "failing")
    assert node.status()["problems"] == ["it needs more memory than the tenant has"]


async def test_the_pool_follows_the_watcher_through_a_swap_and_a_removal(node: Node) -> None:
    pool = ModelPool(node.server, lambda blob: asyncio.to_thread(node.blobs.get, blob), node.clock, node.supervisor, 1)
    watcher = await node.start()
    watcher._acted = pool.act
    rows = FeatureRows(("amount", "age"), np.ascontiguousarray(X))
    for regularisation in (1.0, 0.01):
        before = node.live().get(BID)
        node.drop(BID, model=model_file(regularisation))
        await until(lambda before=before: node.live().get(BID) not in (None, before))  # type: ignore[misc]
        version = watcher.snapshot.live[0][0]
        async with asyncio.timeout(20):
            outputs = await pool.submit(version, rows)
        expected = LogisticRegression(C=regularisation).fit(X, X[:, 0] > 0).predict_proba(X)[:, 1]
        np.testing.assert_allclose(outputs.values[:, 0], expected, rtol=1e-9)
    await until(lambda: [known.version for known in pool.statistics().tenants[0].versions] == [version.version])
    (node.root / "other").mkdir()
    shutil.rmtree(node.root / "ads")
    await until(lambda: [tenant.tenant for tenant in pool.statistics().tenants] == ["other"])
    await pool.stop()
