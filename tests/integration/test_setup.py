"""`scripts/setup` up to where it would install something: which Python it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP_S_MAX = 60
STOPPED = 7
FAKE_PYTHON = f"""#!/bin/sh
case "$*" in
    *"-m venv"*) exit {STOPPED} ;;
    --version) echo Python of the test ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One without an environment yet."""
    (tmp_path / "tree" / "scripts").mkdir(parents=True)
    for name in ("scripts/setup", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


def set_up(tree: Path, python: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HEADRACE_PYTHON": str(python)}
    return subprocess.run(
        [tree / "scripts" / "setup"], env=environment, capture_output=True, text=True, timeout=SETUP_S_MAX
    )


def test_the_python_that_is_named_is_taken(tree: Path, tmp_path: Path) -> None:
    python = tmp_path / "my own" / "python"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    ran = set_up(tree, python)
    assert (ran.returncode, ran.stderr) == (STOPPED, "setup: making .venv with Python of the test\n")


def test_no_other_is_taken_for_one_that_does_not_work(tree: Path, tmp_path: Path) -> None:
    ran = set_up(tree, tmp_path / "none")
    assert ran.returncode == 1
    assert f"HEADRACE_PYTHON is {tmp_path}/none, and no Python 3.11 or later runs there" in ran.stderr
    assert not (tree / ".venv").exists()
