"""The model pool with real workers: answers in order, poison rows found, lost workers replaced, fair shares, bounds."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import joblib
import numpy as np
import pytest
import pytest_asyncio
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from waiting import until

from node.kernel import limits
from node.kernel.clock import ManualClock, SystemClock
from node.kernel.errors import BoundExceeded, NotFound
from node.kernel.limits import (
    BESIDE_LOSSES_MAX,
    FAILED_ROWS_MIN,
    FATAL_ROWS_MAX,
    ISOLATION_CALLS_MAX,
    KIB,
    WORKER_BACKOFF_MS_MAX,
)
from node.kernel.ports import ModelRunner
from node.kernel.supervise import Supervisor
from node.kernel.types import BACKGROUND, FeatureRows, ModelName, ModelOutputs, ModelVersion
from tenants import messages
from tenants import pool as pool_module
from tenants.manifest import TenantSettings
from tenants.pool import FETCH_SECONDS_MAX, ModelPool
from tenants.pool_statistics import TenantStatistics, VersionStatistics
from tenants.sandbox import SandboxSettings
from tenants.workers import WarmServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

RNG = np.random.default_rng(7)
X = RNG.normal(size=(400, 3))
Y = (X.sum(axis=1) > 0).astype(int)
FEATURES = ("amount", "visits", "age")
LINEAR = LogisticRegression().fit(X, Y)


class Models:
    """Model files by sha256, as the blob store of a node holds them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fetches = 0

    def add(
        self, model: object, tenant: str = "ads", name: str = "bid", deadline_ms: int = 5000,
        features: tuple[str, ...] = FEATURES,
    ) -> ModelVersion:  # fmt: skip
        stream = io.BytesIO()
        joblib.dump(model, stream)
        blob = hashlib.sha256(stream.getvalue()).hexdigest()
        self.files[blob] = stream.getvalue()
        version = hashlib.sha256(f"{blob} {tenant} {name}".encode()).hexdigest()
        return ModelVersion(
            ModelName(tenant, name),
            version,
            blob,
            ("transaction",),
            features,
            ("score",),
            "predict_proba",
            0,
            deadline_ms,
        )

    async def fetch(self, blob: str) -> bytes:
        self.fetches += 1
        try:
            return self.files[blob]
        except KeyError:
            raise NotFound(f"no file {blob} here") from None


class Running:
    def __init__(self, pool: ModelPool, models: Models, failing: list[tuple[ModelName, str, str]]) -> None:
        self.pool = pool
        self.models = models
        self.failing = failing

    def tenant(self, name: str = "ads") -> TenantStatistics:
        return next(tenant for tenant in self.pool.statistics().tenants if tenant.tenant == name)

    def version(self, version: ModelVersion) -> VersionStatistics:
        tenant = self.tenant(version.name.tenant)
        return next(known for known in tenant.versions if known.version == version.version)

    def held(self, name: str = "ads") -> tuple[str, ...]:
        """The versions in the memory of the tenant's worker."""
        worker = self.tenant(name).worker
        assert worker is not None
        return worker.versions

    def pid(self, name: str = "ads") -> int:
        worker = self.tenant(name).worker
        assert worker is not None
        return worker.pid


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[WarmServer]:
    server = WarmServer(SandboxSettings(required=frozenset()), SystemClock())
    await server.start()
    yield server
    await server.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def running(server: WarmServer) -> AsyncIterator[Running]:
    supervisor, models = Supervisor(), Models()
    failing: list[tuple[ModelName, str, str]] = []
    pool = ModelPool(
        server, models.fetch, SystemClock(), supervisor, parallel=1,
        on_failing=lambda name, version, reason, _: failing.append((name, version, reason)),
    )  # fmt: skip
    runner: ModelRunner = pool  # mypy holds the pool to the port
    assert runner.rows_queued_max(ModelName("new", "one")) > 0
    yield Running(pool, models, failing)
    await pool.stop()
    assert supervisor.failure is None, "a background task died"
    await supervisor.stop()


async def answered(future: asyncio.Future[ModelOutputs]) -> ModelOutputs:
    async with asyncio.timeout(20):
        return await future


