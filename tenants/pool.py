"""Runs tenants' models in their workers: the asyncio shell around the scheduler.

One keeper task a tenant starts its worker, again with exponential back-off when it was lost, and loads and unloads
versions; while it does, the scheduler skips the tenant. One task a batch makes the call. Nothing polls: submissions and
ended batches wake the dispatcher, which runs once for all that happened in one turn of the loop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

import structlog

from node.kernel import limits
from node.kernel.clock import Clock
from node.kernel.errors import BoundExceeded, CallFailed, HeadraceError, ModelRefused, NotFound, WorkerLost
from node.kernel.supervise import Supervisor
from node.kernel.types import URGENT, FeatureRows, Ints, ModelName, ModelOutputs, ModelVersion
from tenants.batch import Batch, Piece, Submission, fail
from tenants.cost import CostEstimate
from tenants.cpu_time import cpu_seconds
from tenants.failure_rate import BatchVerdict, FailureRate, fatal_max, fatal_reason
from tenants.isolation import Isolation, first_pieces, halves, judge
from tenants.lending import SlotLook
from tenants.manifest import TenantSettings
from tenants.memory import measured
from tenants.pool_statistics import PoolStatistics, tenant_statistics
from tenants.pooled import PooledTenant, PooledVersion, key_of
from tenants.registry import Action, ConfigureTenant, GoLive, RemoveTenant, Retire, RunBeside
from tenants.scheduler import Dispatch, Scheduler
from tenants.shares import ShareWindow
from tenants.versions import alike
from tenants.workers import LoadReport, WarmServer, WorkerProcess

log = structlog.get_logger(__name__)

LOSSES_MAX = 2
"""A batch that took so many workers along is halved; a single row, given up."""
LOAD_LOSSES_MAX = 3
"""A version that took so many workers along while it was loaded is failing."""
FETCH_SECONDS_MAX = 60.0
"""A version whose file is not here for so long is failing: its rows must not hold up those after them for ever."""
DEADLINE_SHARE_MAX = 0.25
"""Of a call's deadline that a batch may be estimated to cost."""

HANDOVER_SECONDS_MAX = 5.0
"""Rows queued for a version that is failing wait so long for the one that is live instead."""

FailingCallback: TypeAlias = Callable[[ModelName, str, str, bool], bool | None]
"""Model, version, reason, and whether the model itself is to blame; gives whether another version may take over."""


