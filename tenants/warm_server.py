"""The process that workers are forked from: NumPy, scikit-learn and every allowed class are imported once.

Started by `tenants.warm_process.WarmProcess` as `python -m tenants.warm_server <settings>`, with a socket that keeps
message borders. It reads no tenant's bytes and runs no thread, so a fork of it is sound.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import socket
import sys
import termios
import warnings
from typing import TYPE_CHECKING

import msgspec

from node.kernel import limits
from node.kernel.parent import die_with_parent
from tenants.cgroup_files import Place

if TYPE_CHECKING:
    from tenants.unpickle import Allowlist
    from tenants.worker import Ends

MESSAGE_BYTES_MAX = 16 * 1024
IMPORTED_EARLY = (
    "joblib",
    "numpy.lib.format",
    "scipy.linalg",
    "scipy.sparse.csgraph",
    "scipy.spatial.distance",
    "scipy.special",
    "scipy.stats",
)


class Settings(msgspec.Struct, frozen=True):
    """What the node tells the server once, as JSON in its argument."""

    parent: int
    descriptor: int
    """Of the socket to the node."""
    required: frozenset[str]
    libraries: frozenset[str] = frozenset()
    extra_globals: tuple[str, ...] = ()


class Spawn(msgspec.Struct, frozen=True, tag="spawn"):
    """Fork a worker; the end of its socket and that of the pipe it prints to come along."""

    number: int
    memory_bytes: int
    user: int | None
    cgroup: str = ""
    """Folder of the control group to join; '' with the reason why there is none."""
    cgroup_missing: str = ""


class Started(msgspec.Struct, frozen=True, tag="started"):
    """A worker runs as `pid`; descriptors of its process and of its memory figures come along, the latter if it can be
    had. Number 0: the server is ready."""

    number: int
    pid: int


class NotStarted(msgspec.Struct, frozen=True, tag="not_started"):
    number: int
    reason: str


def main() -> None:
    gc.disable()  # imports make next to no garbage, and looking for it would take a sixth of their time
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    die_with_parent(settings.parent)
    leave_terminal()
    warnings.simplefilter("ignore")  # each would cost time in calls, and nobody reads them
    from tenants import worker  # imports NumPy and joblib

    allowlist = worker.prepare(settings.libraries, settings.extra_globals, IMPORTED_EARLY)
    control = socket.socket(fileno=settings.descriptor)
    signal.signal(signal.SIGCHLD, _reap)
    gc.freeze()  # so that collections in the workers do not copy these pages
    gc.enable()
    control.send(msgspec.json.encode(Started(0, os.getpid())))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES_MAX, 2)
        if not message:
            return  # the node closed its end; the kernel ends the workers with this process
        spawn = msgspec.json.decode(message, type=Spawn)
        with socket.socket(fileno=descriptors[0]) as end:
            _fork(control, spawn, worker.Ends(end.fileno(), descriptors[1]), settings, allowlist)
        os.close(descriptors[1])


def leave_terminal() -> None:
    """Give up the terminal that the node may have been started at: a worker must not put words into it."""
    with contextlib.suppress(OSError):  # there is none
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(terminal, termios.TIOCNOTTY)
        finally:
            os.close(terminal)


def _fork(control: socket.socket, spawn: Spawn, ends: Ends, settings: Settings, allowlist: Allowlist) -> None:
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # not reaped before it has a descriptor
    waits, opens = os.pipe()
    kept: list[int] = []
    try:
        pid = os.fork()
        if pid == 0:
            os.close(opens)
            os.read(waits, 1)  # ends when the parent has opened what it can't once this process is locked down
            _become_worker(spawn, ends, settings, allowlist, parent)
        kept.append(os.pidfd_open(pid))
        with contextlib.suppress(OSError):
            kept.append(os.open(f"/proc/{pid}/smaps_rollup", os.O_RDONLY))
        socket.send_fds(control, [msgspec.json.encode(Started(spawn.number, pid))], kept)
    except OSError as error:
        control.send(msgspec.json.encode(NotStarted(spawn.number, f"the kernel gave no new process: {error}")))
    finally:
        for descriptor in (waits, opens, *kept):
            os.close(descriptor)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _become_worker(spawn: Spawn, ends: Ends, settings: Settings, allowlist: Allowlist, parent: int) -> None:
    """In the forked child; never returns."""
    from tenants import worker

    status = 1
    try:
        os.nice(limits.WORKER_NICENESS)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        place = Place(spawn.cgroup, spawn.cgroup_missing)
        worker.run(ends, settings.required, spawn.memory_bytes, spawn.user, parent, allowlist, place)
        status = 0
    finally:
        os._exit(status)


def _reap(_signal: int, _frame: object) -> None:
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


if __name__ == "__main__":
    main()
