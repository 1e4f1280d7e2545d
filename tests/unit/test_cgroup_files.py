"""What is written to a worker's control group."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config_sections import SandboxLayer
from node.kernel.limits import MIB, WEIGHT_MAX, WEIGHT_MIN
from tenants import cgroup_files
from tenants.cgroup_files import WorkerLimits
from tenants.sandbox import LAYERS

HYBRID = "9:name=systemd:/\n4:memory:/x\n0::/system.slice/headrace.service\n"
MOUNTS = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"


def test_an_operator_can_demand_every_layer_and_no_other() -> None:
    assert get_args(SandboxLayer) == LAYERS


@pytest.mark.parametrize(
    ("text", "expected"), [(HYBRID, "/system.slice/headrace.service"), ("0::/\n", "/"), ("4:memory:/x\n", ""), ("", "")]
)
def test_the_own_group_is_that_of_version_2(text: str, expected: str) -> None:
    assert cgroup_files.own_group(text) == expected


def test_the_mount_point_is_that_of_version_2() -> None:
    assert cgroup_files.mount_point(MOUNTS) == "/sys/fs/cgroup/unified"
    assert cgroup_files.mount_point("tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\n") == ""


@given(st.floats(WEIGHT_MIN, WEIGHT_MAX), st.floats(WEIGHT_MIN, WEIGHT_MAX))
def test_weights_keep_their_order_inside_the_kernel_s_range(one: float, other: float) -> None:
    ours, theirs = cgroup_files.cpu_weight(one), cgroup_files.cpu_weight(other)
    assert 1 <= ours <= 10_000
    assert ours <= theirs or one >= other


def test_a_worker_s_files() -> None:
    files = cgroup_files.worker_files(WorkerLimits(2.5, 512 * MIB))
    assert files["cpu.weight"] == "250"
    assert int(files["memory.max"]) >= 512 * MIB
    assert files["pids.max"] == "1"
    assert files["memory.swap.max"] == "0"


def test_what_a_controller_list_lacks() -> None:
    assert cgroup_files.lacking("hugetlb cpu\n", ("cpu", "memory", "pids")) == ["memory", "pids"]
    assert cgroup_files.enabling(("cpu", "pids")) == "+cpu +pids"
