"""Locks the calling process down before it touches a tenant's bytes.

Layers, each useful without the others: no new privileges; resource limits; an own user, when started as root;
landlock (nothing but Python's libraries can be opened, and only for reading); seccomp (a list of the system
calls that computing needs, all else is answered EPERM; threads are not among them); a control group of its own,
where the node could make one. `apply` reports which are in force and refuses to go on
without those that the operator requires.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import landlock

from node.kernel.errors import SandboxUnavailable
from node.kernel.limits import WORKER_THREADS_MAX
from node.kernel.parent import die_with_parent
from tenants.cgroup_files import Place

try:
    import pyseccomp
except (ImportError, RuntimeError):  # RuntimeError: libseccomp itself is not installed
    pyseccomp = None

LAYERS = ("cgroup", "resource_limits", "own_user", "no_new_privileges", "landlock", "seccomp")
"""In the order in which they are put into force."""
OWN_USER_FIRST = 61_700
"""Inside systemd's range of dynamic users, of which no host account is."""

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_OPEN_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FILES_MAX = 64


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """What an operator decides about workers.

    `required` layers must be in force or no model runs. `own_user_first` is the first of the user ids that
    workers get, one a tenant, when the node runs as root; None leaves them the node's own. `libraries` names the
    optional model libraries (xgboost, lightgbm) that are allowed, `extra_globals` more lines for the list of
    `tenants/allowlist.txt`.
    """

    required: frozenset[str] = frozenset({"no_new_privileges", "resource_limits", "landlock", "seccomp"})
    own_user_first: int | None = OWN_USER_FIRST
    libraries: frozenset[str] = frozenset()
    extra_globals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SandboxReport:
    """Which layers are in force, and why the missing ones are missing."""

    layers: tuple[str, ...]
    missing: dict[str, str] = field(default_factory=dict)


class _LayerMissing(Exception):
    """Why one layer can't be had."""


_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def close_files_except(*kept: int, output: int | None = None) -> None:
    """Nothing of the warm server's is open any more; what is printed goes to `output`, or nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null if stream == 0 or output is None else output, stream)
    last = 3
    for descriptor in sorted(kept):
        os.closerange(last, descriptor)
        last = descriptor + 1
    os.closerange(last, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], last))


def apply(
    required: frozenset[str], memory_bytes: int, user: int | None, parent: int, place: Place | None = None
) -> SandboxReport:
    """Put every layer that can be had into force; there is no way back.

    `memory_bytes` is how much the process may take beyond what it has mapped now. `user` is the user and group
    id to become, None to stay. `place` is the control group to join. Raises SandboxUnavailable when a required layer
    is missing.
    """
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("cgroup", lambda: _join(place or Place())),
        ("resource_limits", lambda: _limit_resources(memory_bytes, own_user=user is not None and os.getuid() == 0)),
        ("own_user", lambda: _become(user)),
        ("no_new_privileges", lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1)),
        ("landlock", _restrict_files),
        ("seccomp", _restrict_calls),
    )
    layers, missing = [], {}
    for name, step in steps:
        try:
            step()
        except _LayerMissing as reason:
            missing[name] = str(reason)
        except OSError as error:
            missing[name] = f"the kernel refused it: {error.strerror or error}"
        else:
            layers.append(name)
        if name == "own_user":  # a change of user clears both
            _prctl(_PR_SET_DUMPABLE, 0)
            die_with_parent(parent)
    lacking = sorted(required - set(layers))
    if lacking:
        reasons = "; ".join(f"{name}: {missing.get(name, 'there is no such layer')}" for name in lacking)
        raise SandboxUnavailable(
            f"a required layer of the sandbox can't be had ({reasons}); provide it, or take it off the required layers"
        )
    return SandboxReport(tuple(layers), missing)


def _join(place: Place) -> None:
    if not place.folder:
        raise _LayerMissing(place.missing)
    (Path(place.folder) / "cgroup.procs").write_text(str(os.getpid()))


def _limit_resources(memory_bytes: int, own_user: bool) -> None:
    mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    bounds = {
        resource.RLIMIT_AS: mapped_bytes + memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: _FILES_MAX,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if own_user:  # it counts all of a user's threads, so it bounds nothing useful for a shared user
        bounds[resource.RLIMIT_NPROC] = WORKER_THREADS_MAX
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        value = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (value, value))


def _become(user: int | None) -> None:
    if user is None:
        raise _LayerMissing("no user id is set aside for workers")
    if os.getuid() != 0:
        raise _LayerMissing("the node does not run as root, so its workers keep its user")
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def library_folders() -> list[str]:
    """Where a late import, or a shared library, may be read from."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = {sysconfig.get_path(name) for name in names} | {"/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    return sorted(folder for folder in folders if os.path.isdir(folder) and os.access(folder, os.R_OK))


def _restrict_files() -> None:
    ctypes.set_errno(0)  # the package takes a stale errno for a failure
    try:
        rules = landlock.Ruleset()
        for folder in library_folders():
            rules.allow(folder, rules=landlock.FSAccess.READ_FILE | landlock.FSAccess.READ_DIR)
        rules.apply()
        os.close(rules._fd)  # the package leaves it open
    except landlock.LandlockError as error:
        raise _LayerMissing(f"landlock: {error}") from error


_CALLS = (
    *("read", "readv", "pread64", "preadv", "write", "writev", "lseek", "close", "dup"),
    *("fstat", "stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "getdents64", "getcwd"),
    *("readlink", "readlinkat", "poll", "ppoll", "select", "pselect6"),
    *("mmap", "munmap", "mremap", "mprotect", "madvise", "brk", "membarrier"),
    *("futex", "set_robust_list", "get_robust_list", "rseq", "set_tid_address", "arch_prctl"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall"),
    *("sched_yield", "sched_getaffinity", "getcpu", "getpid", "gettid", "getppid"),
    *("getuid", "geteuid", "getgid", "getegid"),
    *("clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time", "times"),
    *("getrusage", "getrlimit", "sysinfo", "uname", "getrandom", "exit", "exit_group"),
)


def _restrict_calls() -> None:
    if pyseccomp is None:
        raise _LayerMissing("libseccomp is not installed")
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    masked, equal = pyseccomp.MASKED_EQ, pyseccomp.EQ
    for name in _CALLS:
        rules.add_rule(pyseccomp.ALLOW, name)
    for command in (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL):
        rules.add_rule(pyseccomp.ALLOW, "fcntl", pyseccomp.Arg(1, equal, command))  # F_SETOWN could signal others
    rules.add_rule(pyseccomp.ALLOW, "open", pyseccomp.Arg(1, masked, _OPEN_CHANGES, 0))
    rules.add_rule(pyseccomp.ALLOW, "openat", pyseccomp.Arg(2, masked, _OPEN_CHANGES, 0))
    rules.add_rule(pyseccomp.ALLOW, "prlimit64", pyseccomp.Arg(0, equal, 0), pyseccomp.Arg(2, equal, 0))
    rules.add_rule(pyseccomp.ALLOW, "tgkill", pyseccomp.Arg(0, equal, os.getpid()))
    try:
        rules.load()
    except (OSError, RuntimeError) as error:
        raise _LayerMissing(f"seccomp: {error}") from error
