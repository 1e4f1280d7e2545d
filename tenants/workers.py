"""The node's side of the workers: starts the warm server, has it fork workers, and talks to each over one socket.

Nothing that comes from a worker is unpickled, trusted in its size, or waited for without a bound: a tenant's
model may have taken the worker over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import msgspec
import numpy as np
import structlog

from node.kernel.clock import Clock
from node.kernel.errors import CallFailed, ModelRefused, SandboxUnavailable, WorkerLost
from node.kernel.limits import (
    MIB,
    MODEL_BYTES_MAX,
    OUTPUTS_PER_MODEL_MAX,
    TENANTS_MAX,
    TRIAL_MS_MAX,
    WORKER_LAST_LOOK_MS,
    WORKER_START_MS_MAX,
)
from node.kernel.types import FeatureRows, ModelOutputs, ModelVersion
from tenants import messages, warm_server
from tenants.agreement import TrialReport
from tenants.cgroup_files import WorkerLimits
from tenants.cgroups import ControlGroups
from tenants.cpu_time import Meter, Unasked, cpu_seconds
from tenants.memory import MemoryFile, MemoryUse
from tenants.messages import Answer, Buffer, Called, Load, Loaded, MessageCorrupt, Ready, Refused, Unload, Unloaded
from tenants.sandbox import SandboxReport, SandboxSettings
from tenants.tenant_log import OutputReader, TenantLogs
from tenants.warm_process import WarmProcess

log = structlog.get_logger(__name__)

_SMALL_ANSWER_BYTES_MAX = MIB
_CLOSE_SECONDS_MAX = 2.0
_SPAWN_ATTEMPTS_MAX = 3
PROBE = "_probe"
"""No tenant can have this name."""
PROBE_MEMORY_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a worker found out about a model. It comes from the worker: advice, not truth.

    `feature_names` and `feature_count` are of the fitted model, None where it does not know. `labels` are the text
    classes that `predict` gives as indices. Times are CPU seconds, memory is what loading added to the worker.
    """

    feature_names: tuple[str, ...] | None
    feature_count: int | None
    outputs: int
    labels: tuple[str, ...]
    seconds_per_row: float
    seconds_per_call: float
    memory_bytes: int
    class_name: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, answer: Loaded) -> LoadReport:
        """Cut to what may be kept of it."""
        said = {
            "memory_bytes": max(0, answer.memory_bytes),
            "class_name": messages.shorten(answer.class_name, messages.CLASS_NAME_CHARACTERS_MAX),
            "notes": tuple(messages.shorten(note) for note in answer.notes[: messages.NOTES_MAX]),
        }
        return cls(**{**msgspec.structs.asdict(answer), **said})

    def told(self) -> TrialReport:
        """What the cluster and the tenant hear of it."""
        return TrialReport(
            seconds_per_call=self.seconds_per_call,
            seconds_per_row=self.seconds_per_row,
            memory_bytes=self.memory_bytes,
            class_name=self.class_name,
            labels=self.labels,
            notes=self.notes,
        )


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    tenant: str
    pid: int
    versions: tuple[str, ...]
    calls: int
    rows: int
    cpu_seconds: float
    """That the worker reports of its calls."""
    memory: MemoryUse | None
    """As last measured by the kernel; None before that."""
    busy_seconds: float
    """During which a request was in progress, as the node saw it."""
    sandbox: SandboxReport


_Expected: TypeAlias = "asyncio.Future[tuple[memoryview, int]]"
"""A frame, and its header's length."""