class ModelPool:
    """The `ModelRunner` of a node. All of it runs on one event loop.

    `fetch` gives the bytes of a model file by sha256; while it fails, the rows wait and it is tried again, for
    FETCH_SECONDS_MAX where the file is simply not there (NotFound).
    `parallel` is the number of batches that run at once, one a CPU; a short one may run beside them. `on_failing`
    hears of each version that can't be run any more, with the reason, and with '' once it can again. Meanwhile its
    rows get that reason as their error; another load is tried at a submission once WORKER_BACKOFF_MS_MAX has passed.
    """

    def __init__(
        self,
        server: WarmServer,
        fetch: Callable[[str], Awaitable[bytes]],
        clock: Clock,
        supervisor: Supervisor,
        parallel: int,
        quantum_seconds: float = limits.QUANTUM_MS / 1000,
        on_failing: FailingCallback | None = None,
    ) -> None:
        self._server = server
        self._fetch_bytes = fetch
        self._clock = clock
        self._supervisor = supervisor
        self._on_failing = on_failing
        self._unaware = Scheduler(parallel, quantum_seconds)
        """Of the time: all use it by `_scheduler`."""
        self._alarm: asyncio.TimerHandle | None = None
        self._tenants: dict[str, PooledTenant] = {}
        self._woken = False
        self._stopped = False

    @property
    def _scheduler(self) -> Scheduler:
        """As of now."""
        self._unaware.advance(self._clock.monotonic())
        return self._unaware

    # What the node asks for

    def submit(self, version: ModelVersion, rows: FeatureRows, priority: int = URGENT) -> asyncio.Future[ModelOutputs]:
        """Queue rows; the future gives one output row, or one error, for each. Cancelling it drops what still waits.

        Raises BoundExceeded when the queue of the model is full: the caller keeps the rows in the sequence log.
        """
        if self._stopped:
            raise BoundExceeded(
                f"rows of {version.name} not taken: the pool is stopping; they stay in the sequence log"
            )
        future: asyncio.Future[ModelOutputs] = asyncio.get_running_loop().create_future()
        submission = Submission(rows, future, len(version.outputs), len(rows))
        if not len(rows):
            submission.fail("")
            return future
        tenant = self._tenant(version.name.tenant)
        known = tenant.versions.get(key_of(version)) or self._add_version(tenant, version, tuple(sorted(rows.texts)))
        if known.state == "failing" and not known.parked and not self._tried_again(tenant, known):
            known.rows_failed += len(rows)
            submission.fail(known.reason)
            return future
        self._check_queue(tenant, known, len(rows))
        self._scheduler.enqueue(submission, tenant.name, known.key, len(rows), priority)
        future.add_done_callback(partial(self._answered, tenant, known, submission))
        self._wake()
        return future

    def rows_queued_max(self, name: ModelName) -> int:
        tenant = self._tenants.get(name.tenant)
        return (tenant.settings if tenant else TenantSettings(name.tenant)).rows_queued_max

    def configure(self, settings: TenantSettings) -> None:
        """Add a tenant or change its settings; for another memory limit it gets another worker, once its batch ends."""
        tenant = self._tenants.get(settings.tenant)
        if tenant is None:
            self._add_tenant(settings)
            return
        tenant.settings = settings
        self._scheduler.set_weight(settings.tenant, settings.weight)
        self._scheduler.set_rows_s(settings.tenant, settings.rows_s_max)
        self._wake()
        tenant.changed.set()
        if tenant.worker is not None:
            self._server.set_weight(tenant.worker, settings.weight)

    def admit(self, version: ModelVersion, text_features: tuple[str, ...] = (), beside: bool = False) -> None:
        """Load a version before rows come for it; without it, or where there is no room, the first submission does."""
        tenant = self._tenant(version.name.tenant)
        tenant.admitted[key_of(version)] = version.name, beside
        known = tenant.versions.get(key_of(version))
        if known is None:
            try:
                known = self._add_version(tenant, version, text_features)
            except BoundExceeded as error:
                log.warning("version not loaded yet", model=str(version.name), reason=str(error))
                return
        known.beside, known.retired = beside, False
        if not beside:
            self._hand_over(tenant, known)

    def retire(self, version: ModelVersion) -> None:
        """Forget a version once the rows queued for it have run."""
        tenant = self._tenants.get(version.name.tenant)
        if tenant is None:
            return
        tenant.admitted.pop(key_of(version), None)
        known = tenant.versions.get(key_of(version))
        if known is not None:
            known.retired = True
            tenant.changed.set()

    def act(self, action: Action) -> None:
        """Follow the registry."""
        match action:
            case ConfigureTenant():
                self.configure(action.settings)
            case GoLive() | RunBeside():
                self.admit(action.version, action.text_features, isinstance(action, RunBeside))
            case Retire():
                self.retire(action.version)
            case RemoveTenant():
                self._supervisor.start(f"removal of {action.tenant}", self.remove(action.tenant))

    async def remove(self, tenant: str) -> None:
        """Forget a tenant; rows still queued get an error, its worker ends."""
        removed = self._tenants.pop(tenant, None)
        if removed is not None:
            for ticket in self._scheduler.remove_tenant(tenant):
                self._abandon(ticket, f"tenant {tenant} was removed")
            await self._close(removed)

    async def stop(self) -> None:
        """End the workers. What has no answer is cancelled: its rows are still in the caller's sequence log."""
        self._stopped = True
        for name in list(self._tenants):
            removed = self._tenants.pop(name)
            for ticket in self._scheduler.remove_tenant(name):
                self._abandon(ticket, "")
            await self._close(removed)

    async def keep_watch(self) -> None:
        """Measure the memory of the workers, and end those that compute unasked; for ever."""
        while True:
            await measured([tenant.worker for tenant in self._tenants.values() if tenant.worker is not None])
            for tenant in list(self._tenants.values()):
                self._charge_unasked(tenant)
            await asyncio.sleep(limits.WORKER_LOOK_MS / 1000)

    def _charge_unasked(self, tenant: PooledTenant) -> None:
        worker = tenant.worker
        if worker is None:
            return
        seconds, quiet = worker.unasked()
        self._scheduler.charge(tenant.name, seconds)
        if quiet and seconds > limits.WORKER_UNASKED_MS_MAX / 1000:
            reason = f"its worker computed for {seconds:.1f} s though nothing was asked of it, and was killed"
            for known in [known for known in tenant.versions.values() if known.state == "loaded"]:
                self._failing(tenant, known, reason)
            self._dying(tenant, worker, reason)

    def statistics(self) -> PoolStatistics:
        shares = self._scheduler.statistics()
        return PoolStatistics(tuple(tenant_statistics(tenant, shares) for tenant in self._tenants.values()), shares)

    def windows(self, tenant: str) -> tuple[ShareWindow, ...]:
        """What the tenant asked for and got of late, and what held it back. Raises NotFound."""
        return self._scheduler.windows(tenant)

    # Tenants and versions

    def _tenant(self, name: str) -> PooledTenant:
        return self._tenants.get(name) or self._add_tenant(TenantSettings(name))

    def _add_tenant(self, settings: TenantSettings) -> PooledTenant:
        self._scheduler.add_tenant(settings.tenant, settings.weight)
        self._scheduler.set_rows_s(settings.tenant, settings.rows_s_max)
        self._scheduler.block(settings.tenant)
        tenant = self._tenants[settings.tenant] = PooledTenant(settings)
        tenant.idle.set()
        tenant.keeper = self._supervisor.start(f"worker of {settings.tenant}", self._keep(tenant))
        return tenant

    def _add_version(
        self, tenant: PooledTenant, version: ModelVersion, text_features: tuple[str, ...]
    ) -> PooledVersion:
        if len(tenant.versions) >= limits.VERSIONS_PER_TENANT_MAX:
            raise BoundExceeded(
                f"version {version.short_version} of {version.name} not taken: tenant {tenant.name} has"
                f" {limits.VERSIONS_PER_TENANT_MAX} versions here already; retire some"
            )
        added = PooledVersion(version, text_features)
        _, added.beside = tenant.admitted.get(added.key, (None, False))
        # Rows of a version that was replaced still come from sequence logs: it runs them, and goes again.
        running = any(name == version.name for name, _ in tenant.admitted.values())
        added.retired = running and added.key not in tenant.admitted
        tenant.versions[added.key] = added
        self._schedule(tenant, added)
        self._fetch_again(tenant, added)
        return added

    def _schedule(self, tenant: PooledTenant, known: PooledVersion) -> None:
        call_seconds_max = known.version.deadline_ms / 1000 * DEADLINE_SHARE_MAX
        self._scheduler.add_model(tenant.name, known.key, known.version.weight, CostEstimate(), call_seconds_max)
        self._scheduler.block(tenant.name, known.key)

    def _check_queue(self, tenant: PooledTenant, asked: PooledVersion, rows: int) -> None:
        held = sum(
            self._scheduler.rows_held(tenant.name, known.key)
            for known in tenant.versions.values()
            if (known.version.name, known.beside) == (asked.version.name, asked.beside)
        )
        if held and held + rows > tenant.settings.rows_queued_max:  # alone, any chunk runs: a bound may be lowered
            raise BoundExceeded(
                f"{asked.version.name} holds {held} rows and can't take {rows} more: its tenant's rows_queued_max is"
                f" {tenant.settings.rows_queued_max}; keep them and submit again when some are done"
            )

    def _tried_again(self, tenant: PooledTenant, known: PooledVersion) -> bool:
        """Whether a failing version is given another chance now."""
        if self._clock.monotonic() - known.failed_at < limits.WORKER_BACKOFF_MS_MAX / 1000:
            return False
        known.losses = 0
        known.fatal_rows.clear()
        known.rate = FailureRate()
        self._fetch_again(tenant, known)
        return True

    def _fetch_again(self, tenant: PooledTenant, known: PooledVersion) -> None:
        known.state = "fetching"
        known.fetch = self._supervisor.start(f"fetch {known.version.name}", self._fetch(tenant, known))

    async def _fetch(self, tenant: PooledTenant, known: PooledVersion) -> None:
        backoff_ms = limits.WORKER_BACKOFF_MS_MIN
        missing_since = math.inf
        while not _holds_a_file(tenant):  # else it is fetched in its turn: memory has one of a tenant's
            try:
                model = await self._fetch_bytes(known.version.blob)
                known.model = None if _holds_a_file(tenant) else model
                break
            except (HeadraceError, OSError) as error:
                now = self._clock.monotonic()
                missing_since = min(missing_since, now) if isinstance(error, NotFound) else math.inf
                if now - missing_since >= FETCH_SECONDS_MAX:
                    reason = f"its file was not here for {FETCH_SECONDS_MAX:g} s: {error}"
                    self._failing(tenant, known, reason, at_fault=False)
                    tenant.changed.set()
                    return
                known.last_error = f"its file can't be had yet: {error}"
                log.warning("model file not fetched", model=str(known.version.name), error=str(error))
            await asyncio.sleep(backoff_ms / 1000)
            backoff_ms = min(backoff_ms * 2, limits.WORKER_BACKOFF_MS_MAX)
        known.state = "fetched"
        tenant.changed.set()

    async def _close(self, tenant: PooledTenant) -> None:
        tasks = [tenant.keeper, *(known.fetch for known in tenant.versions.values())]
        pending = [task for task in tasks if task is not None and not task.done()]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        if tenant.worker is not None:
            await tenant.worker.close()
        await tenant.idle.wait()

    # The keeper of one tenant's worker

    async def _keep(self, tenant: PooledTenant) -> None:
        while True:
            tenant.changed.clear()
            if tenant.worker is not None and (tenant.lost or tenant.worker.lost.is_set()):
                await tenant.worker.lost.wait()
                self._lost(tenant, tenant.last_error or "the worker ended")
            elif tenant.worker is not None and tenant.memory_mb != tenant.settings.memory_mb:
                await self._renew(tenant, tenant.worker)
            elif (unneeded := self._unneeded(tenant)) is not None:
                await self._unload(tenant, unneeded)
            elif (fetched := _next_fetched(tenant)) is not None:
                if fetched.model is None:
                    self._fetch_again(tenant, fetched)
                elif tenant.worker is None:
                    await self._start_worker(tenant)
                else:
                    await self._load(tenant, tenant.worker, fetched)
            else:
                await tenant.changed.wait()

    async def _start_worker(self, tenant: PooledTenant) -> None:
        if tenant.backoff_ms:
            await asyncio.sleep(tenant.backoff_ms / 1000)
        try:
            settings = tenant.settings
            worker = await self._server.spawn(tenant.name, settings.memory_mb * limits.MIB, settings.weight)
        except WorkerLost as error:
            self._back_off(tenant, str(error))
            return
        tenant.worker, tenant.memory_mb = worker, settings.memory_mb
        self._supervisor.start(f"watch of {tenant.name}", _watch(tenant, worker))

    async def _renew(self, tenant: PooledTenant, worker: WorkerProcess) -> None:
        """End the worker, without blame: the next one has the memory that the tenant may have now."""
        self._scheduler.block(tenant.name)
        await tenant.idle.wait()
        await worker.close()
        if not tenant.lost:
            self._gone(tenant)

    async def _load(self, tenant: PooledTenant, worker: WorkerProcess, known: PooledVersion) -> None:
        """Have the worker take a version; its other versions wait meanwhile, they share one thread."""
        assert known.model is not None
        self._scheduler.block(tenant.name)
        await tenant.idle.wait()
        if tenant.lost or worker.lost.is_set():
            return
        before = cpu_seconds(worker.pid)
        try:
            report = await worker.load(known.version, known.model, known.text_features)
        except ModelRefused as error:
            self._failing(tenant, known, str(error))
        except WorkerLost as error:
            self._dying(tenant, worker, str(error))
            known.losses += 1
            if known.losses >= LOAD_LOSSES_MAX:
                reason = f"the worker died {known.losses} times while it loaded the model; the last time: {error}"
                self._failing(tenant, known, reason)
        else:
            self._loaded(tenant, known, report)
        self._scheduler.charge(tenant.name, cpu_seconds(worker.pid) - before)
        self._resume(tenant)

    def _loaded(self, tenant: PooledTenant, known: PooledVersion, report: LoadReport) -> None:
        known.state, known.model, known.losses = "loaded", None, 0
        if known.reason and self._on_failing is not None:
            self._on_failing(known.version.name, known.version.version, "", False)
        known.reason = ""
        cost = CostEstimate.told(report.seconds_per_call, report.seconds_per_row)
        self._scheduler.set_cost(tenant.name, known.key, cost)
        self._scheduler.unblock(tenant.name, known.key)
        log.info("model loaded", model=str(known.version.name), version=known.version.short_version)

    def _resume(self, tenant: PooledTenant) -> None:
        if tenant.worker is None or tenant.lost or tenant.worker.lost.is_set():
            tenant.changed.set()
            return
        self._scheduler.unblock(tenant.name)
        self._wake()

    def _dying(self, tenant: PooledTenant, worker: WorkerProcess, reason: str) -> None:
        """Send the worker nothing more; the keeper goes on once it has ended."""
        if tenant.worker is worker and self._tenants.get(tenant.name) is tenant:
            worker.kill()
            tenant.lost, tenant.last_error = True, reason
            self._scheduler.block(tenant.name)
            tenant.changed.set()

    def _failing(self, tenant: PooledTenant, known: PooledVersion, reason: str, at_fault: bool = True) -> None:
        known.state, known.model, known.reason, known.last_error = "failing", None, reason, reason
        known.failed_at = self._clock.monotonic()
        name, version = known.version.name, known.version
        log.warning("model failing", model=str(name), version=version.short_version, reason=reason)
        self._scheduler.block(tenant.name, known.key)
        told = self._on_failing is not None and self._on_failing(name, version.version, reason, at_fault)
        if told:
            known.parked = True
            self._supervisor.start(f"rows of {name}", self._give_up_later(tenant, known))
        else:
            self._give_up(tenant, known)

    def _give_up(self, tenant: PooledTenant, known: PooledVersion) -> None:
        """Answer what is queued for a failing version with the reason."""
        known.parked = False
        for ticket in self._scheduler.remove_model(tenant.name, known.key):
            known.rows_failed += fail(ticket, known.reason)
        self._schedule(tenant, known)
        tenant.changed.set()

    async def _give_up_later(self, tenant: PooledTenant, known: PooledVersion) -> None:
        await asyncio.sleep(HANDOVER_SECONDS_MAX)
        if known.parked and self._tenants.get(tenant.name) is tenant and tenant.versions.get(known.key) is known:
            self._give_up(tenant, known)

    def _hand_over(self, tenant: PooledTenant, live: PooledVersion) -> None:
        """Run on `live` what is queued for versions of its model that are failing, where both take and give alike."""
        for known in tenant.versions.values():
            if known.parked and known is not live and alike(known.version, live.version):
                known.parked = False
                for ticket in self._scheduler.move(tenant.name, known.key, live.key):
                    if isinstance(ticket, Piece):
                        ticket.isolation, ticket.losses = None, 0  # what is known of the other version says nothing
                self._wake()

    def _unneeded(self, tenant: PooledTenant) -> PooledVersion | None:
        for known in tenant.versions.values():
            if known.retired and self._scheduler.rows_held(tenant.name, known.key) == 0:
                return known
        return None

    async def _unload(self, tenant: PooledTenant, known: PooledVersion) -> None:
        del tenant.versions[known.key]
        self._scheduler.remove_model(tenant.name, known.key)
        if known.fetch is not None:
            known.fetch.cancel()
        worker = tenant.worker
        version = known.version.version
        shared = any(other.version.version == version for other in tenant.versions.values())
        if worker is None or not worker.holds(version) or shared:
            return
        self._scheduler.block(tenant.name)
        await tenant.idle.wait()
        try:
            await worker.unload(version)
        except WorkerLost as error:
            self._dying(tenant, worker, str(error))
        self._resume(tenant)

    def _lost(self, tenant: PooledTenant, reason: str) -> None:
        self._gone(tenant)
        self._back_off(tenant, reason)

    def _gone(self, tenant: PooledTenant) -> None:
        """There is no worker: skip the tenant until the next one has its versions."""
        tenant.worker, tenant.lost = None, False
        self._scheduler.block(tenant.name)
        for known in tenant.versions.values():
            if known.state in ("loaded", "fetched"):
                self._scheduler.block(tenant.name, known.key)
            if known.state == "loaded":
                self._fetch_again(tenant, known)

    def _back_off(self, tenant: PooledTenant, reason: str) -> None:
        tenant.restarts += 1
        tenant.last_error = reason
        doubled = max(tenant.backoff_ms * 2, limits.WORKER_BACKOFF_MS_MIN)
        tenant.backoff_ms = min(doubled, limits.WORKER_BACKOFF_MS_MAX)
        log.warning("worker lost", tenant=tenant.name, reason=reason, backoff_ms=tenant.backoff_ms)
        tenant.changed.set()

    # Batches

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._woken = False
        while (dispatch := self._scheduler.next()) is not None:
            tenant = self._tenants[dispatch.tenant]
            worker, known = tenant.worker, tenant.versions[dispatch.model]
            if worker is None or worker.lost.is_set():
                self._scheduler.block(tenant.name)
                self._scheduler.requeue(dispatch, 0.0)
                continue
            tenant.idle.clear()
            tenant.batch = self._supervisor.start("batch", self._run(tenant, worker, known, dispatch))
        self._wake_when_due()

    def _wake_when_due(self) -> None:
        """Nothing else happens when a quota lets rows go on."""
        due = self._unaware.due()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if due is not None and not self._stopped:
            seconds = max(0.0, due - self._clock.monotonic())
            self._alarm = asyncio.get_running_loop().call_later(seconds, self._wake)

    async def _run(self, tenant: PooledTenant, worker: WorkerProcess, known: PooledVersion, dispatch: Dispatch) -> None:
        batch = Batch.of(dispatch.parts)
        look = SlotLook(worker.pid, self._clock, partial(self._lend, dispatch))
        learn, used = False, 0.0
        pieces: list[Piece] = []
        try:
            left, refused = batch.without_refused(known.rate)
            known.rows_failed += refused
            if left is not None:
                batch = left
                outputs = await worker.call(known.version.version, batch.rows, known.version.deadline_ms / 1000)
                used = look.used()
                learn, tenant.backoff_ms = len(batch.rows) == dispatch.rows, 0
                known.rows_failed += len(outputs.errors)
                if judge(known.rate, batch.isolation, batch.rows, outputs.errors):
                    known.last_error = next(iter(outputs.errors.values()))
                batch.answer(outputs, used, self._clock.monotonic() - look.began)
        except CallFailed as error:
            used, tenant.backoff_ms = look.used(), 0
            pieces = self._raised(known, batch.piece(), str(error))
        except BoundExceeded as error:
            pieces = self._too_large(known, batch.piece(), str(error))
        except WorkerLost as error:
            # Its CPU time went with it: charge the time it held the slot, and learn that such batches take long.
            used = look.end()
            learn = used >= known.version.deadline_ms / 1000
            self._dying(tenant, worker, str(error))
            removed = self._tenants.get(tenant.name) is not tenant
            pieces = [batch.piece()] if removed else self._died(known, batch.piece(), str(error))
            if self._is_fatal(known) and not removed:
                self._failing(tenant, known, fatal_reason(known.beside, str(error)))
        finally:
            look.end()
            self._ended(tenant, known, dispatch, max(used, 0.0), learn, pieces)

    def _lend(self, dispatch: Dispatch, lent: bool) -> None:
        self._scheduler.lend(dispatch, lent)
        self._wake()

    def _abandon(self, ticket: object, reason: str) -> None:
        """Rows of a tenant that is removed get an error; those of a pool that stops are the caller's again."""
        if not self._stopped:
            fail(ticket, reason)
            return
        assert isinstance(ticket, Submission | Piece)
        for owner in ticket.owners if isinstance(ticket, Piece) else (ticket,):
            owner.future.cancel()

    def _ended(
        self,
        tenant: PooledTenant,
        known: PooledVersion,
        dispatch: Dispatch,
        cpu_seconds: float,
        learn: bool,
        pieces: list[Piece],
    ) -> None:
        self._scheduler.complete(dispatch, cpu_seconds, learn=learn)
        present = self._tenants.get(tenant.name) is tenant and tenant.versions.get(known.key) is known
        if present and known.rate.most and known.state == "loaded":
            self._failing(tenant, known, f"it failed on most rows; the last time: {known.last_error}")
        for piece in reversed(pieces):
            if not present:
                self._abandon(piece, f"{known.version.name} was removed while its rows ran")
            elif known.state == "failing" and not known.parked:
                known.rows_failed += fail(piece, known.reason)
            elif not piece.abandoned:
                self._scheduler.enqueue(
                    piece, tenant.name, known.key, len(piece.rows), dispatch.priority, whole=True, first=True
                )
        tenant.idle.set()
        if known.retired:
            tenant.changed.set()
        self._wake()

    @staticmethod
    def _raised(known: PooledVersion, piece: Piece, reason: str) -> list[Piece]:
        """What to try after the model raised on the piece; rows that are to blame are answered."""
        known.last_error = reason
        isolation = piece.isolation
        alone = len(piece.rows) == 1
        if alone and isolation is not None:
            isolation.learn(piece.rows, reason)
        if alone or (isolation is not None and isolation.calls_left <= 0):
            known.rows_failed += len(piece.rows)
            if alone:
                judge(known.rate, isolation, piece.rows, (0,))
            elif isolation is not None:
                isolation.verdict.close(known.rate, len(piece.rows), 0, 0)
            told = reason if alone else f"{reason} (said of {len(piece.rows)} rows together; too many fail to try each)"
            piece.answer(None, dict.fromkeys(range(len(piece.rows)), told), 0.0)
            return []
        if isolation is None:
            isolation = Isolation(verdict=BatchVerdict(len(piece.rows)))
            return [piece.take(at, isolation=isolation) for at in first_pieces(piece.rows)]
        return [piece.take(at, piece.losses, isolation) for at in halves(len(piece.rows))]

    @staticmethod
    def _too_large(known: PooledVersion, piece: Piece, reason: str) -> list[Piece]:
        """What to try after the piece was over the bound of one message: its halves; a single row is answered."""
        known.last_error = reason
        if len(piece.rows) == 1:
            known.rows_failed += 1
            piece.answer(None, {0: reason}, 0.0)
            return []
        return [piece.take(at, piece.losses, piece.isolation) for at in halves(len(piece.rows))]

    def _is_fatal(self, known: PooledVersion) -> bool:
        """Whether so many rows were fatal lately that the model is to blame, and no more are to be tried."""
        recent, most = known.fatal_rows, fatal_max(known.beside)
        whole = len(recent) >= most and known.state != "failing"
        return whole and self._clock.monotonic() - recent[-most] < limits.FATAL_ROWS_MS / 1000

    def _died(self, known: PooledVersion, piece: Piece, reason: str) -> list[Piece]:
        """What to try after the worker was lost with the piece: the same again, then its halves, at last none."""
        known.last_error = reason
        piece.losses += 1
        if known.beside:  # which rows are to blame is not worth another worker
            known.fatal_rows.append(self._clock.monotonic())
        if piece.losses < LOSSES_MAX:
            return [piece]
        if len(piece.rows) == 1:
            known.rows_failed += 1
            if not known.beside:
                known.fatal_rows.append(self._clock.monotonic())
            if piece.isolation is not None:
                piece.isolation.verdict.close(known.rate, 1, 0, 0)
            piece.answer(None, {0: f"the worker was lost {piece.losses} times with this row: {reason}"}, 0.0)
            return []
        return [_half(piece, at) for at in halves(len(piece.rows))]

    def _answered(
        self, tenant: PooledTenant, known: PooledVersion, submission: Submission, future: asyncio.Future[ModelOutputs]
    ) -> None:
        if future.cancelled() and self._tenants.get(tenant.name) is tenant and known.key in tenant.versions:
            self._scheduler.cancel(tenant.name, known.key, submission)


async def _watch(tenant: PooledTenant, worker: WorkerProcess) -> None:
    await worker.lost.wait()
    tenant.changed.set()


def _half(piece: Piece, at: Ints) -> Piece:
    """A half of a piece whose loss is proven needs one more loss to be halved; a single row must be lost twice."""
    return piece.take(at, LOSSES_MAX - 1 if len(at) > 1 else 0, piece.isolation)


def _holds_a_file(tenant: PooledTenant) -> bool:
    return any(known.model is not None for known in tenant.versions.values())


def _next_fetched(tenant: PooledTenant) -> PooledVersion | None:
    """To be loaded, first the one whose file is in memory."""
    fetched = [known for known in tenant.versions.values() if known.state == "fetched"]
    return min(fetched, key=lambda known: known.model is None, default=None)
