"""Makes and removes the control groups of workers, in the part of the tree that systemd has delegated to the node.

Nothing here fails: where groups can't be had, `missing` says why, and the report of each worker's sandbox repeats it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from tenants import cgroup_files
from tenants.cgroup_files import CONTROLLERS, NODE, NOT_ASKED, WORKER_PREFIX, Place, WorkerLimits

_OPTIONAL = frozenset({"memory.swap.max", "memory.oom.group"})
"""Not there without swap accounting, or in older kernels."""


class ControlGroups:
    """Groups below `root`, one a worker. `root` None: there are none, for the reason in `missing`.

    `controllers` are those that the groups need; only tests need fewer than all.
    """

    def __init__(self, root: Path | None, missing: str = NOT_ASKED, controllers: Sequence[str] = CONTROLLERS) -> None:
        self._root = root
        self._controllers = tuple(controllers)
        self._leaving: set[str] = set()
        self.missing = "" if root is not None else missing
        if root is not None:
            try:
                self.missing = self._prepare(root)
            except OSError as error:
                self.missing = f"{root} is not the node's to divide: {error.strerror or error}"

    @classmethod
    def of_this_process(cls, proc: Path = Path("/proc/self")) -> ControlGroups:
        """In the group that this process is in, which moves to a group below it: if that is its own group."""
        try:
            group = cgroup_files.own_group((proc / "cgroup").read_text())
            mounted = cgroup_files.mount_point((proc / "mounts").read_text())
        except OSError as error:
            return cls(None, f"the process's own group can't be read: {error}")
        if not group or not mounted:
            return cls(None, "cgroup v2 is not mounted on this machine")
        return cls(Path(mounted) / group.lstrip("/"))

    def _prepare(self, root: Path) -> str:
        """Why it can't be used; '' when the node's own processes are moved below and the controllers are on."""
        lacking = cgroup_files.lacking((root / "cgroup.controllers").read_text(), self._controllers)
        if lacking:
            return f"{root} has no controller {', '.join(lacking)}; set Delegate=cpu memory pids in the node's unit"
        own = str(os.getpid())
        processes = set((root / "cgroup.procs").read_text().split())
        if processes - {own}:
            return f"{root} holds other processes than the node; run it as a unit with Delegate=cpu memory pids"
        node = root / NODE
        node.mkdir(exist_ok=True)
        (node / "cgroup.procs").write_text(own)
        if self._controllers:
            (root / "cgroup.subtree_control").write_text(cgroup_files.enabling(self._controllers))
        self._write(node, cgroup_files.NODE_FILES)
        for left in root.glob(f"{WORKER_PREFIX}*"):
            self._remove(str(left))
        return ""

    def create(self, tenant: str, number: int, limits: WorkerLimits) -> Place:
        """A group for one worker to join. `tenant` is a checked name: it is part of the folder's."""
        self._sweep()
        if self._root is None or self.missing:
            return Place("", self.missing)
        folder = self._root / f"{WORKER_PREFIX}{tenant}-{number}"
        try:
            folder.mkdir(exist_ok=True)
            self._write(folder, cgroup_files.worker_files(limits))
        except OSError as error:
            self.remove(str(folder))
            return Place("", f"the group {folder.name} can't be made: {error.strerror or error}")
        return Place(str(folder), "")

    def _write(self, folder: Path, files: dict[str, str]) -> None:
        for name, value in files.items():
            if name.partition(".")[0] not in self._controllers:
                continue
            try:
                (folder / name).write_text(value)
            except OSError:
                if name not in _OPTIONAL:
                    raise

    def set_weight(self, folder: str, weight: float) -> None:
        if folder and "cpu" in self._controllers:
            try:
                (Path(folder) / "cpu.weight").write_text(str(cgroup_files.cpu_weight(weight)))
            except OSError as error:
                import structlog  # as late as this: groups are made before the node imports what takes it long

                log = structlog.get_logger(__name__)
                log.warning("weight of a control group not changed", folder=folder, error=str(error))

    def remove(self, folder: str) -> None:
        """Of a worker that has ended; what the kernel does not let go yet is tried again later."""
        if folder:
            self._leaving.add(folder)
            self._sweep()

    def _sweep(self) -> None:
        for folder in list(self._leaving):
            self._remove(folder)

    def _remove(self, folder: str) -> None:
        # Older kernels have no such file; there is no process in the group but by a fault of the sandbox.
        with contextlib.suppress(OSError), (Path(folder) / "cgroup.kill").open("r+") as kill:
            kill.write("1")
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            self._leaving.discard(folder)
        except OSError:
            self._leaving.add(folder)
        else:
            self._leaving.discard(folder)
