"""What code in a locked-down process can't do, tried by such code: here, not by way of a model file."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from node.kernel.errors import SandboxUnavailable
from node.kernel.limits import MIB
from tenants import sandbox

PTRACE_ATTACH = 16
NR_PROCESS_VM_READV = 310
USER = 61_900

ALL_LAYERS = frozenset({"no_new_privileges", "resource_limits", "landlock", "seccomp"})


def in_sandbox(
    attempt: Callable[[], object],
    user: int | None = USER,
    required: frozenset[str] = ALL_LAYERS,
    before: Callable[[], object] = lambda: None,
) -> tuple[bool, str]:
    """Whether `attempt` succeeded in a sandboxed child, and what it gave or raised."""
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            sandbox.close_files_except(writer)
            before()
            sandbox.apply(required, 256 * MIB, user, parent)
            try:
                answer = f"+{attempt()}"
            except BaseException as error:
                answer = f"-{type(error).__name__}: {error}"
            os.write(writer, answer.encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    assert answer, f"the sandboxed process ended with status {status} and said nothing"
    return answer[0] == "+", answer[1:]


def libc_call(*arguments: object) -> int:
    """A system call by number; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def connect() -> None:
    socket.socket().connect(("127.0.0.1", 9))


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


ATTEMPTS: dict[str, Callable[[], object]] = {
    "open a network socket": connect,
    "open a datagram socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "open a Unix socket": lambda: socket.socket(socket.AF_UNIX),
    "open a raw netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "read /etc/shadow": lambda: Path("/etc/shadow").read_text(),
    "read /etc/passwd": lambda: Path("/etc/passwd").read_text(),
    "list the root folder": lambda: os.listdir("/"),
    "read the parent's environment": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
    "write a file": lambda: Path("/tmp/headrace-sandbox-test").write_text("x"),
    "append to a file": lambda: os.open("/dev/null", os.O_WRONLY | os.O_APPEND),
    "make a folder": lambda: os.mkdir("/tmp/headrace-sandbox-test"),
    "remove a file": lambda: os.unlink(__file__),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "run a program": lambda: subprocess.run(["/bin/true"], check=True),
    "fork": fork,
    "signal the parent": lambda: os.kill(os.getppid(), 0),
    "kill the parent": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "signal everybody": lambda: os.kill(-1, 0),
    "trace the parent": lambda: libc_call(101, PTRACE_ATTACH, os.getppid(), 0, 0),
    "read the parent's memory": lambda: libc_call(NR_PROCESS_VM_READV, os.getppid(), 0, 0, 0, 0, 0),
    "open the parent's process": lambda: os.pidfd_open(os.getppid()),
    "own signals by fcntl": lambda: libc_call(72, 0, 8, os.getppid()),
    "become root": lambda: os.setuid(0),
    "unshare": lambda: libc_call(272, 0x10000000),
    "mount": lambda: libc_call(165, 0, 0, 0, 0, 0),
    "chroot": lambda: os.chroot("/"),
    "load bpf": lambda: libc_call(321, 0, 0, 0),
    "use io_uring": lambda: libc_call(425, 1, 0),
    "add a key": lambda: libc_call(248, 0, 0, 0, 0, 0),
    "watch performance": lambda: libc_call(298, 0, 0, -1, -1, 0),
    "handle page faults": lambda: libc_call(323, 0),
    "raise a limit": lambda: __import__("resource").setrlimit(7, (4096, 4096)),
    "change the parent's limits": lambda: __import__("resource").prlimit(os.getppid(), 7, (64, 64)),
    "make a pipe to nowhere": os.pipe,
    "share memory": lambda: os.memfd_create("x"),
    "allocate 3 GiB": lambda: np.ones(3 * 1024 * MIB, dtype=np.uint8),
}


@pytest.mark.parametrize("what", ATTEMPTS)
def test_can_not(what: str) -> None:
    succeeded, answer = in_sandbox(ATTEMPTS[what])
    assert not succeeded, answer
    assert answer.startswith(("PermissionError", "MemoryError", "ValueError: not allowed to raise")), answer


@pytest.mark.parametrize("what", ["open a network socket", "read /etc/shadow", "exec", "fork", "signal the parent"])
def test_can_not_without_an_own_user(what: str) -> None:
    succeeded, answer = in_sandbox(ATTEMPTS[what], user=None)
    assert not succeeded, answer


SOME = (
    "open a network socket",
    "read /etc/passwd",
    "write a file",
    "exec",
    "fork",
    "signal everybody",
    "allocate 3 GiB",
)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("what", SOME)
def test_can_not_when_the_node_is_not_root(what: str) -> None:
    succeeded, answer = in_sandbox(ATTEMPTS[what], before=lambda: os.setresuid(USER, USER, USER))
    assert not succeeded, answer


HARMLESS = ("open a Unix socket", "read /etc/passwd", "list the root folder", "fork", "signal the parent")


@pytest.mark.parametrize("what", HARMLESS)
def test_could_outside(what: str) -> None:
    """The attempts themselves are sound: without a sandbox they succeed."""
    ATTEMPTS[what]()


def compute() -> str:
    from sklearn.linear_model import LogisticRegression

    rows = np.random.default_rng(0).random((50, 3))
    model = LogisticRegression().fit(rows, rows[:, 0] > 0.5)
    return str(model.score(rows, rows[:, 0] > 0.5) > 0.8)


def thread() -> None:
    threading.Thread(target=print).start()


@pytest.mark.parametrize("user", [USER, None])
def test_can_start_no_thread(user: int | None) -> None:
    succeeded, answer = in_sandbox(thread, user=user)
    assert not succeeded, answer
    assert "can't start new thread" in answer


def test_can_compute_and_import() -> None:
    import sklearn.linear_model

    assert sklearn.linear_model
    # The warm server's environment does the same: a library that wants threads and gets none may wait for them.
    assert in_sandbox(compute, before=lambda: threadpool_limits(1)) == (True, "True")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_has_its_own_user() -> None:
    users = lambda: (os.getuid(), os.geteuid(), os.getgid(), os.getegid())  # noqa: E731
    assert in_sandbox(users) == (True, str((USER,) * 4))


def test_a_required_layer_that_is_missing_is_refused() -> None:
    program = (
        "import os, sys\n"
        "from tenants import sandbox\n"
        "sandbox.pyseccomp = None\n"
        "try:\n"
        "    sandbox.apply(frozenset({'seccomp'}), 1 << 28, None, os.getppid())\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(SandboxUnavailable.__name__)
    assert "seccomp: libseccomp is not installed" in done.stdout


_AT_A_TERMINAL = """
import os
from tenants.warm_server import leave_terminal
os.setsid()
ours, theirs = os.openpty()
os.close(os.open(os.ttyname(theirs), os.O_RDWR))  # a leader without a terminal gets the first that it opens
os.close(os.open("/dev/tty", os.O_RDWR))
if os.fork() == 0:
    leave_terminal()
    leave_terminal()  # without one, too
    try:
        os.open("/dev/tty", os.O_RDWR)
    except OSError as error:
        os._exit(error.errno)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_what_a_node_starts_has_not_the_terminal_that_the_node_was_started_at() -> None:
    done = subprocess.run([sys.executable, "-c", _AT_A_TERMINAL], capture_output=True, text=True, check=True)
    assert int(done.stdout) == errno.ENXIO
