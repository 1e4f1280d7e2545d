"""Real workers, forked from a real warm server, spoken to over their socket."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytest_asyncio
from estimator_corpus import shop_frame
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from worker_support import MEMORY_BYTES, called_while_the_loop_stands_still, rows_of, stored, version_of, warm_server

from node.kernel.clock import SystemClock
from node.kernel.errors import CallFailed, ModelRefused, SandboxUnavailable, WorkerLost
from node.kernel.limits import LABEL_BYTES_MAX, MIB, WORKER_NICENESS
from tenants import messages
from tenants.agreement import encode_report
from tenants.sandbox import LAYERS, SandboxSettings
from tenants.workers import LoadReport, WarmServer, WorkerProcess, _Frames, connected

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = ("amount", "visits", "age")
ROWS = np.random.default_rng(3).random((60, 3))
CLASSES = (ROWS[:, 0] > 0.5).astype(int)
FRAME = pd.DataFrame(ROWS, columns=list(NAMES))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[WarmServer]:
    async with warm_server() as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def worker(server: WarmServer) -> AsyncIterator[WorkerProcess]:
    spawned = await server.spawn("grocery", MEMORY_BYTES)
    yield spawned
    await spawned.close()


def fit(model: Any, given: Any = ROWS, target: Any = CLASSES) -> Any:
    target = target[: len(given)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(given, target)


def process_status(worker: WorkerProcess) -> str:
    path = Path(f"/proc/{worker.pid}/status")
    return path.read_text() if path.exists() else ""


async def test_the_kernel_runs_the_node_before_its_workers(worker: WorkerProcess) -> None:
    niceness = os.getpriority(os.PRIO_PROCESS, worker.pid) - os.getpriority(os.PRIO_PROCESS, 0)
    assert niceness == min(WORKER_NICENESS, 19 - os.getpriority(os.PRIO_PROCESS, 0))
    assert os.getsid(worker.pid) == os.getsid(0), "niceness holds inside one session only, where there is autogroup"
    assert os.getpgid(worker.pid) != os.getpgid(0), "a Ctrl-C at the terminal must not end it"


async def test_report_and_outputs(worker: WorkerProcess) -> None:
    model = fit(LogisticRegression(), FRAME)
    version = version_of(NAMES)
    report = await worker.load(version, stored(model))
    assert report.feature_names == NAMES
    assert report.feature_count == 3
    assert report.class_name == "LogisticRegression"
    assert report.labels == ()
    assert report.seconds_per_call > 0
    assert any("NaN" in note for note in report.notes)
    outputs = await worker.call(version.version, rows_of(NAMES, ROWS), 10)
    np.testing.assert_allclose(outputs.values[:, 0], model.predict_proba(FRAME)[:, -1])
    assert outputs.errors == {}
    assert outputs.cpu_seconds > 0
    statistics = worker.statistics()
    assert (statistics.calls, statistics.rows, statistics.versions) == (1, 60, (version.version,))
    assert statistics.cpu_seconds == outputs.cpu_seconds
    assert statistics.busy_seconds > 0


async def test_all_layers_are_in_force(worker: WorkerProcess) -> None:
    expected = set(LAYERS) - {"cgroup"} if os.getuid() == 0 else set(LAYERS) - {"cgroup", "own_user"}
    assert set(worker.sandbox.layers) == expected
    status = process_status(worker)
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert len(os.listdir(f"/proc/{worker.pid}/fd")) == 5


async def test_memory_is_measured_once_after_what_it_has_done(worker: WorkerProcess) -> None:
    assert worker.statistics().memory is None
    assert worker.stale
    worker.measure()
    empty = worker.statistics().memory
    assert empty is not None
    assert empty.own_bytes < 64 * MIB
    assert empty.shared_bytes > empty.own_bytes, "the libraries are the warm server's"
    assert not worker.stale
    model = fit(LogisticRegression())
    model.padding_ = np.ones(4 * MIB)
    await worker.load(version_of(NAMES), stored(model))
    assert worker.stale
    worker.measure()
    loaded = worker.statistics().memory
    assert loaded is not None
    assert loaded.own_bytes - empty.own_bytes >= model.padding_.nbytes
    await worker.close()
    worker.measure()
    assert worker.statistics().memory == loaded


async def test_what_a_model_prints_is_its_tenant_s(server: WarmServer) -> None:
    worker = await server.spawn("printer", MEMORY_BYTES)
    await worker.load(version_of(NAMES), stored(fit(RandomForestClassifier(20, verbose=3))))
    log = server.logs.of("printer")
    async with asyncio.timeout(10):
        while not any("Parallel" in line.text for line in log.lines()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert {line.pid for line in log.lines()} == {worker.pid}
    await worker.close()


async def test_two_versions_side_by_side_and_unload(worker: WorkerProcess) -> None:
    old, new = version_of(NAMES, number=1), version_of(NAMES, method="decision_function", number=2)
    model = fit(LogisticRegression())
    await worker.load(old, stored(model))
    await worker.load(new, stored(model))
    rows = rows_of(NAMES, ROWS[:5])
    assert (await worker.call(old.version, rows, 10)).values.max() <= 1
    await worker.unload(old.version)
    with pytest.raises(CallFailed, match="not loaded"):
        await worker.call(old.version, rows, 10)
    expected = model.decision_function(ROWS[:5])
    np.testing.assert_allclose((await worker.call(new.version, rows, 10)).values[:, 0], expected)


@pytest.mark.parametrize(
    ("features", "outputs", "method", "reason"),
    [
        (("visits", "amount", "age"), ("score",), "predict_proba", "column 1 is 'amount' in the model and 'visits'"),
        (("amount", "visits"), ("score",), "predict_proba", "needs column 'age' too"),
        ((*NAMES, "more"), ("score",), "predict_proba", "has no column 'more'"),
        (NAMES, ("score",), "transform", "LogisticRegression has no transform"),
        (NAMES, ("score",), "fit", "method 'fit' can't be called"),
        (NAMES, ("a", "b", "c"), "predict_proba", "the manifest names 3"),
    ],
)
async def test_mismatches_are_refused(
    worker: WorkerProcess, features: Any, outputs: Any, method: str, reason: str
) -> None:
    with pytest.raises(ModelRefused) as refusal:
        await worker.load(version_of(features, outputs, method), stored(fit(LogisticRegression(), FRAME)))
    assert reason in str(refusal.value)


async def test_number_of_columns_counts_without_names(worker: WorkerProcess) -> None:
    with pytest.raises(ModelRefused, match="fitted on 3 columns, the manifest has 2"):
        await worker.load(version_of(("a", "b")), stored(fit(LogisticRegression())))


async def test_unfitted_model_is_refused(worker: WorkerProcess) -> None:
    with pytest.raises(ModelRefused, match="not fitted"):
        await worker.load(version_of(NAMES), stored(LogisticRegression()))


async def test_several_probabilities(worker: WorkerProcess) -> None:
    model = fit(DecisionTreeClassifier(max_depth=3), ROWS, (3 * ROWS[:, 0]).astype(int))
    version = version_of(NAMES, ("low", "middle", "high"))
    await worker.load(version, stored(model))
    outputs = await worker.call(version.version, rows_of(NAMES, ROWS), 10)
    np.testing.assert_array_equal(outputs.values, model.predict_proba(ROWS))


@pytest.mark.parametrize("kind", [object, str])
async def test_text_classes_are_indices(worker: WorkerProcess, kind: Any) -> None:
    target = np.array(["cat", "dog", "ant"], dtype=kind)[(3 * ROWS[:, 0]).astype(int)]
    model = fit(DecisionTreeClassifier(max_depth=3), ROWS, target)
    version = version_of(NAMES, ("animal",), "predict")
    report = await worker.load(version, stored(model))
    assert report.labels == ("ant", "cat", "dog")
    outputs = await worker.call(version.version, rows_of(NAMES, ROWS), 10)
    assert [report.labels[int(value)] for value in outputs.values[:, 0]] == model.predict(ROWS).tolist()


@pytest.mark.parametrize(("character", "bytes_as_json"), [("x", 1), ("é", 2), ("\x01", 6)])
async def test_a_text_class_is_as_long_as_an_inference_may_hold(
    worker: WorkerProcess, character: str, bytes_as_json: int
) -> None:
    async def load(count: int) -> LoadReport:
        classes = np.where(ROWS[:, 0] > ROWS[0, 0], character * count, "no")
        model = fit(DecisionTreeClassifier(max_depth=3), ROWS, classes)
        return await worker.load(version_of(NAMES, ("kind",), "predict"), stored(model))

    most = (LABEL_BYTES_MAX - 2) // bytes_as_json
    assert character * most in (await load(most)).labels
    with pytest.raises(ModelRefused, match=r"takes more than 256 bytes as JSON.*train it on shorter class names"):
        await load(most + 1)


@pytest.mark.parametrize("unknown", ["error", "ignore"])
async def test_one_hot_of_texts(worker: WorkerProcess, unknown: str) -> None:
    frame = shop_frame(40)
    encode = ColumnTransformer([("city", OneHotEncoder(handle_unknown=unknown), ["city"])], remainder=StandardScaler())
    model = fit(make_pipeline(encode, LogisticRegression()), frame)
    version = version_of(("city", "amount", "age"))
    await worker.load(version, stored(model), text_features=("city",))
    numbers = np.column_stack([np.full(40, np.nan), frame["amount"], frame["age"]])
    texts: list[str | None] = [None if pd.isna(city) else str(city) for city in frame["city"]]
    outputs = await worker.call(version.version, rows_of(version.features, numbers, {"city": texts}), 10)
    np.testing.assert_allclose(outputs.values[:, 0], model.predict_proba(frame)[:, -1])


async def test_trees_on_categories(worker: WorkerProcess) -> None:
    frame = shop_frame(40)
    frame["city"] = frame["city"].fillna("none").astype("category")
    model = fit(HistGradientBoostingClassifier(max_iter=5, categorical_features=["city"]), frame)
    version = version_of(("city", "amount", "age"))
    await worker.load(version, stored(model), text_features=("city",))
    numbers = np.column_stack([np.full(40, np.nan), frame["amount"], frame["age"]])
    outputs = await worker.call(
        version.version, rows_of(version.features, numbers, {"city": frame["city"].tolist()}), 10
    )
    np.testing.assert_allclose(outputs.values[:, 0], model.predict_proba(frame)[:, -1])


async def test_pipeline_on_one_text(worker: WorkerProcess) -> None:
    words = ["fresh milk", "old bread", "fresh bread", "old milk"] * 15
    model = fit(make_pipeline(TfidfVectorizer(), LogisticRegression()), words)
    version = version_of(("search",))
    await worker.load(version, stored(model), text_features=("search",))
    rows = rows_of(("search",), np.full((60, 1), np.nan), {"search": list(words)})
    outputs = await worker.call(version.version, rows, 10)
    np.testing.assert_allclose(outputs.values[:, 0], model.predict_proba(words)[:, -1])


@pytest.mark.parametrize(
    "model",
    [
        RandomForestClassifier(60, n_jobs=-1),
        RandomForestClassifier(5, n_jobs=4),
        KNeighborsClassifier(n_jobs=-1),
        OneVsRestClassifier(LogisticRegression(), n_jobs=-1),
        HistGradientBoostingClassifier(max_iter=60, min_samples_leaf=2),
        MLPClassifier((600, 600), max_iter=2),
    ],
    ids=["joblib, all", "joblib, four", "pairs, all", "meta, all", "OpenMP", "BLAS"],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
async def test_a_worker_computes_in_one_thread_whatever_its_model_asks_for(worker: WorkerProcess, model: Any) -> None:
    fit(model)
    version = version_of(NAMES)
    await worker.load(version, stored(model))
    rows = np.tile(ROWS, (200, 1))
    counts = set()
    call = asyncio.create_task(worker.call(version.version, rows_of(NAMES, rows), 60))
    while not call.done():
        counts.update(re.findall(r"Threads:\t(\d+)", process_status(worker)))
        await asyncio.sleep(0.001)
    outputs = await call
    counts.update(re.findall(r"Threads:\t(\d+)", process_status(worker)))
    assert counts == {"1"}
    assert not outputs.errors
    np.testing.assert_allclose(outputs.values[:60, 0], model.predict_proba(ROWS)[:, -1], atol=1e-6)


async def test_row_without_finite_output_fails_alone(worker: WorkerProcess) -> None:
    version = version_of(NAMES, ("a", "b", "c"), "transform")
    await worker.load(version, stored(FunctionTransformer(np.log).fit(ROWS)))
    rows = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [2.0, 2.0, -1.0]])
    outputs = await worker.call(version.version, rows_of(NAMES, rows), 10)
    assert set(outputs.errors) == {1, 2}
    assert "'b'" in outputs.errors[1]
    assert outputs.values[0].tolist() == [0, 0, 0]


async def test_a_model_that_raises_keeps_its_worker(worker: WorkerProcess) -> None:
    version = version_of(NAMES)
    await worker.load(version, stored(fit(LogisticRegression())))
    with pytest.raises(CallFailed, match="NaN"):
        await worker.call(version.version, rows_of(NAMES, np.full((2, 3), np.nan)), 10)
    assert (await worker.call(version.version, rows_of(NAMES, ROWS), 10)).values.shape == (60, 1)


async def test_past_its_deadline_a_worker_is_killed(server: WarmServer) -> None:
    worker = await server.spawn("slow", MEMORY_BYTES)
    version = version_of(NAMES)
    await worker.load(version, stored(fit(RandomForestClassifier(200))))
    with pytest.raises(WorkerLost, match="deadline"):
        await worker.call(version.version, rows_of(NAMES, np.tile(ROWS, (500, 1))), 0.01)
    await worker.lost.wait()
    with pytest.raises(WorkerLost):
        await worker.call(version.version, rows_of(NAMES, ROWS), 10)


async def test_an_answer_that_came_while_the_node_stood_still_is_taken(worker: WorkerProcess) -> None:
    version = version_of(NAMES)
    await worker.load(version, stored(fit(LogisticRegression())))
    rows = rows_of(NAMES, ROWS)
    assert (await called_while_the_loop_stands_still(worker, version.version, rows)).values.shape == (60, 1)
    assert (await worker.call(version.version, rows, 10)).values.shape == (60, 1)


async def test_cancelled_call_ends_the_worker(server: WarmServer) -> None:
    worker = await server.spawn("cancelled", MEMORY_BYTES)
    version = version_of(NAMES)
    await worker.load(version, stored(fit(RandomForestClassifier(200))))
    call = asyncio.create_task(worker.call(version.version, rows_of(NAMES, np.tile(ROWS, (500, 1))), 60))
    await asyncio.sleep(0)
    call.cancel()
    await worker.lost.wait()
    assert call.cancelled()


async def test_killed_worker_is_noticed_idle_and_in_a_call(server: WarmServer) -> None:
    worker = await server.spawn("killed", MEMORY_BYTES)
    version = version_of(NAMES)
    await worker.load(version, stored(fit(LogisticRegression())))
    os.kill(worker.pid, signal.SIGSTOP)
    call = asyncio.create_task(worker.call(version.version, rows_of(NAMES, ROWS), 60))
    await asyncio.sleep(0)
    worker.kill()
    with pytest.raises(WorkerLost):
        await call
    await worker.lost.wait()
    await (await server.spawn("next", MEMORY_BYTES)).close()
    assert not process_status(worker)  # reaped
    worker.kill()
    await worker.close()


async def test_too_much_memory_is_refused(server: WarmServer) -> None:
    worker = await server.spawn("hungry", 64 * MIB)
    model = fit(LogisticRegression())
    model.padding_ = np.ones(7 * MIB)
    with pytest.raises(ModelRefused, match="memory"):
        await worker.load(version_of(NAMES), stored(model))
    await worker.load(version_of(NAMES), stored(fit(LogisticRegression())))
    await worker.close()


async def test_required_layer_that_is_missing_stops_the_worker() -> None:
    async with warm_server(SandboxSettings(required=frozenset({"own_user"}), own_user_first=None)) as server:
        with pytest.raises(SandboxUnavailable, match="own_user"):
            await server.spawn("grocery", MEMORY_BYTES)


async def test_libraries_are_off_unless_allowed(worker: WorkerProcess) -> None:
    import lightgbm

    model = lightgbm.LGBMClassifier(n_estimators=2, verbose=-1).fit(ROWS, CLASSES)
    with pytest.raises(ModelRefused, match=r"lightgbm.sklearn.LGBMClassifier, which is not on the list"):
        await worker.load(version_of(NAMES), stored(model))


async def test_operator_can_allow_more() -> None:
    async with warm_server(SandboxSettings(extra_globals=("decimal Decimal call",))) as server:
        worker = await server.spawn("grocery", MEMORY_BYTES)
        from decimal import Decimal

        model = fit(LogisticRegression())
        model.price_ = Decimal("1.5")
        await worker.load(version_of(NAMES), stored(model))


async def test_dead_warm_server_is_started_again() -> None:
    async with warm_server() as server:
        worker = await server.spawn("grocery", MEMORY_BYTES)
        assert server._process is not None
        os.kill(server._process.pid, signal.SIGKILL)
        await worker.lost.wait()
        await asyncio.to_thread(server._process._process.wait)
        again = await server.spawn("grocery", MEMORY_BYTES)
        await again.load(version_of(NAMES), stored(fit(LogisticRegression())))


DRIVER = """
import asyncio, sys
from node.kernel.clock import SystemClock
from tenants.sandbox import SandboxSettings
from tenants.workers import WarmServer