class _Frames(asyncio.BufferedProtocol):
    """Receives one frame at a time, straight into a buffer of the size its prefix announced."""

    def __init__(self) -> None:
        self._prefix = bytearray(messages.PREFIX.size)
        self._expected: _Expected | None = None
        self._bytes_max = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._start_prefix()

    def _start_prefix(self) -> None:
        self._target = memoryview(self._prefix)
        self._position = 0
        self._lengths: messages.Lengths | None = None

    def expect(self, bytes_max: int) -> _Expected:
        """The next frame and its header's length. Fails with MessageCorrupt, or WorkerLost at the end of the stream."""
        self._expected = asyncio.get_running_loop().create_future()
        self._bytes_max = bytes_max
        if self.ended.done():
            self._expected.set_exception(WorkerLost("the worker closed its socket; it is started again"))
        return self._expected

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target[self._position :]

    def buffer_updated(self, nbytes: int) -> None:
        self._position += nbytes
        if self._position < len(self._target):
            return
        try:
            self._complete()
        except MessageCorrupt as error:
            self._fail(error)

    def _complete(self) -> None:
        if self._expected is None or self._expected.done():
            raise MessageCorrupt("a worker spoke without being asked")
        if self._lengths is None:
            self._lengths = messages.lengths(self._prefix, self._bytes_max)
            # Not zeroed, so that an announcement alone takes no memory.
            self._target = np.empty(self._lengths.total_bytes, dtype=np.uint8).data
            self._position = 0
        else:
            frame, header_bytes = self._target, self._lengths.header_bytes
            self._start_prefix()
            self._expected.set_result((frame, header_bytes))

    def _fail(self, error: Exception) -> None:
        # Whatever follows is thrown away, into a buffer of fixed size; the worker is killed meanwhile.
        self._start_prefix()
        if self._expected is not None and not self._expected.done():
            self._expected.set_exception(error)
        elif not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        if self._expected is not None and not self._expected.done():
            self._expected.set_exception(WorkerLost("the worker ended; it is started again"))


async def connected(end: socket.socket) -> tuple[asyncio.Transport, _Frames, _Expected]:
    """The node's end of a worker's socket, and the first frame, which a worker sends without being asked: it may come
    before whoever called this goes on, and what nobody expects ends the worker."""
    frames = _Frames()
    first = frames.expect(_SMALL_ANSWER_BYTES_MAX)
    transport, _ = await asyncio.get_running_loop().create_unix_connection(lambda: frames, sock=end)
    return transport, frames, first


