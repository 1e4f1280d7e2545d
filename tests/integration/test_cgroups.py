"""Control groups of workers: on a folder that stands for the tree, and on the real one where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.kernel.clock import SystemClock
from node.kernel.limits import MIB
from tenants import cgroup_files
from tenants.cgroup_files import WorkerLimits
from tenants.cgroups import ControlGroups
from tenants.sandbox import SandboxSettings
from tenants.workers import WarmServer

LIMITS = WorkerLimits(3.0, 256 * MIB)


def only_worker(root: Path) -> Path:
    (folder,) = root.glob("worker-*")
    return folder


def tree(folder: Path, controllers: str = "cpu memory pids", processes: str = "") -> Path:
    (folder / "cgroup.controllers").write_text(controllers)
    (folder / "cgroup.procs").write_text(processes)
    return folder


def test_the_node_moves_below_and_divides_its_group(tmp_path: Path) -> None:
    groups = ControlGroups(tree(tmp_path, processes=f"{os.getpid()}\n"))
    assert groups.missing == ""
    assert (tmp_path / "node" / "cgroup.procs").read_text() == str(os.getpid())
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    assert (tmp_path / "node" / "cpu.weight").read_text() == "10000"
    place = groups.create("ads", 7, LIMITS)
    folder = Path(place.folder)
    assert folder == tmp_path / "worker-ads-7"
    assert (folder / "cpu.weight").read_text() == "300"
    assert int((folder / "memory.max").read_text()) >= LIMITS.memory_bytes
    groups.set_weight(place.folder, 0.5)
    assert (folder / "cpu.weight").read_text() == "50"


def test_a_group_that_is_still_in_use_is_removed_later(tmp_path: Path) -> None:
    groups = ControlGroups(tree(tmp_path))
    folder = Path(groups.create("ads", 1, LIMITS).folder)
    groups.remove(str(folder))  # its files are real ones here: it is not empty, as one with a process is not
    assert folder.is_dir()
    for file in folder.iterdir():
        file.unlink()
    groups.create("ads", 2, LIMITS)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("controllers", "processes", "reason"),
    [("cpu pids", "", "no controller memory"), ("cpu memory pids", "1\n2\n", "other processes than the node")],
)
def test_what_is_not_the_node_s_is_left_alone(tmp_path: Path, controllers: str, processes: str, reason: str) -> None:
    groups = ControlGroups(tree(tmp_path, controllers, processes))
    assert reason in groups.missing
    place = groups.create("ads", 1, LIMITS)
    assert (place.folder, place.missing) == ("", groups.missing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cgroup.controllers", "cgroup.procs"]


def test_a_machine_without_version_2_says_so(tmp_path: Path) -> None:
    assert "can't be read" in ControlGroups.of_this_process(tmp_path / "none").missing
    (tmp_path / "cgroup").write_text("4:memory:/x\n")
    (tmp_path / "mounts").write_text("")
    assert ControlGroups.of_this_process(tmp_path).missing == "cgroup v2 is not mounted on this machine"
    assert ControlGroups(tmp_path / "none").missing


async def test_a_worker_joins_its_folder_and_says_so(tmp_path: Path) -> None:
    groups = ControlGroups(tree(tmp_path))
    server = WarmServer(SandboxSettings(required=frozenset({"cgroup"})), SystemClock(), groups)
    try:
        worker = await server.spawn("ads", 256 * MIB, 2.0)
        folder = only_worker(tmp_path)
        assert (folder / "cgroup.procs").read_text() == str(worker.pid)
        assert "cgroup" in worker.sandbox.layers
        server.set_weight(worker, 4.0)
        assert (folder / "cpu.weight").read_text() == "400"
    finally:
        await server.stop()


def real_root() -> Path | None:
    """Version 2's mount point, where this process may make groups in it."""
    mounted = cgroup_files.mount_point(Path("/proc/self/mounts").read_text())
    return Path(mounted) if mounted and os.access(mounted, os.W_OK) else None


@pytest.fixture
def own_group() -> Iterator[Path]:
    """A real group of this test's own, in which this process may make others; it is back where it was afterwards."""
    root = real_root()
    if root is None:
        pytest.skip("no cgroup v2 that this process may write to, so joining a real group is not tested")
    before = root / cgroup_files.own_group(Path("/proc/self/cgroup").read_text()).lstrip("/")
    own = root / f"headrace-test-{os.getpid()}"
    own.mkdir()
    yield own
    (before / "cgroup.procs").write_text(str(os.getpid()))
    for left in [path for path in own.iterdir() if path.is_dir()]:
        left.rmdir()
    own.rmdir()


async def test_a_worker_joins_a_real_group_that_goes_with_it(own_group: Path) -> None:
    groups = ControlGroups(own_group, controllers=())  # whichever the machine has: only membership is looked at
    assert groups.missing == ""
    server = WarmServer(SandboxSettings(), SystemClock(), groups)
    try:
        worker = await server.spawn("ads", 256 * MIB)
        folder = only_worker(own_group)
        assert (folder / "cgroup.procs").read_text().split() == [str(worker.pid)]
        assert "cgroup" in worker.sandbox.layers
        await worker.close()
        groups.create("other", 1, LIMITS)
        assert not folder.exists()
    finally:
        await server.stop()
