"""A normal install: the wheel holds every file of the packages, and the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_tidy import PACKAGES, ROOT, tracked_paths

BUILD_S_MAX = 120
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
"""By the environment's own build backend: an installer's isolation would fetch one."""


def packaged() -> set[str]:
    """What git tracks of the packages."""
    names = {path.relative_to(ROOT).as_posix() for path in tracked_paths()}
    return {name for name in names if name.partition("/")[0] in PACKAGES}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    tree, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for name in (*packaged(), "pyproject.toml"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    ran = subprocess.run([sys.executable, "-c", BUILD, built], cwd=tree, capture_output=True, timeout=BUILD_S_MAX)
    assert ran.returncode == 0, ran.stderr.decode()
    (path,) = Path(built).glob("headrace-*.whl")
    return zipfile.ZipFile(path)


def test_every_file_of_the_packages_is_installed(wheel: zipfile.ZipFile) -> None:
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert installed == packaged()


def test_the_command_is_installed(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert wheel.read(name).decode().split("\n")[:2] == ["[console_scripts]", "headrace = node.__main__:main"]
