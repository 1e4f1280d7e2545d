"""The systemd units fit the node that they run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from node.kernel.limits import CLUSTER_STOP_MS_MAX, STOP_MS_MAX

UNITS = Path(__file__).resolve().parents[2] / "systemd"
README = UNITS.parent / "README.md"
HTTP_STOP_S_MAX = 5 + 5
"""Of peers, then of readers."""


def test_a_node_ends_by_its_own_bounds_before_systemd_kills_it() -> None:
    unit = (UNITS / "headrace.service").read_text()
    timeout_s = int(re.findall(r"^TimeoutStopSec=([0-9]+)$", unit, re.MULTILINE)[0])
    assert timeout_s > (STOP_MS_MAX + CLUSTER_STOP_MS_MAX) / 1000 + HTTP_STOP_S_MAX


def test_the_install_procedure_fits_the_unit() -> None:
    unit = dict(re.findall(r"^(\w+)=(.*)$", (UNITS / "headrace.service").read_text(), re.MULTILINE))
    install = README.read_text().partition("## Install it on a host\n")[2].partition("\n## ")[0]
    (config,) = re.findall(r"^    \[node\]\n(?:    .*\n)+", install, re.MULTILINE)
    given = tomllib.loads(config)
    assert given["node"]["data_dir"] == f"/var/lib/{unit['StateDirectory']}"
    assert given["tenants"]["directory"] == unit["ReadWritePaths"]
    program, *arguments = unit["ExecStart"].split()
    assert f"ln -s {program} /usr/local/bin/" in install
    assert f"headrace check {' '.join(arguments[1:])}\n" in install
    named = set(re.findall(r" (systemd/\S+)", install))
    assert named == {f"systemd/{path.relative_to(UNITS)}" for path in UNITS.rglob("*") if path.is_file()}


def test_the_clusters_secret_is_there_for_the_nodes_user_also_while_the_unit_is_stopped() -> None:
    readme = README.read_text()
    (path,) = re.findall(r'^ *secret_file += "(/[^"]+)"', readme, re.MULTILINE)
    assert f" | install -m 0640 -o root -g headrace /dev/stdin {path}\n" in readme
    folders = (UNITS / "tmpfiles.d" / "headrace.conf").read_text()
    assert re.search(rf"^d {Path(path).parent} +0750 root +headrace ", folders, re.MULTILINE)
    assert not [unit for unit in UNITS.rglob("*") if unit.is_file() and "LoadCredential" in unit.read_text()]