async def main():
    server = WarmServer(SandboxSettings(), SystemClock())
    worker = await server.spawn("grocery", 1 << 28)
    print(server._process.pid, worker.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


async def test_all_die_with_the_node() -> None:
    driver = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DRIVER, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert driver.stdout is not None
    while len(words := (await driver.stdout.readline()).split()) != 2:
        assert words, "the driver ended early"
    handles = [os.pidfd_open(int(word)) for word in words]
    driver.kill()
    for handle in handles:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(handle, ended.set)
        async with asyncio.timeout(10):
            await ended.wait()
        asyncio.get_running_loop().remove_reader(handle)
        os.close(handle)
    await driver.wait()


def answer_bytes(answer: messages.Answer, body: bytes = b"") -> bytes:
    return b"".join(bytes(part) for part in messages.encode(answer, body))


@asynccontextmanager
async def stand_in() -> AsyncIterator[tuple[WorkerProcess, socket.socket]]:
    """A worker that says what the test writes into its end of the socket, and that is to be killed by the end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    process = await asyncio.create_subprocess_exec("sleep", "600")
    transport, frames = await asyncio.get_running_loop().create_unix_connection(_Frames, sock=ours)
    with theirs:
        yield (
            WorkerProcess("evil", process.pid, os.pidfd_open(process.pid), transport, frames, MIB, SystemClock()),
            theirs,
        )
    assert await process.wait() == -signal.SIGKILL


EVIL: dict[str, bytes] = {
    "not a message": b"\xff" * 64,
    "an endless frame": messages.PREFIX.pack(10, 2**31),
    "another answer": answer_bytes(messages.Unloaded()),
    "a pickle": messages.PREFIX.pack(20, 0) + b"\x80\x04cos\nsystem\nX\x00\x00\x00\x00R.",
    "too few rows": answer_bytes(messages.Called(1, 1, 0.0), bytes(8)),
    "a body that does not fit": answer_bytes(messages.Called(2, 1, 0.0), bytes(8)),
    "rows that are not there": answer_bytes(messages.Called(2, 1, 0.0, {9: "x"}), bytes(16)),
    "a negative cost": answer_bytes(messages.Called(2, 1, -1.0), bytes(16)),
    "a cost that is no number": answer_bytes(messages.Called(2, 1, float("nan")), bytes(16)),
    "the end": b"",
}


async def test_an_index_that_names_no_class_is_that_rows_error() -> None:
    async with stand_in() as (worker, theirs):
        worker._versions["v"] = replace(version_of(("a",), method="predict"), labels=("no", "yes"))
        indexes = np.array([0.0, 1.0, 2.0, -1.0, 0.5, 1e300])
        call = asyncio.create_task(worker.call("v", rows_of(("a",), indexes.reshape(-1, 1)), 10))
        await asyncio.sleep(0)
        theirs.sendall(answer_bytes(messages.Called(len(indexes), 1, 0.0), indexes.tobytes()))
        outputs = await call
        assert sorted(outputs.errors) == [2, 3, 4, 5]
        assert "not one of the model's classes" in outputs.errors[2]
        await worker.close()


@pytest.mark.parametrize("what", EVIL)
async def test_worker_in_an_attackers_hands_is_killed(what: str) -> None:
    async with stand_in() as (worker, theirs):
        worker._versions["v"] = version_of(("a",))
        call = asyncio.create_task(worker.call("v", rows_of(("a",), [[1.0], [2.0]]), 10))
        await asyncio.sleep(0)
        theirs.sendall(EVIL[what])
        if what == "the end":
            theirs.shutdown(socket.SHUT_RDWR)
        with pytest.raises(WorkerLost):
            await call
        await worker.lost.wait()


async def test_a_worker_that_reports_a_class_no_model_may_have_is_killed() -> None:
    """It would be in each inference, of as many rows as its tenant has."""
    labels = ("no", "x" * LABEL_BYTES_MAX)
    report = messages.Loaded(None, 1, 1, labels, 0.0, 0.0, 0, "Classifier")
    async with stand_in() as (worker, theirs):
        load = asyncio.create_task(worker.load(version_of(("a",), method="predict"), b"model"))
        await asyncio.sleep(0)
        theirs.sendall(answer_bytes(report))
        with pytest.raises(WorkerLost, match="text class"):
            await load
        await worker.lost.wait()


async def test_what_a_worker_says_of_a_model_is_cut_to_what_is_kept_of_it() -> None:
    """It is in status files, in the kept registry or the catalog, and in what a terminal shows."""
    lies = messages.Loaded(None, 1, 1, (), 0.0, 0.0, -5, "\x1b[2J" + "x" * 100_000, ("y" * 1000,) * 20)
    async with stand_in() as (worker, theirs):
        load = asyncio.create_task(worker.load(version_of(("a",)), b"model"))
        await asyncio.sleep(0)
        theirs.sendall(answer_bytes(lies))
        told = (await load).told()
    assert len(encode_report(told)) < 8192
    assert told.class_name.isprintable()
    assert told.memory_bytes == 0


async def test_a_worker_that_is_ready_before_it_is_waited_for_is_taken() -> None:
    """A node whose loop is busy reads its first message before it goes on with the start."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    process = await asyncio.create_subprocess_exec("sleep", "600")
    with theirs:
        theirs.sendall(answer_bytes(messages.Ready((), {})))
        transport, frames, first = await connected(ours)
        await asyncio.wait({first})
        worker = WorkerProcess("new", process.pid, os.pidfd_open(process.pid), transport, frames, MIB, SystemClock())
        await worker.ready(first)
        assert not worker.lost.is_set()
        await worker.close()
    assert await process.wait() == -signal.SIGKILL


async def test_worker_that_speaks_unasked_is_killed() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    process = await asyncio.create_subprocess_exec("sleep", "600")
    transport, frames = await asyncio.get_running_loop().create_unix_connection(_Frames, sock=ours)
    worker = WorkerProcess("evil", process.pid, os.pidfd_open(process.pid), transport, frames, MIB, SystemClock())
    with theirs:
        theirs.sendall(answer_bytes(messages.Unloaded()))
        await worker.lost.wait()
    assert await process.wait() == -signal.SIGKILL
