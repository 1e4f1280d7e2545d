"""What runs inside a sandboxed worker: it unpickles one tenant's models, tries them, and calls them.

It answers one request at a time, on the one descriptor it has. Time here is the process's own CPU clock: it is
what the scheduler charges for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import os
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO, cast

import joblib.externals.loky.backend.context
import joblib.parallel
import numpy as np
import sklearn.utils.parallel

from node.kernel.errors import CallFailed, HeadraceError, SandboxUnavailable
from node.kernel.limits import MODEL_UNPACKED_BYTES_MAX
from node.kernel.types import Floats
from tenants import messages, sandbox
from tenants.cgroup_files import Place
from tenants.inputs import ModelInput, Rows
from tenants.messages import Buffer, Call, Called, Load, Loaded, Ready, Refused, Unload, Unloaded, shorten
from tenants.outputs import Outputs
from tenants.trial import try_model
from tenants.unpickle import Allowlist, load_model


def prepare(libraries: Iterable[str], extra_globals: Iterable[str], modules: Iterable[str]) -> Allowlist:
    """In the warm server: import all that workers will need, and make joblib compute in the calling thread.

    Models stored with n_jobs > 1 would otherwise start processes or threads, both of which the sandbox
    forbids. What is looked up in /proc and /sys is looked up now.
    """
    for module in modules:
        importlib.import_module(module)
    joblib.externals.loky.backend.context._cpu_count_user = lambda _cores: 1
    sklearn.utils.parallel._get_threadpool_controller()
    for backend in list(joblib.parallel.BACKENDS):
        joblib.parallel.BACKENDS[backend] = joblib.parallel.SequentialBackend
    return Allowlist.shipped(libraries, extra_globals)


@dataclass(frozen=True, slots=True)
class Ends:
    """A worker's descriptors: of its socket to the node, and of the pipe that takes what it prints."""

    channel: int
    output: int


class Printed(io.BufferedIOBase):
    """What is printed, as long as the pipe takes it: a print never waits and never fails."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any) -> int:
        with contextlib.suppress(BlockingIOError):  # the node takes no more for now: it is lost
            os.write(self._descriptor, data)
        return len(memoryview(data).cast("B"))


def _print_to(descriptor: int) -> TextIO:
    """Python's streams, and the last words of a crash."""
    stream = io.TextIOWrapper(cast("BinaryIO", Printed(descriptor)), "utf-8", "backslashreplace", line_buffering=True)
    sys.stdout = sys.stderr = stream
    faulthandler.enable(descriptor)
    return stream


def run(
    ends: Ends,
    required: frozenset[str],
    memory_bytes: int,
    user: int | None,
    parent: int,
    allowlist: Allowlist,
    place: Place,
) -> None:
    """Lock this process down, say how well that went, and serve until the node closes its end."""
    channel = Channel(ends.channel)
    memory = os.open("/proc/self/statm", os.O_RDONLY)
    sandbox.close_files_except(ends.channel, memory, output=ends.output)
    printed = _print_to(1)
    try:
        report = sandbox.apply(required, memory_bytes, user, parent, place)
    except SandboxUnavailable as reason:
        channel.write(messages.encode(Refused(shorten(str(reason)))))
        return
    channel.write(messages.encode(Ready(report.layers, report.missing)))
    worker = Worker(allowlist, memory, memory_bytes)
    while (frame := channel.read()) is not None:
        answer = worker.answer(*frame)
        printed.flush()
        channel.write(answer)


class Channel:
    """Blocking frames over one descriptor, with plain reads and writes: the sandbox knows no socket calls."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self) -> tuple[memoryview, int] | None:
        """The next frame without its prefix, and its header's length; None when the node has gone."""
        prefix = memoryview(bytearray(messages.PREFIX.size))
        if not self._fill(prefix):
            return None
        lengths = messages.lengths(prefix)
        frame = np.empty(lengths.total_bytes, dtype=np.uint8).data
        return (frame, lengths.header_bytes) if self._fill(frame) else None

    def _fill(self, target: memoryview) -> bool:
        position = 0
        while position < len(target):
            count = os.readv(self._descriptor, [target[position:]])
            if count == 0:
                return False
            position += count
        return True

    def write(self, buffers: list[Buffer]) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            while len(view):
                view = view[os.write(self._descriptor, view) :]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    input: ModelInput
    outputs: Outputs


class Worker:
    """One tenant's models, by version."""

    def __init__(self, allowlist: Allowlist, memory: int, memory_bytes: int) -> None:
        self._allowlist = allowlist
        self._memory = memory
        self._unpacked_bytes_max = min(memory_bytes, MODEL_UNPACKED_BYTES_MAX)
        self._models: dict[str, LoadedModel] = {}

    def answer(self, frame: memoryview, header_bytes: int) -> list[Buffer]:
        """The answer to one request; whatever fails in a model is told, not raised."""
        request, body = messages.decode_request(frame, header_bytes)
        try:
            if isinstance(request, Load):
                return messages.encode(self._load(request, body))
            if isinstance(request, Unload):
                self._models.pop(request.version, None)
                return messages.encode(Unloaded())
            return self._call(request, body)
        except HeadraceError as error:
            return messages.encode(Refused(shorten(str(error))))
        except MemoryError:
            return messages.encode(Refused("the model needs more memory than the tenant has; make it smaller"))
        except Exception as error:  # a tenant's object can make anything raise
            return messages.encode(Refused(shorten(f"the model raised {type(error).__name__}: {error}")))

    def _load(self, request: Load, body: memoryview) -> Loaded:
        before = self._resident_bytes()
        model = load_model(bytes(body), self._allowlist, self._unpacked_bytes_max)
        trial = try_model(model, request)
        self._models[request.version] = LoadedModel(trial.input, trial.outputs)
        return Loaded(
            feature_names=trial.input.feature_names,
            feature_count=trial.input.feature_count,
            outputs=len(request.outputs),
            labels=trial.outputs.labels,
            seconds_per_row=trial.seconds_per_row,
            seconds_per_call=trial.seconds_per_call,
            memory_bytes=max(0, self._resident_bytes() - before),
            class_name=shorten(type(model).__name__, messages.CLASS_NAME_CHARACTERS_MAX),
            notes=trial.notes,
        )

    def _resident_bytes(self) -> int:
        fields = os.pread(self._memory, 256, 0).split()
        return (int(fields[1]) - int(fields[2])) * resource.getpagesize()

    def _call(self, request: Call, body: memoryview) -> list[Buffer]:
        loaded = self._models.get(request.version)
        if loaded is None:
            raise CallFailed(f"version {request.version[:12]} is not loaded in this worker; load it first")
        rows = Rows(messages.matrix(body, request.rows, request.columns), request.texts)
        started = time.process_time()
        values, errors = loaded.outputs.of(loaded.input, rows)
        cpu_seconds = time.process_time() - started
        called = Called(values.shape[0], values.shape[1], cpu_seconds, errors)
        return messages.encode(called, _bytes_of(values))


def _bytes_of(values: Floats) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
