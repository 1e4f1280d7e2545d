"""Tries new versions in throw-away workers, and tells what came of it.

What is no fault of the model's, a disk that can't be read or a worker that can't be started, fails no trial: it is made
again a while later, for as long as the version is still to be tried.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from node.kernel import limits
from node.kernel.clock import Clock
from node.kernel.errors import HeadraceError, ModelRefused, NotFound, SandboxUnavailable, StoreUnavailable, WorkerLost
from node.kernel.supervise import Supervisor
from node.kernel.types import ModelName, ModelVersion
from tenants.registry import Snapshot, StartTrial, TrialFailed, TrialPassed
from tenants.trial_slots import TrialSlots
from tenants.workers import LoadReport, WarmServer

log = structlog.get_logger(__name__)

TRIAL_ATTEMPTS_MAX = 2
"""A version that took so many workers along while it was loaded is refused."""
TRIAL_WORKERS_MAX = 4
"""Also when they were lost together with the warm server: what ends that each time must not go on for ever."""

_NO_FAULT_OF_THE_MODEL = (StoreUnavailable, NotFound, WorkerLost)
"""What is raised before a worker has seen the file."""


@dataclass(frozen=True, slots=True)
class TrialsFor:
    """Whom trials are for: what is known now; who hears the outcome, that one ended, why one is made again later."""

    snapshot: Callable[[], Snapshot]
    outcome: Callable[[TrialPassed | TrialFailed], Awaitable[None]]
    ended: Callable[[], None]
    put_off: Callable[[ModelName, HeadraceError], None]


class Trials:
    """At most one of a model at a time, and limits.TRIALS_MAX in all; another waits for its turn."""

    def __init__(
        self, server: WarmServer, get: Callable[[str], bytes], clock: Clock, supervisor: Supervisor, whom: TrialsFor
    ) -> None:
        """`get` gives a model file by its sha256. Blocking; called in a thread."""
        self._server = server
        self._get = get
        self._clock = clock
        self._supervisor = supervisor
        self._for = whom
        self._slots = TrialSlots(limits.TRIALS_MAX, limits.TRIAL_TURN_MS / 1000, clock)
        self._tasks: dict[ModelName, asyncio.Task[None]] = {}
        self.begun = 0

    @property
    def running(self) -> int:
        """Those that wait for their turn included."""
        return len(self._tasks)

    def start(self, trial: StartTrial) -> None:
        """In place of an older one of the model."""
        name = trial.version.name
        older = self._tasks.pop(name, None)
        if older is not None:
            older.cancel()
        task = self._supervisor.start(f"trial of {name}", self._try(trial))
        self._tasks[name] = task
        task.add_done_callback(lambda done: self._ended(name, done))

    def _ended(self, name: ModelName, task: asyncio.Task[None]) -> None:
        if self._tasks.get(name) is task:
            del self._tasks[name]
        self._for.ended()

    async def _try(self, trial: StartTrial) -> None:
        """Until there is an outcome, or none is wanted."""
        version, retry_ms = trial.version, limits.TRIAL_RETRY_MS_MIN
        while True:
            try:
                outcome = await self._outcome(trial)
                break
            except _NO_FAULT_OF_THE_MODEL as error:
                log.warning("trial put off", model=str(version.name), reason=str(error))
                self._for.put_off(version.name, error)
            await asyncio.sleep(retry_ms / 1000)
            retry_ms = min(retry_ms * 2, limits.TRIAL_RETRY_MS_MAX)
        if outcome is not None:
            await self._for.outcome(outcome)

    async def _outcome(self, trial: StartTrial) -> TrialPassed | TrialFailed | None:
        """None when it is not to be tried any more. Raises what is no fault of the model's, and SandboxUnavailable."""
        version = trial.version
        name = version.name
        memory_mb = 0

        async def attempt() -> LoadReport | None:
            nonlocal memory_mb
            if not self._for.snapshot().on_trial(name, version.version):
                return None  # meanwhile it is gone, or the cluster has it from another node
            self.begun += 1
            memory_mb = self._for.snapshot().trial_settings(name.tenant).memory_mb
            return await self._loaded(version, trial.text_features)

        while True:
            try:
                report = await self._slots.run(name.tenant, attempt)
            except (SandboxUnavailable, *_NO_FAULT_OF_THE_MODEL):
                raise
            except HeadraceError as error:
                if self._for.snapshot().trial_settings(name.tenant).memory_mb > memory_mb:
                    continue  # more was granted meanwhile
                return TrialFailed(name, version.version, str(error), self._clock.now_ms())
            if report is None:
                return None
            return TrialPassed(name, version.version, report.told(), self._clock.now_ms())

    async def _loaded(self, version: ModelVersion, text_features: tuple[str, ...]) -> LoadReport:
        """The report of a throw-away worker that loads the version.

        Raises ModelRefused; StoreUnavailable, NotFound and WorkerLost when no worker has come to load it.
        """
        model = await asyncio.to_thread(self._get, version.blob)
        settings = self._for.snapshot().trial_settings(version.name.tenant)
        lost, losses, blamed = "", 0, 0
        while losses < TRIAL_WORKERS_MAX and blamed < TRIAL_ATTEMPTS_MAX:
            worker = await self._server.spawn(version.name.tenant, settings.memory_mb * limits.MIB, settings.weight)
            try:
                return await worker.load(version, model, text_features)
            except WorkerLost as error:
                lost, losses = str(error), losses + 1
                blamed += self._server.running  # else it ended with all others, whatever the model did
            finally:
                worker.kill()
                await worker.close()
        raise ModelRefused(f"the worker died each of {losses} times it loaded the model: {lost}")
