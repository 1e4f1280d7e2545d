"""In what order a node starts: what takes longest first, and nothing imported ahead of it that could come later.

Each test is a process of its own, since what is imported here has been imported by other tests.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from node.kernel.child import in_child

ROOT = Path(__file__).parents[2]
GOOD = '[events]\ntypes = ["search"]\n'
SECONDS_MAX = 60
AT_IMPORT = """
import os, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            for pid in open(f"/proc/self/task/{{os.getpid()}}/children").read().split():
                words = []
                while len(words) < 5:  # a new program's words are there a moment after it has begun
                    words = open(f"/proc/{{pid}}/cmdline").read().split(chr(0))
                print("started:", words[3])
            print("loaded:", *{heavy!r} & sys.modules.keys())
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Stop())
from node.__main__ import app
app(["run", "--config", {config!r}])
"""


def lines_at_import(name: str, heavy: set[str], folder: Path) -> list[str]:
    """What `headrace run` has started, and which of the `heavy` modules it has loaded, when it imports `name`."""
    config = folder / "node.toml"
    config.write_text(GOOD)
    code = AT_IMPORT.format(name=name, heavy=heavy, config=str(config))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS_MAX)
    return (done.stdout + done.stderr).splitlines()


def loaded(modules: str, heavy: set[str]) -> set[str]:
    """Which of the `heavy` modules are loaded once these modules, by comma, are."""
    code = f"import sys, {modules}; print(*{heavy!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS_MAX)
    assert not done.stderr, done.stderr
    return set(done.stdout.split())


def test_a_node_imports_only_what_it_needs() -> None:
    """sklearn and the like are the workers', fsspec is a store by URL's, pyarrow is for building tables and exports."""
    heavy = {"sklearn", "scipy", "joblib", "pandas", "pyarrow", "fsspec", "typer.rich_utils", "jsonschema"}
    assert loaded("node.__main__, node.logs, node.app", heavy) == set()


def test_a_command_for_a_running_cluster_imports_only_a_client() -> None:
    """It is run while nodes start, on their machines."""
    heavy = {"aiohttp.web", "aiokafka", "fsspec", "pysyncobj", "rocksdict", "uvloop", "node.app"}
    assert loaded("node.__main__, node.config, node.cluster_console", heavy) == set()


def test_workers_are_warmed_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    heavy = {"numpy", "structlog", "asyncio", "aiohttp", "aiokafka", "rocksdict", "uvloop"}
    assert lines_at_import("node.logs", heavy, tmp_path) == ["started: tenants.warm_server", "loaded:"]


def test_nothing_is_imported_from_the_folder_that_a_node_is_started_in(tmp_path: Path) -> None:
    """It is the operator's: the default config has a folder `tenants` beside it, which is the name of a package too."""
    (tmp_path / "tenants").mkdir()
    (tmp_path / "node.toml").write_text(GOOD)
    (tmp_path / "joblib.py").write_text("raise SystemExit('this is not the library')\n")
    command = [sys.executable, "-P", "-m", "node", "sandbox-report", "--config", "node.toml", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS_MAX)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resource_limits" in msgspec.json.decode(done.stdout)["layers"]


def test_a_child_imports_nothing_from_that_folder_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ctypes.py").write_text("raise SystemExit('this is not the library')\n")
    (tmp_path / "json.py").write_text("raise SystemExit('this is not the library')\n")
    monkeypatch.chdir(tmp_path)

    def talk(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        return process.communicate()

    assert asyncio.run(in_child(("-c", "import json; print(json.dumps([]))"), talk, subprocess.PIPE)) == (b"[]\n", b"")
