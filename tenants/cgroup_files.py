"""(P) What a worker's control group (cgroup v2) is to hold: names of files and the values written to them.

The kernel's Documentation/admin-guide/cgroup-v2.rst says what each means.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from node.kernel.limits import WORKER_MEMORY_EXTRA_BYTES, WORKER_THREADS_MAX

CONTROLLERS = ("cpu", "memory", "pids")
NODE = "node"
"""The group of the node itself and its warm server: a group that has groups below it may hold no process."""
WORKER_PREFIX = "worker-"
NOT_ASKED = "no control groups were made here"
_CPU_WEIGHT_DEFAULT, _CPU_WEIGHT_MAX = 100, 10_000
NODE_FILES = {"cpu.weight": str(_CPU_WEIGHT_MAX)}
"""The node's loop serves all tenants, and goes before any one tenant's model: niceness holds inside a group only."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """`weight` is the tenant's, 1 being everybody's; `memory_bytes` what a worker may take of its own."""

    weight: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Of one worker: the group's folder, or '' and why there is none."""

    folder: str = ""
    missing: str = NOT_ASKED


def own_group(cgroups: str) -> str:
    """Path below the mount point, from the text of /proc/self/cgroup; '' on a machine without version 2."""
    return next((line[3:] for line in cgroups.splitlines() if line.startswith("0::/")), "")


def mount_point(mounts: str) -> str:
    """Of version 2, from the text of /proc/self/mounts; '' when it is not mounted."""
    fields = (line.split() for line in mounts.splitlines())
    return next((words[1] for words in fields if len(words) > 2 and words[2] == "cgroup2"), "")


def cpu_weight(weight: float) -> int:
    """The kernel's, 1 to 10,000, of a tenant's: 100 is everybody's. Rounded, and cut at both ends."""
    return max(1, min(round(weight * _CPU_WEIGHT_DEFAULT), _CPU_WEIGHT_MAX))


def worker_files(limits: WorkerLimits) -> dict[str, str]:
    """Address space is bound more tightly by the worker's own limit, at which an allocation fails in good order; the
    group's bound holds where that does not count, and there the kernel kills."""
    return {
        "cpu.weight": str(cpu_weight(limits.weight)),
        "memory.max": str(limits.memory_bytes + WORKER_MEMORY_EXTRA_BYTES),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": str(WORKER_THREADS_MAX),
    }


def lacking(controllers: str, needed: Iterable[str]) -> list[str]:
    """Which of the needed controllers the text of cgroup.controllers does not name."""
    return sorted(set(needed) - set(controllers.split()))


def enabling(needed: Iterable[str]) -> str:
    """For cgroup.subtree_control."""
    return " ".join(f"+{controller}" for controller in needed)
