"""Who may do what below the watched directory, as `systemd/` and README.md have it made: by users of the kernel's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IDS = {"headrace": 40_001, "headrace-tenants": 40_002, "grocery": 40_003, "ads": 40_004, "ann": 40_005, "ben": 40_006}
STEP_S_MAX = 30

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can become other users")


@dataclass(frozen=True)
class User:
    name: str
    group: str
    groups: tuple[str, ...]
    umask: int = 0o022

    def can(self, command: str, *paths: Path) -> bool:
        ran = subprocess.run(
            ["sh", "-c", command, "sh", *paths],
            user=IDS[self.name],
            group=IDS[self.group],
            extra_groups=[IDS[name] for name in self.groups],
            umask=self.umask,
            cwd="/",
            capture_output=True,
            timeout=STEP_S_MAX,
        )
        return ran.returncode == 0


def people_of(tenant: str, name: str, umask: int = 0o022) -> User:
    return User(name, name, (tenant, "headrace-tenants"), umask)


NODE = User("headrace", "headrace", (), 0o027)
"""With the unit's UMask."""


def documented(pattern: str, file: str) -> tuple[str, ...]:
    (found,) = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    return found if isinstance(found, tuple) else (found,)


@pytest.fixture
def watched() -> Iterator[Path]:
    """Two tenants' folders in it, made as the tmpfiles line and the command in README.md say."""
    base = Path(tempfile.mkdtemp(prefix="headrace-folders-"))
    base.chmod(0o755)  # pytest's own are closed to other users
    path, mode, user, group = documented(r"^d (/srv\S+/tenants) (\d+) (\S+) +(\S+)", "systemd/tmpfiles.d/headrace.conf")
    root = base / "tenants"
    root.mkdir()
    os.chown(root, IDS[user], IDS[group])
    root.chmod(int(mode, 8))
    (options,) = documented(rf"^ +(install -d .*) {path}/grocery$", "README.md")
    for tenant in ("grocery", "ads"):
        words = [str(IDS.get(word, word)) for word in options.replace("grocery", tenant).split()]
        subprocess.run([*words, root / tenant], check=True, timeout=STEP_S_MAX)
    yield root
    shutil.rmtree(base)


def test_the_unit_has_the_umask_of_this_test() -> None:
    assert documented(r"^UMask=(\d+)$", "systemd/headrace.service") == (f"{NODE.umask:04o}",)


def test_a_tenant_drops_models_and_reads_the_answer(watched: Path) -> None:
    ann, folder = people_of("grocery", "ann"), watched / "grocery"
    assert ann.can('echo x >"$1" && mv "$1" "$2"', folder / ".coupon", folder / "coupon.toml")
    assert NODE.can('ls "$1" && cat "$2"', watched, folder / "coupon.toml")
    status = folder / "coupon.status.json"
    assert NODE.can('echo {} >"$1.new" && mv "$1.new" "$1"', status)
    assert ann.can('cat "$1"', status)
    # Whoever else is of the tenant replaces and deletes what she dropped.
    assert people_of("grocery", "ben").can('mv "$1" "$2" && rm "$2"', folder / "coupon.toml", folder / "bid.toml")


def test_a_tenant_reaches_no_other_one(watched: Path) -> None:
    ann, ads = people_of("grocery", "ann"), watched / "ads"
    (ads / "bid.toml").touch(0o666)
    for command in ('ls "$1"', 'cat "$1/bid.toml"', 'echo x >"$1/evil.toml"', 'rmdir "$1"', 'mv "$1" "$1-old"'):
        assert not ann.can(command, ads), command
    assert not ann.can('mkdir "$1/new"', watched)
    assert not User("ann", "ann", ()).can('ls "$1"', watched)