class WorkerProcess:
    """One tenant's worker. Requests to it are made one at a time: the caller sees to that."""

    def __init__(
        self,
        tenant: str,
        pid: int,
        process: int,
        transport: asyncio.Transport,
        frames: _Frames,
        memory_bytes: int,
        clock: Clock,
        memory: MemoryFile | None = None,
        group: str = "",
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """`process` is a descriptor of it, `group` the folder of its control group; `ended` hears of its end."""
        self.tenant = tenant
        self.group = group
        self._hears_end = ended
        self.pid = pid
        self._memory_file = memory
        self._memory: MemoryUse | None = None
        self._measured_requests = -1
        self._requests = 0
        self._meter = Meter()
        self.lost = asyncio.Event()
        self.sandbox = SandboxReport(())
        self._process: int | None = process
        self._transport = transport
        self._frames = frames
        self._memory_bytes = memory_bytes
        self._clock = clock
        self._busy_seconds = 0.0
        self._versions: dict[str, ModelVersion] = {}
        self._calls = 0
        self._rows = 0
        self._cpu_seconds = 0.0
        asyncio.get_running_loop().add_reader(process, self._ended)
        frames.ended.add_done_callback(lambda _: self.kill())

    async def ready(self, first: _Expected) -> None:
        """Wait for its `first` message. Raises SandboxUnavailable, or WorkerLost when the worker did not come up."""
        try:
            answer, _ = await self._received(first, WORKER_START_MS_MAX / 1000)
        except TimeoutError:
            raise WorkerLost(f"the worker of {self.tenant} did not start in time; it is started again") from None
        if isinstance(answer, Refused):
            await self.close()
            raise SandboxUnavailable(answer.reason)
        if not isinstance(answer, Ready):
            raise self._corrupt("its first message is not 'ready'")
        self.sandbox = SandboxReport(answer.layers, dict(answer.missing))
        self._meter = Meter(cpu_seconds(self.pid))

    async def load(
        self,
        version: ModelVersion,
        model: bytes,
        text_features: tuple[str, ...] = (),
        deadline_seconds: float = TRIAL_MS_MAX / 1000,
    ) -> LoadReport:
        """Have the worker unpickle a model and try it on made-up rows.

        `text_features` names those of the version's features that are texts. Raises ModelRefused with the reason
        for the tenant (also when it takes longer than the deadline: then the worker is killed), WorkerLost when
        the worker died on it.
        """
        bytes_max = min(MODEL_BYTES_MAX, self._memory_bytes // 2)  # the worker holds it twice while it loads
        if len(model) > bytes_max:
            raise ModelRefused(
                f"the file has {len(model)} bytes, the tenant's memory allows {bytes_max}; store a smaller model, "
                "or ask the operator for more memory"
            )
        load = Load(version.version, version.method, version.features, version.outputs, text_features)
        try:
            answer, _ = await self._request(messages.encode(load, model), deadline_seconds, _SMALL_ANSWER_BYTES_MAX)
        except TimeoutError:
            raise ModelRefused(
                f"loading and trying the model took longer than {deadline_seconds:g} s; store a smaller or faster one"
            ) from None
        if isinstance(answer, Refused):
            raise ModelRefused(messages.shorten(answer.reason))
        if not isinstance(answer, Loaded) or answer.outputs != len(version.outputs):
            raise self._corrupt("it answered something else to a load")
        if not all(0 <= seconds < float("inf") for seconds in (answer.seconds_per_row, answer.seconds_per_call)):
            raise self._corrupt("it reported an impossible cost")
        if problem := messages.labels_problem(answer.labels):
            raise self._corrupt(f"it did not refuse a model: {problem}")
        self._versions[version.version] = version
        return LoadReport.of(answer)

    def holds(self, version: str) -> bool:
        """Whether it has loaded the version and not been told to forget it, whatever became of its calls."""
        return version in self._versions

    async def unload(self, version: str) -> None:
        """Forget a version; an unknown one is no error. Raises WorkerLost."""
        self._versions.pop(version, None)
        try:
            answer, _ = await self._request(
                messages.encode(Unload(version)), _CLOSE_SECONDS_MAX, _SMALL_ANSWER_BYTES_MAX
            )
        except TimeoutError:
            raise WorkerLost(
                f"the worker of {self.tenant} did not answer and was killed; it is started again"
            ) from None
        if not isinstance(answer, Unloaded):
            raise self._corrupt("it answered something else to an unload")

    async def call(self, version: str, rows: FeatureRows, deadline_seconds: float) -> ModelOutputs:
        """Run a loaded version on rows; `errors` of the result names rows without a usable output.

        Raises BoundExceeded when the rows are too many for one call, CallFailed when the model raised or gave
        another shape, WorkerLost when the worker died, was killed
        for passing the deadline, or sent what is no answer.
        """
        outputs = len(self._versions[version].outputs) if version in self._versions else OUTPUTS_PER_MODEL_MAX
        bytes_max = messages.call_answer_bytes_max(len(rows))
        try:
            answer, body = await self._request(messages.encode_call(version, rows), deadline_seconds, bytes_max)
        except TimeoutError:
            raise WorkerLost(
                f"a call of {self.tenant}'s version {version[:12]} with {len(rows)} rows passed its deadline of "
                f"{deadline_seconds:g} s and its worker was killed; it is started again"
            ) from None
        if isinstance(answer, Refused):
            raise CallFailed(messages.shorten(answer.reason))
        if not isinstance(answer, Called) or (answer.rows, answer.outputs) != (len(rows), outputs):
            raise self._corrupt("it answered something else to a call")
        return self._outputs(answer, body, len(self._versions[version].labels) if version in self._versions else 0)

    def _outputs(self, called: Called, body: memoryview, labels: int) -> ModelOutputs:
        try:
            values = messages.matrix(body, called.rows, called.outputs)
        except MessageCorrupt as error:
            raise self._corrupt(str(error)) from error
        if not 0 <= called.cpu_seconds < float("inf") or not all(0 <= row < called.rows for row in called.errors):
            raise self._corrupt("it reported an impossible cost or row")
        errors = {
            row: messages.shorten(text, messages.ROW_REASON_CHARACTERS_MAX) for row, text in called.errors.items()
        }
        for row in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
            errors.setdefault(row, "an output is not a finite number")
        if labels:
            known = (values >= 0) & (values < labels) & (values == np.floor(values))
            for row in np.flatnonzero(~known.all(axis=1)).tolist():
                errors.setdefault(row, "the output is not one of the model's classes")
        self._calls += 1
        self._rows += called.rows
        self._cpu_seconds += called.cpu_seconds
        return ModelOutputs(values, errors, called.cpu_seconds)

    async def _request(self, frame: list[Buffer], seconds: float, bytes_max: int) -> tuple[Answer, memoryview]:
        if self.lost.is_set():
            raise WorkerLost(f"the worker of {self.tenant} has ended; it is started again")
        expected = self._frames.expect(bytes_max)
        self._requests += 1
        self._meter.asked(cpu_seconds(self.pid))
        started = self._clock.monotonic()
        self._transport.writelines(frame)
        try:
            return await self._received(expected, seconds)
        finally:
            self._busy_seconds += self._clock.monotonic() - started
            self._meter.answered(cpu_seconds(self.pid))

    async def _received(self, expected: _Expected, seconds: float) -> tuple[Answer, memoryview]:
        """Raises TimeoutError once the worker has been killed for it, WorkerLost."""
        try:
            await asyncio.wait([expected], timeout=seconds)
            if not expected.done():
                # Where this loop stood still meanwhile, the answer came in time and has not been read.
                await asyncio.wait([expected], timeout=WORKER_LAST_LOOK_MS / 1000)
            if not expected.done():
                raise TimeoutError
            return messages.decode_answer(*expected.result())
        except MessageCorrupt as error:
            raise self._corrupt(str(error)) from error
        except (TimeoutError, asyncio.CancelledError):
            expected.cancel()
            self.kill()  # an answer that nobody waits for must not be taken for the next one's
            raise

    def _corrupt(self, what: str) -> WorkerLost:
        self.kill()
        log.warning("worker killed for a bad message", tenant=self.tenant, pid=self.pid, what=what)
        return WorkerLost(f"the worker of {self.tenant} was killed, because {what}; it is started again")

    def kill(self) -> None:
        """SIGKILL, to this process and never to another that got its number."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def _ended(self) -> None:
        if self._process is None:
            return
        asyncio.get_running_loop().remove_reader(self._process)
        os.close(self._process)
        self._process = None
        if self._memory_file is not None:
            self._memory_file.close()
        # Its last words may still lie in the socket, whose end then follows; or a thief keeps it open.
        asyncio.get_running_loop().call_later(_CLOSE_SECONDS_MAX, self._transport.abort)
        self.lost.set()
        self._hears_end()

    async def close(self) -> None:
        """Close the socket, at which the worker ends; kill it if it does not."""
        self._transport.abort()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS_MAX):
                await self.lost.wait()
        except TimeoutError:
            self.kill()
            await self.lost.wait()

    def unasked(self) -> Unasked:
        """CPU time that it took, since this was asked last, while no request was in progress."""
        return self._meter.look(cpu_seconds(self.pid))

    @property
    def stale(self) -> bool:
        """Whether its memory may have changed since it was measured: a worker that is asked nothing does nothing."""
        return self._measured_requests != self._requests and self._process is not None

    def measure(self) -> None:
        """Ask the kernel for its memory. Blocking, some milliseconds; may be called in a thread."""
        requests = self._requests
        if self._memory_file is not None:
            self._memory = self._memory_file.read() or self._memory
        self._measured_requests = requests

    def statistics(self) -> WorkerStatistics:
        return WorkerStatistics(
            memory=self._memory,
            tenant=self.tenant,
            pid=self.pid,
            versions=tuple(self._versions),
            calls=self._calls,
            rows=self._rows,
            cpu_seconds=self._cpu_seconds,
            busy_seconds=self._busy_seconds,
            sandbox=self.sandbox,
        )


@dataclass(frozen=True, slots=True)
class _Forked:
    """A process that the warm server has forked: its number, a descriptor of it, and its memory figures."""

    pid: int
    process: int
    memory: MemoryFile


class WarmServer:
    """One a node: a warm process with the model libraries imported, which forks the workers.

    When it dies all workers die with it; the next `spawn` starts it again.
    """

    def __init__(
        self,
        settings: SandboxSettings,
        clock: Clock,
        groups: ControlGroups | None = None,
        process: WarmProcess | None = None,
    ) -> None:
        """`process` is one that was started before with these settings and groups; else `start` does that."""
        self.logs = TenantLogs()
        self._groups = groups or ControlGroups(None)
        self._settings = settings
        self._clock = clock
        self._process = process
        self._control: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[_Forked]] = {}
        self._numbers = count(1)
        self._users: dict[str, int] = {}
        self._starting = asyncio.Lock()

    @property
    def running(self) -> bool:
        """False from its end until the next `start`."""
        return self._control is not None

    async def start(self) -> None:
        """Start the process and wait until it has imported everything. Raises WorkerLost when it can't."""
        async with self._starting:
            if self._control is None:
                await self._start()

    async def _start(self) -> None:
        process = self._process
        if process is None or process.ended:
            await self._end()
            process = self._process = WarmProcess(self._settings, self._groups)
        self._control = process.control
        asyncio.get_running_loop().add_reader(self._control, self._received)
        try:
            await self._reply(0)
        except WorkerLost:
            late = f"was not ready within {WORKER_START_MS_MAX // 1000} s; this machine is busy, or its disk is slow"
            ended = "ended before it was ready; what it printed, above, says why"
            why = late if self.running else ended
            await self.stop()
            raise WorkerLost(f"the process that workers are forked from {why}") from None
        log.info("warm server started", pid=process.pid)

    async def spawn(self, tenant: str, memory_bytes: int, weight: float = 1.0) -> WorkerProcess:
        """A new worker, locked down and waiting for models, that may take `memory_bytes` of its own.

        `weight` is its share of CPU beside other workers', where it has a control group.

        One that ends before it is ready has seen no tenant's byte, so it is simply replaced, a few times. Raises
        WorkerLost when none started, SandboxUnavailable when a required layer can't be had.
        """
        for _ in range(_SPAWN_ATTEMPTS_MAX - 1):
            try:
                return await self._spawn(tenant, memory_bytes, weight)
            except WorkerLost as lost:
                log.warning("worker did not start", tenant=tenant, reason=str(lost))
        return await self._spawn(tenant, memory_bytes, weight)

    async def _spawn(self, tenant: str, memory_bytes: int, weight: float) -> WorkerProcess:
        await self.start()
        number = next(self._numbers)
        place = self._groups.create(tenant, number, WorkerLimits(weight, memory_bytes))
        spawn = warm_server.Spawn(number, memory_bytes, self._user(tenant), place.folder, place.missing)
        ours, theirs = socket.socketpair()
        output, printed = os.pipe()
        os.set_blocking(printed, False)  # or a worker that prints more than is read would stand still
        try:
            with theirs:
                self._send(spawn, theirs, printed)
            forked = await self._reply(spawn.number)
        except BaseException:
            ours.close()
            os.close(output)
            self._groups.remove(place.folder)
            raise
        finally:
            os.close(printed)
        ours.setblocking(False)
        OutputReader(output, self.logs.of(tenant), forked.pid, self._clock)
        transport, frames, first = await connected(ours)
        worker = WorkerProcess(
            tenant, forked.pid, forked.process, transport, frames, memory_bytes, self._clock, forked.memory,
            place.folder, lambda: self._groups.remove(place.folder),
        )  # fmt: skip
        try:
            await worker.ready(first)
        except BaseException:
            worker.kill()
            raise
        return worker

    def set_weight(self, worker: WorkerProcess, weight: float) -> None:
        self._groups.set_weight(worker.group, weight)

    async def probe(self) -> SandboxReport:
        """What holds of every worker here, by one that is thrown away. Raises as `spawn` does."""
        worker = await self.spawn(PROBE, PROBE_MEMORY_BYTES)
        await worker.close()
        return worker.sandbox

    def _user(self, tenant: str) -> int | None:
        """An own user id for each tenant, in the order they come."""
        if self._settings.own_user_first is None:
            return None
        place = self._users.setdefault(tenant, len(self._users) % TENANTS_MAX)
        return self._settings.own_user_first + place

    def _send(self, spawn: warm_server.Spawn, end: socket.socket, printed: int) -> None:
        if self._control is None:
            raise WorkerLost("the warm server has ended; it is started again")
        try:
            socket.send_fds(self._control, [msgspec.json.encode(spawn)], [end.fileno(), printed])
        except OSError as error:
            raise WorkerLost(f"the warm server took no request ({error}); it is asked again") from error

    async def _reply(self, number: int) -> _Forked:
        waiting: asyncio.Future[_Forked] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            async with asyncio.timeout(WORKER_START_MS_MAX / 1000):
                return await waiting
        except TimeoutError:
            raise WorkerLost("the warm server did not answer in time; it is asked again") from None
        finally:
            del self._waiting[number]

    def _received(self) -> None:
        assert self._control is not None
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, warm_server.MESSAGE_BYTES_MAX, 2)
        except BlockingIOError:
            return
        except OSError:
            message, descriptors = b"", []
        if not message:
            self._forget()
            return
        reply = msgspec.json.decode(message, type=warm_server.Started | warm_server.NotStarted)
        waiting = self._waiting.get(reply.number)
        if waiting is None or waiting.done():
            for descriptor in descriptors:  # nobody waits any more: the worker sees its socket closed
                os.close(descriptor)
        elif isinstance(reply, warm_server.NotStarted):
            waiting.set_exception(WorkerLost(f"no worker could be started: {reply.reason}; it is tried again"))
        else:
            process, memory = (*descriptors, -1, -1)[:2]
            waiting.set_result(_Forked(reply.pid, process, MemoryFile(memory)))

    def _forget(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(WorkerLost("the warm server ended; it is started again"))

    async def stop(self) -> None:
        """End the process, and with it all its workers."""
        self._forget()
        await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(process.end)