def rows_of(numbers: np.ndarray, names: tuple[str, ...] = FEATURES) -> FeatureRows:
    return FeatureRows(names, np.ascontiguousarray(numbers, dtype=np.float64))


async def test_split_and_joined_batches_come_back_in_order(running: Running) -> None:
    version = running.models.add(LINEAR)
    sizes = [1, 3, 2000, 1, 700, 4096, 2]
    numbers = [RNG.normal(size=(size, 3)) for size in sizes]
    futures = [running.pool.submit(version, rows_of(part)) for part in numbers]
    for part, future in zip(numbers, futures, strict=True):
        outputs = await answered(future)
        assert not outputs.errors
        np.testing.assert_allclose(outputs.values[:, 0], LINEAR.predict_proba(part)[:, 1], rtol=1e-12)
    statistics = running.version(version)
    assert statistics.rows == sum(sizes)
    assert statistics.calls != len(sizes), "small ones share a call, large ones are split"
    assert statistics.rows_queued == 0
    assert running.tenant().cpu_seconds > 0
    assert (await answered(running.pool.submit(version, rows_of(np.empty((0, 3)))))).values.shape == (0, 1)


async def test_calls_of_a_version_that_is_unloaded_stay_counted(running: Running) -> None:
    replaced, version = running.models.add(LINEAR), running.models.add(choosy("ignore"), features=("shop",))
    running.pool.admit(replaced)
    await answered(running.pool.submit(replaced, rows_of(X)))
    calls = running.tenant().calls
    running.pool.admit(version, ("shop",))
    running.pool.retire(replaced)
    await until(lambda: [one.version for one in running.tenant().versions] == [version.version])
    assert running.tenant().calls == calls >= 1


async def test_rows_that_a_model_raises_on_get_errors_and_the_others_their_outputs(running: Running) -> None:
    version = running.models.add(LINEAR)
    numbers = RNG.normal(size=(1500, 3))
    bad = [3, 700, 701, 1499]
    numbers[bad, 1] = np.nan
    numbers[9, 2] = np.inf
    outputs = await answered(running.pool.submit(version, rows_of(numbers)))
    assert sorted(outputs.errors) == [3, 9, 700, 701, 1499]
    assert "NaN" in outputs.errors[3]
    assert "infinity" in outputs.errors[9]
    good = np.setdiff1d(np.arange(1500), list(outputs.errors))
    np.testing.assert_allclose(outputs.values[good, 0], LINEAR.predict_proba(numbers[good])[:, 1], rtol=1e-12)
    assert np.isnan(outputs.values[bad]).all()
    assert running.tenant().restarts == 0, "a model that raises costs no worker"


async def test_many_rows_with_the_same_gap_cost_few_calls(running: Running) -> None:
    version = running.models.add(LINEAR)
    await answered(running.pool.submit(version, rows_of(RNG.normal(size=(4000, 3)))))
    before = running.version(version).calls
    numbers = RNG.normal(size=(1000, 3))
    numbers[::2, 0] = np.nan
    outputs = await answered(running.pool.submit(version, rows_of(numbers)))
    assert sorted(outputs.errors) == list(range(0, 1000, 2))
    assert running.version(version).calls - before <= 40, "500 rows were not tried one by one"
    assert running.version(version).rows_failed == 500


async def test_a_text_no_model_has_seen_is_found_among_many_rows(running: Running) -> None:
    shops = np.array([["north"], ["south"], ["east"]] * 40, dtype=object)
    model = make_pipeline(OneHotEncoder(handle_unknown="error"), LogisticRegression()).fit(shops, [0, 1, 1] * 40)
    version = running.models.add(model, features=("shop",))
    texts: list[str | None] = ["north", "south", "east"] * 100
    texts[17], texts[250] = "moon", None
    outputs = await answered(
        running.pool.submit(version, FeatureRows(("shop",), np.full((300, 1), np.nan), {"shop": texts}))
    )
    assert sorted(outputs.errors) == [17, 250]
    assert "moon" in outputs.errors[17]
    assert np.isfinite(outputs.values[[0, 16, 18, 299]]).all()


