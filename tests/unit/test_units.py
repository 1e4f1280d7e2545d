"""The systemd units fit the node that they run."""

from __future__ import annotations

import re
from pathlib import Path

from node.kernel.limits import CLUSTER_STOP_MS_MAX, STOP_MS_MAX

UNITS = Path(__file__).resolve().parents[2] / "systemd"
HTTP_STOP_S_MAX = 5 + 5
"""Of peers, then of readers."""


def test_a_node_ends_by_its_own_bounds_before_systemd_kills_it() -> None:
    unit = (UNITS / "headrace.service").read_text()
    timeout_s = int(re.findall(r"^TimeoutStopSec=([0-9]+)$", unit, re.MULTILINE)[0])
    assert timeout_s > (STOP_MS_MAX + CLUSTER_STOP_MS_MAX) / 1000 + HTTP_STOP_S_MAX


def test_a_clustered_node_gets_its_secret_as_a_credential() -> None:
    text = (UNITS / "headrace.service.d" / "cluster.conf").read_text()
    (name,) = re.findall(r"^LoadCredential=([^:]+):/etc/headrace/", text, re.MULTILINE)
    assert f'secret_file = "/run/credentials/headrace.service/{name}"' in text