async def test_the_search_for_bad_rows_is_bounded(running: Running) -> None:
    shops = np.array([["north"], ["south"], ["east"]] * 40, dtype=object)
    model = make_pipeline(OneHotEncoder(handle_unknown="error"), LogisticRegression()).fit(shops, [0, 1, 1] * 40)
    version = running.models.add(model, features=("shop",))
    count = 1500
    fine = FeatureRows(("shop",), np.full((count, 1), np.nan), {"shop": ["north", "south", "east"] * (count // 3)})
    for _ in range(3):
        assert not (await answered(running.pool.submit(version, fine))).errors
    before = running.version(version).calls
    texts: list[str | None] = ["north" if row % 2 else "moon" for row in range(count)]
    submitted = running.pool.submit(version, FeatureRows(("shop",), np.full((count, 1), np.nan), {"shop": texts}))
    outputs = await answered(submitted)
    assert set(range(0, count, 2)) <= set(outputs.errors)
    answered_rows = [row for row in range(count) if row not in outputs.errors]
    assert np.isfinite(outputs.values[answered_rows]).all()
    assert "said of" in " ".join(outputs.errors.values()), "rows that could not be cleared are told so"
    assert running.version(version).calls - before <= 4 * ISOLATION_CALLS_MAX, "one by one it would be thrice that"
    assert running.version(version).rows_queued == 0


async def test_a_killed_worker_is_replaced_and_no_row_is_lost(running: Running) -> None:
    version = running.models.add(LINEAR)
    await answered(running.pool.submit(version, rows_of(X)))
    killed = running.pid()
    futures = [running.pool.submit(version, rows_of(RNG.normal(size=(900, 3)))) for _ in range(4)]
    os.kill(killed, signal.SIGKILL)
    for future in futures:
        outputs = await answered(future)
        assert not outputs.errors
        assert np.isfinite(outputs.values).all()
    await until(lambda: running.tenant().restarts == 1)
    await answered(running.pool.submit(version, rows_of(X)))
    assert running.pid() != killed
    assert running.tenant().backoff_ms == 0, "a call that worked ends the back-off"


async def test_rows_that_take_the_worker_along_are_found_and_the_rest_is_answered(running: Running) -> None:
    """A token pattern that backtracks for ages on one kind of text: the call passes its deadline and is killed."""
    words = ["ab aab", "aaab", "xab ab", "b"] * 20
    vectorizer = CountVectorizer(token_pattern=r"(?:a+)+b")
    model = make_pipeline(vectorizer, MultinomialNB()).fit(words, [0, 1, 1, 0] * 20)
    version = running.models.add(model, features=("query",), deadline_ms=500)
    texts: list[str | None] = [*words[:9], "a" * 60, *words[:3]]
    rows = FeatureRows(("query",), np.full((13, 1), np.nan), {"query": texts})
    outputs = await answered(running.pool.submit(version, rows))
    assert list(outputs.errors) == [9]
    assert "lost 2 times" in outputs.errors[9]
    assert "deadline" in outputs.errors[9]
    good = [row for row in range(13) if row != 9]
    expected = model.predict_proba([texts[row] for row in good])[:, 1]
    np.testing.assert_allclose(outputs.values[good, 0], expected, rtol=1e-12)


async def test_a_version_with_too_many_fatal_rows_is_failing_and_takes_no_more_workers_along(running: Running) -> None:
    words = ["ab aab", "aaab", "xab ab", "b"] * 20
    vectorizer = CountVectorizer(token_pattern=r"(?:a+)+b")
    model = make_pipeline(vectorizer, MultinomialNB()).fit(words, [0, 1, 1, 0] * 20)
    version = running.models.add(model, features=("query",), deadline_ms=200)

    def submitted(text: str) -> asyncio.Future[ModelOutputs]:
        return running.pool.submit(version, FeatureRows(("query",), np.full((1, 1), np.nan), {"query": [text]}))

    for _ in range(FATAL_ROWS_MAX):
        assert not running.failing
        assert not (await answered(submitted("ab"))).errors  # which ends the back-off too
        assert "lost 2 times" in (await answered(submitted("a" * 60))).errors[0]
    await until(lambda: running.failing)
    restarts = running.tenant().restarts
    for text in ("ab", "a" * 60):
        assert f"{FATAL_ROWS_MAX} rows" in (await answered(submitted(text))).errors[0]
    assert [(name, hash_) for name, hash_, _ in running.failing] == [(version.name, version.version)]
    healthy = running.models.add(LINEAR, name="other")
    assert not (await answered(running.pool.submit(healthy, rows_of(X)))).errors
    assert running.tenant().restarts <= restarts + 1, "the last death may be told only now"


async def test_a_version_beside_the_live_one_takes_two_workers_along_at_most(running: Running) -> None:
    """However many of its rows do, and whatever it answers in between: the live version shares the worker."""
    words = ["ab aab", "aaab", "xab ab", "b"] * 20
    model = make_pipeline(CountVectorizer(token_pattern=r"(?:a+)+b"), MultinomialNB()).fit(words, [0, 1, 1, 0] * 20)
    live, beside = running.models.add(LINEAR), running.models.add(model, features=("query",), deadline_ms=200)
    running.pool.admit(live)
    running.pool.admit(beside, beside=True)
    assert not (await answered(running.pool.submit(live, rows_of(X)))).errors
    texts: list[str | None] = ["ab", "a" * 60] * 32
    rows = FeatureRows(("query",), np.full((64, 1), np.nan), {"query": texts})
    shadow = await answered(running.pool.submit(beside, rows, BACKGROUND))
    assert not (await answered(running.pool.submit(live, rows_of(X)))).errors
    assert running.tenant().restarts == BESIDE_LOSSES_MAX
    ((name, failed, reason),) = running.failing
    assert (name, failed) == (beside.name, beside.version)
    assert "beside the live version" in reason
    assert len(shadow.errors) == 64


def raising(count: int) -> FeatureRows:
    """Rows with a text that a `choosy` model raises on."""
    return FeatureRows(("shop",), np.full((count, 1), np.nan), {"shop": ["moon"] * count})


def choosy(handle_unknown: str) -> Any:
    shops = np.array([["north"], ["south"]] * 40, dtype=object)
    return make_pipeline(OneHotEncoder(handle_unknown=handle_unknown), LogisticRegression()).fit(shops, [0, 1] * 40)


async def test_a_version_that_raises_on_most_rows_is_failing(running: Running) -> None:
    version = running.models.add(choosy("error"), features=("shop",))
    fine = FeatureRows(("shop",), np.full((100, 1), np.nan), {"shop": ["north"] * 100})
    for _ in range(6):
        assert not (await answered(running.pool.submit(version, fine))).errors
        assert len((await answered(running.pool.submit(version, raising(60)))).errors) == 60
    assert not running.failing, "three of eight rows are not most"
    while not running.failing:
        await answered(running.pool.submit(version, raising(100)))
    assert "most rows" in running.failing[0][2]
    assert "moon" in running.failing[0][2]
    assert running.version(version).rows_failed < 360 + 4 * FAILED_ROWS_MIN
    assert running.held() == (version.version,)
    running.pool.retire(version)
    await until(lambda: running.held() == ())
    assert running.tenant().restarts == 0, "what it held is free again, in the same worker"


async def test_rows_with_gaps_are_not_to_the_version_s_blame(running: Running) -> None:
    version = running.models.add(LINEAR)
    numbers = RNG.normal(size=(FAILED_ROWS_MIN, 3))
    numbers[:, 1] = np.nan
    for _ in range(4):
        assert len((await answered(running.pool.submit(version, rows_of(numbers)))).errors) == FAILED_ROWS_MIN
    assert not running.failing


@pytest.mark.parametrize("takes_over", [True, False])
async def test_what_is_queued_when_a_version_fails_runs_on_the_one_that_takes_over(
    server: WarmServer, monkeypatch: pytest.MonkeyPatch, takes_over: bool
) -> None:
    monkeypatch.setattr(pool_module, "HANDOVER_SECONDS_MAX", 5.0 if takes_over else 0.2)
    supervisor, models = Supervisor(), Models()
    bad = models.add(choosy("error"), features=("shop",))
    good = models.add(choosy("ignore"), features=("shop",))
    failing = asyncio.Queue[bool]()

    def told(_name: ModelName, _version: str, _reason: str, at_fault: bool) -> bool:
        failing.put_nowait(at_fault)
        return True

    pool = ModelPool(server, models.fetch, SystemClock(), supervisor, parallel=1, on_failing=told)
    pool.admit(bad, ("shop",))
    futures = [pool.submit(bad, raising(FAILED_ROWS_MIN // 4)) for _ in range(40)]
    async with asyncio.timeout(20):
        assert await failing.get()
        futures.append(pool.submit(bad, raising(10)))
        if takes_over:
            pool.admit(good, ("shop",))
            pool.retire(bad)
        outputs = [await future for future in futures]
    first, last = outputs[0], outputs[-1]
    assert len(first.errors) == FAILED_ROWS_MIN // 4
    assert len(last.errors) == (0 if takes_over else 10)
    whole = sum(not one.errors for one in outputs)
    if takes_over:
        assert np.isfinite(last.values).all()
        assert whole > 20
    else:
        assert "most rows" in last.errors[0]
        assert whole == 0
    await pool.stop()
    assert supervisor.failure is None


async def test_a_version_that_cannot_load_fails_its_rows_and_tells(running: Running) -> None:
    version = running.models.add(LINEAR, features=("amount", "visits"))
    healthy = running.models.add(LINEAR, name="other")
    outputs = await answered(running.pool.submit(version, rows_of(X[:5, :2], ("amount", "visits"))))
    assert sorted(outputs.errors) == [0, 1, 2, 3, 4]
    assert "3 columns" in outputs.errors[0]
    assert [(name, hash_) for name, hash_, _ in running.failing] == [(version.name, version.version)]
    again = await answered(running.pool.submit(version, rows_of(X[:2, :2], ("amount", "visits"))))
    assert sorted(again.errors) == [0, 1]
    assert not (await answered(running.pool.submit(healthy, rows_of(X)))).errors


async def test_rows_wait_while_the_file_cannot_be_had(running: Running) -> None:
    version = running.models.add(LINEAR)
    file = running.models.files.pop(version.blob)
    future = running.pool.submit(version, rows_of(X))
    await until(lambda: "can't be had yet" in running.version(version).last_error)
    assert not future.done()
    running.models.files[version.blob] = file
    assert not (await answered(future)).errors


async def test_rows_of_a_file_that_never_comes_are_given_up(server: WarmServer) -> None:
    supervisor, models, clock = Supervisor(), Models(), ManualClock()
    failing: list[tuple[ModelName, str, str]] = []
    pool = ModelPool(
        server, models.fetch, clock, supervisor, parallel=1,
        on_failing=lambda name, version, reason, _: failing.append((name, version, reason)),
    )  # fmt: skip
    version = models.add(LINEAR)
    file = models.files.pop(version.blob)
    future = pool.submit(version, rows_of(X[:5]))
    await until(lambda: models.fetches > 0)
    clock.advance(FETCH_SECONDS_MAX * 1000 - 1)
    await until(lambda: models.fetches > 2)
    assert not future.done()
    clock.advance(1)
    outputs = await answered(future)
    assert sorted(outputs.errors) == [0, 1, 2, 3, 4]
    assert "no file" in outputs.errors[0]
    assert [hash_ for _, hash_, reason in failing if reason] == [version.version]

    models.files[version.blob] = file
    clock.advance(WORKER_BACKOFF_MS_MAX)
    assert not (await answered(pool.submit(version, rows_of(X)))).errors
    await pool.stop()
    assert supervisor.failure is None
    await supervisor.stop()


async def test_texts_over_the_bound_of_a_call_go_in_several(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "HEADER_BYTES_MAX", 64 * KIB)
    texts: list[str | None] = [("good" if row % 2 else "bad") + " x" * 500 for row in range(300)]
    model = make_pipeline(CountVectorizer(), LogisticRegression()).fit(texts, np.arange(300) % 2)
    version = running.models.add(model, features=("words",))
    texts[123] = "good " * 20_000
    rows = FeatureRows(("words",), np.full((300, 1), np.nan), {"words": texts})
    outputs = await answered(running.pool.submit(version, rows))
    assert sorted(outputs.errors) == [123]
    assert "WORKER_MESSAGE_BYTES_MAX" in outputs.errors[123]
    others = np.delete(np.arange(300), 123)
    expected = model.predict_proba([texts[row] for row in others])[:, 1]
    np.testing.assert_allclose(outputs.values[others, 0], expected, rtol=1e-9)


async def test_queues_are_bounded_by_the_tenant_s_setting(running: Running) -> None:
    version = running.models.add(LINEAR)
    running.pool.configure(TenantSettings("ads", rows_queued_max=1000))
    assert running.pool.rows_queued_max(version.name) == 1000
    first = running.pool.submit(version, rows_of(RNG.normal(size=(900, 3))))
    with pytest.raises(BoundExceeded, match="900 rows and can't take 101 more"):
        running.pool.submit(version, rows_of(RNG.normal(size=(101, 3))))
    await answered(first)
    assert not (await answered(running.pool.submit(version, rows_of(RNG.normal(size=(101, 3)))))).errors


async def test_tenants_share_by_weight_in_measured_cpu_time(running: Running) -> None:
    """A slow forest and a quick regression, three to one by weight: CPU time is shared, not calls or rows."""
    forest = RandomForestClassifier(20, max_depth=8, n_jobs=1).fit(X, Y)
    heavy = running.models.add(forest, tenant="heavy")
    light = running.models.add(LINEAR, tenant="light")
    running.pool.configure(TenantSettings("heavy", weight=1.0, rows_queued_max=65_536))
    running.pool.configure(TenantSettings("light", weight=3.0, rows_queued_max=65_536))
    for version in (heavy, light):
        await answered(running.pool.submit(version, rows_of(X)))
    numbers = RNG.normal(size=(4096, 3))

    def spent() -> dict[str, float]:
        return {tenant: running.tenant(tenant).cpu_seconds for tenant in ("heavy", "light")}

    before, ended = spent(), asyncio.Event()
    used: dict[str, float] = {}

    async def keep_busy(version: ModelVersion) -> None:
        while not ended.is_set():
            await running.pool.submit(version, rows_of(numbers))
            now = spent()
            if not ended.is_set() and now["light"] - before["light"] >= 0.6:
                used.update({tenant: now[tenant] - before[tenant] for tenant in now})  # both still have rows queued
                ended.set()

    async with asyncio.timeout(60):
        await asyncio.gather(*(keep_busy(version) for version in (heavy, light) for _ in range(8)))
    assert 2.5 <= used["light"] / used["heavy"] <= 3.6


async def test_a_quota_of_rows_holds_a_tenant_back_and_is_lifted_while_rows_wait(running: Running) -> None:
    version = running.models.add(LINEAR)
    running.pool.configure(TenantSettings("ads", rows_s_max=100.0))
    await answered(running.pool.submit(version, rows_of(X[:90])))
    started = SystemClock().monotonic()
    await answered(running.pool.submit(version, rows_of(X[:30])))
    lasted = SystemClock().monotonic() - started
    waiting = running.pool.submit(version, rows_of(RNG.normal(size=(4000, 3))))
    await until(lambda: running.pool.windows("ads")[0].held["quota"] > 0)
    window = running.pool.windows("ads")[0]
    assert window.asked == 4120
    assert 120 <= window.got <= 100 * (1 + window.seconds)
    assert window.asked == window.got + window.running + window.waiting
    running.pool.configure(TenantSettings("ads"))  # or these rows would take 40 seconds
    assert not (await answered(waiting)).errors
    assert lasted < 1.0, "the rows go on as the quota allows, not with the next event"
    assert running.pool.windows("ads")[0].got == 4120


async def test_another_memory_limit_gives_another_worker_and_loses_no_row(running: Running) -> None:
    version = running.models.add(LINEAR)
    running.pool.configure(TenantSettings("ads", memory_mb=700))
    await answered(running.pool.submit(version, rows_of(X)))
    before = running.pid()
    waiting = [running.pool.submit(version, rows_of(X)) for _ in range(5)]
    running.pool.configure(TenantSettings("ads", memory_mb=900))
    for future in waiting:
        assert not (await answered(future)).errors
    await until(lambda: running.tenant().worker is not None and running.pid() != before)
    assert (running.tenant().restarts, running.tenant().backoff_ms) == (0, 0), "nothing went wrong"
    assert not (await answered(running.pool.submit(version, rows_of(X)))).errors


async def test_a_retired_version_runs_its_queue_and_is_unloaded(running: Running) -> None:
    old, new = running.models.add(LINEAR), running.models.add(LogisticRegression(C=0.01).fit(X, Y))
    await answered(running.pool.submit(old, rows_of(X)))
    waiting = [running.pool.submit(old, rows_of(X)) for _ in range(5)]
    running.pool.retire(old)
    running.pool.admit(new)
    for future in waiting:
        assert not (await answered(future)).errors
    await until(lambda: [known.version for known in running.tenant().versions] == [new.version])
    await until(lambda: running.version(new).state == "loaded")
    worker = running.tenant().worker
    assert worker is not None
    assert worker.versions == (new.version,)


async def test_a_version_for_which_there_is_no_room_yet_comes_with_its_rows(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of those before it may wait for as long as the tenant's quota says."""
    monkeypatch.setattr(limits, "VERSIONS_PER_TENANT_MAX", 3)
    running.pool.configure(TenantSettings("ads", rows_s_max=1e-3))
    first = running.models.add(LINEAR)
    older = [replace(first, version=f"{number:064x}") for number in range(3)]
    waiting = []
    for version in older:
        running.pool.admit(version)
        waiting.append(running.pool.submit(version, rows_of(X[:2])))
        running.pool.retire(version)
    running.pool.admit(first)
    with pytest.raises(BoundExceeded, match="has 3 versions here already"):
        running.pool.submit(first, rows_of(X))
    running.pool.configure(TenantSettings("ads"))
    for future in waiting:
        assert not (await answered(future)).errors
    await until(lambda: len(running.tenant().versions) < 3)
    assert not (await answered(running.pool.submit(first, rows_of(X)))).errors
    await until(lambda: running.held() == (first.version,))
    await answered(running.pool.submit(older[0], rows_of(X[:2])))  # from a sequence log
    await until(lambda: running.held() == (first.version,))


async def test_one_file_of_a_tenant_is_in_the_node_s_memory_at_a_time(server: WarmServer) -> None:
    """A node that starts, or a worker that is lost, has all of a tenant's versions loaded anew."""
    supervisor, models, held = Supervisor(), Models(), list[int]()

    def count() -> int:
        return sum(known.model is not None for known in pool._tenants["ads"].versions.values())

    async def fetch(blob: str) -> bytes:
        held.append(count())
        return await models.fetch(blob)

    pool = ModelPool(server, fetch, SystemClock(), supervisor, parallel=1)
    running = Running(pool, models, [])
    for number in range(6):
        pool.admit(models.add(LINEAR, name=f"m{number}"))
    await until(lambda: all(known.state == "loaded" for known in running.tenant().versions))
    os.kill(running.pid(), signal.SIGKILL)
    await until(lambda: running.tenant().restarts == 1)
    await until(lambda: all(known.state == "loaded" for known in running.tenant().versions))
    assert len(held) >= 12
    assert max(held) <= 1
    await pool.stop()
    await supervisor.stop()


async def test_cancelled_rows_are_not_run(running: Running) -> None:
    version = running.models.add(LINEAR)
    futures = [running.pool.submit(version, rows_of(X)) for _ in range(3)]
    futures[1].cancel()
    await asyncio.gather(futures[0], futures[2])
    assert running.version(version).rows == 2 * len(X)


async def test_removing_a_tenant_answers_its_rows_and_ends_its_worker(running: Running) -> None:
    version = running.models.add(LINEAR)
    await answered(running.pool.submit(version, rows_of(X)))
    pid = running.pid()
    futures = [running.pool.submit(version, rows_of(RNG.normal(size=(4000, 3)))) for _ in range(2)]
    await asyncio.sleep(0)
    await running.pool.remove("ads")
    for future in futures:
        outputs = await answered(future)
        assert all("removed" in reason for reason in outputs.errors.values())
        assert len(outputs.errors) > 0
    await until(lambda: not os.path.exists(f"/proc/{pid}"))


async def test_stopping_gives_the_rows_back_to_the_caller(running: Running) -> None:
    version = running.models.add(LINEAR)
    futures = [running.pool.submit(version, rows_of(RNG.normal(size=(4000, 3)))) for _ in range(2)]
    await running.pool.stop()
    assert all(future.cancelled() for future in futures)
    with pytest.raises(BoundExceeded, match="stopping"):
        running.pool.submit(version, rows_of(X))
