"""The shape of the tree, checked: which way imports point, how long things are, what may not be in a file.

Each checker takes source text and gives the problems it sees, so that it is also run on text that is wrong:
a checker that can't fail proves nothing.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("node", "replication", "tenants")
KERNEL = "node.kernel"
WIRING = (
    "node.app",
    "node.warming",
    "node.config_check",
    "node.stage_view",
    "node.clustering",
    "node.cluster_models",
    "node.cluster_tables",
    "node.cluster_view",
    "node.cluster_console",
    "node.training_console",
    "node.training_check",
)
"""May import from all three packages: the `cluster*` modules are the part of a node that is one of several. The command
line may import the wiring, inside a function only."""
COMMAND_LINE = "node.__main__"

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 700

SOLE_IMPORTERS = {"rocksdict": "node.state.rocksdb", "pysyncobj": "replication.raft_replica"}
NEVER_IN_NODE = {"pickle", "joblib", "sklearn", "cloudpickle", "dill", "shelve", "marshal"}
IMPURE = {
    *("asyncio", "time", "random", "socket", "os", "pathlib", "subprocess", "secrets", "threading", "tempfile"),
    *("selectors", "shutil", "urllib", "http", "aiohttp", "aiokafka", "rocksdict", "pysyncobj", "uvloop", "io"),
}
PURE_PARSER = "urllib.parse"
ALWAYS_PURE = {
    *("node.columns", "node.state.layout", "node.state.fold", "node.state.codec", "node.ingest.decode"),
    *("replication.frame", "replication.catalog", "replication.ownership"),
    *("tenants.manifest", "tenants.expression", "tenants.features", "tenants.scheduler", "tenants.registry"),
    "tenants.messages",
}
"""Whatever their docstrings say; of other modules, those are pure that say "(P)" there."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_paths() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def tracked_paths() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=30).stdout
    return [path for name in listed.decode().split("\0") if name and (path := ROOT / name).is_file()]


def pure_modules() -> set[str]:
    marked = {module_name(path) for path in module_paths() if path.read_text().startswith('"""(P)')}
    return ALWAYS_PURE | marked


PURE = pure_modules()


# --- imports --------------------------------------------------------------------------------------------------------


def imports_of(tree: ast.AST, module: str = "", inside: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Every (module imported, line, whether inside a function); `from a import b` gives a and a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            yield base, node.lineno, inside
            yield from ((f"{base}.{alias.name}", node.lineno, inside) for alias in node.names)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(node, module, inside or function)


def within(imported: str, package: str) -> bool:
    return imported == package or imported.startswith(f"{package}.")


def import_problem(module: str, imported: str, inside: bool) -> str:
    """Why `module` may not import `imported`; '' when it may."""
    top = imported.partition(".")[0]
    sole = SOLE_IMPORTERS.get(top)
    if sole is not None and module != sole:
        return f"only {sole} imports {top}"
    if within(module, "node") and top in NEVER_IN_NODE:
        return f"the node never imports {top}: what a tenant sends is unpickled in a sandboxed worker only"
    if module in PURE and top in IMPURE and not within(imported, PURE_PARSER):
        return f"{module} is pure and {top} is not"
    if top not in PACKAGES:
        return ""
    if within(module, KERNEL):
        return "" if within(imported, KERNEL) or imported == "node" else "the kernel imports nothing of ours"
    if module == COMMAND_LINE and any(within(imported, wiring) for wiring in WIRING):
        return "" if inside else "the command line imports the wiring inside a function, so that `check` starts fast"
    if module in WIRING:
        return ""
    if any(within(imported, wiring) for wiring in WIRING):
        return f"nothing imports {imported} but the command line"
    own = module.partition(".")[0]
    if own == "node":
        return "" if top == "node" else f"only {', '.join(WIRING)} joins node with {top}"
    if top == own or within(imported, KERNEL) or imported == "node":
        return ""
    return f"{own} imports only {KERNEL} and itself"


def import_problems(source: str, module: str) -> list[str]:
    problems = []
    for imported, line, inside in imports_of(ast.parse(source), module):
        problem = import_problem(module, imported, inside)
        if problem:
            problems.append(f"{module}:{line} imports {imported}: {problem}")
    return problems


def test_the_wiring_is_what_the_architecture_names() -> None:
    told = (ROOT / "ARCHITECTURE.md").read_text().partition("Only the wiring")[2].partition("\n\n")[0]
    stems = {module.partition(".")[2] for module in WIRING if not module.startswith("node.cluster_")}
    assert set(re.findall(r"(\w+)\.py`", told)) - {"test_tidy"} == stems
    assert "`cluster_*`" in told


# --- size, words and addresses --------------------------------------------------------------------------------------


def size_problems(source: str, name: str) -> list[str]:
    lines = source.count("\n")
    problems = [f"{name} has {lines} lines, more than {FILE_LINES_MAX}"] if lines > FILE_LINES_MAX else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                problems.append(f"{name}:{node.lineno} {node.name} has {length} lines, more than {FUNCTION_LINES_MAX}")
    return problems


def docstring_problems(source: str, name: str) -> list[str]:
    tree = ast.parse(source)
    return [f"{name} has no docstring"] if tree.body and ast.get_docstring(tree) is None else []


def annotation_problems(source: str, name: str) -> list[str]:
    """Public functions and methods whose arguments or result have no type."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        given = node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        bare = [argument.arg for argument in arguments if argument.annotation is None]
        bare = [argument for argument in bare if argument not in ("self", "cls")]
        if bare or node.returns is None:
            problems.append(f"{name}:{node.lineno} {node.name} lacks types: {', '.join([*bare, 'result'])}")
    return problems


# Put together from halves, so that this file passes its own check.
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b")
ADDRESS = re.compile(
    r"index-"
    + r"url|--regis"
    + r"try|https?://[\w.-]*(?:py"
    + r"pi|npm"
    + r"js|mav"
    + r"en|pythonho"
    + r"sted|crates)\b",
    re.IGNORECASE,
)


def word_problems(text: str, name: str) -> list[str]:
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if UNFINISHED.search(line):
            problems.append(f"{name}:{number} is unfinished: {line.strip()[:80]}")
        if ADDRESS.search(line):
            problems.append(f"{name}:{number} names a registry's address: {line.strip()[:80]}")
    return problems


def sleep_problems(source: str, name: str) -> list[str]:
    """Calls of time.sleep, however it was imported: a test waits for a condition instead."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        called = (
            isinstance(node, ast.Attribute)
            and node.attr == "sleep"
            and isinstance(node.value, ast.Name)
            and node.value.id == "time"
        )
        taken = isinstance(node, ast.ImportFrom) and node.module == "time" and "sleep" in [a.name for a in node.names]
        if called or taken:
            problems.append(f"{name}:{node.lineno} sleeps")
    return problems


def fork_problems(source: str, name: str) -> list[str]:
    """Calls of asyncio's subprocesses: uvloop forks for them, which stops a node's loop; see node.kernel.child."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return [f"{name}:{one.lineno} forks the node" for one in calls if one.attr.startswith("create_subprocess_")]


def session_problems(source: str, name: str) -> list[str]:
    """Processes that would be a session: niceness would hold for nothing; see node.kernel.child."""
    problems = []
    for one in ast.walk(ast.parse(source)):
        asked = isinstance(one, ast.keyword) and one.arg == "start_new_session"
        if asked or (isinstance(one, ast.Attribute) and one.attr == "setsid"):
            problems.append(f"{name}:{getattr(one, 'lineno', 0)} begins a session")
    return problems


# --- the tree passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", module_paths(), ids=module_name)
def test_module_keeps_the_rules(path: Path) -> None:
    source, name = path.read_text(), module_name(path)
    problems = [*import_problems(source, name), *size_problems(source, name)]
    problems += [*docstring_problems(source, name), *annotation_problems(source, name)]
    problems += [*fork_problems(source, name), *session_problems(source, name)]
    assert not problems, "\n".join(problems)


def python_sources() -> list[Path]:
    """Tracked Python outside the packages: tests, and scripts with or without a suffix."""
    found = []
    for path in tracked_paths():
        inside = path.relative_to(ROOT).parts[0] in ("scripts", "tests")
        if inside and (path.suffix == ".py" or "python" in first_line(path)):
            found.append(path)
    return found


def first_line(path: Path) -> str:
    with path.open("rb") as file:
        line = file.readline(200)
    return line.decode(errors="replace") if line.startswith(b"#!") else ""


def test_scripts_and_tests_are_not_too_long() -> None:
    problems = [p for path in python_sources() for p in size_problems(path.read_text(), str(path.relative_to(ROOT)))]
    assert not problems, "\n".join(problems)


def test_tracked_files_are_finished_and_name_no_registry() -> None:
    problems = []
    for path in tracked_paths():
        try:
            problems += word_problems(path.read_text(), str(path.relative_to(ROOT)))
        except UnicodeDecodeError:
            continue
    assert not problems, "\n".join(problems)


def test_tests_wait_for_conditions() -> None:
    tests = [path for path in python_sources() if path.is_relative_to(ROOT / "tests")]
    problems = [p for path in tests for p in sleep_problems(path.read_text(), path.name)]
    assert not problems, "\n".join(problems)


def test_programs_are_executable() -> None:
    missing = [
        str(path.relative_to(ROOT)) for path in tracked_paths() if first_line(path) and not os.access(path, os.X_OK)
    ]
    assert not missing


def test_test_files_have_unique_names() -> None:
    """Modules of tests share one name space; pytest keeps the conftest files of its folders apart itself."""
    names = [path.name for path in python_sources() if path.is_relative_to(ROOT / "tests") if path.stem != "conftest"]
    assert sorted(names) == sorted(set(names))


def pinned() -> dict[str, str]:
    """Canonical name -> version of each line of constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines), "exact pins only"
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def names_of(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_every_dependency_is_pinned() -> None:
    extras = project()["project"]["optional-dependencies"].values()
    wanted = [*project()["build-system"]["requires"], *project()["project"]["dependencies"], *chain(*extras)]
    assert names_of(wanted) - pinned().keys() == set()


PROVIDERS = metadata.packages_distributions()


def requirement_problems(source: str, name: str) -> list[str]:
    """Imports that no requirement names; what only the extra of models brings is imported inside functions."""
    needed = names_of(project()["project"]["dependencies"])
    optional = names_of(project()["project"]["optional-dependencies"]["models"])
    problems = []
    for imported, line, inside in imports_of(ast.parse(source), name):
        top = imported.partition(".")[0]
        if top in PACKAGES or top in sys.stdlib_module_names:
            continue
        providers = {canonicalize_name(provider) for provider in PROVIDERS.get(top, ())}
        if not providers & (needed | optional if inside else needed):
            problems.append(f"{name}:{line} imports {top}, which pyproject.toml does not require")
    return problems


def test_what_is_imported_is_required() -> None:
    problems = [p for path in module_paths() for p in requirement_problems(path.read_text(), module_name(path))]
    assert not problems, "\n".join(problems)


def test_what_is_installed_is_what_is_pinned() -> None:
    tools = {"pip", "setuptools", "wheel", "headrace"}
    pins = pinned()
    installed = {canonicalize_name(found.metadata["Name"]): found.version for found in metadata.distributions()}
    wrong = {name: version for name, version in installed.items() if name not in tools and pins.get(name) != version}
    assert not wrong, f"not as in constraints.txt: {wrong}"


# --- the checkers can fail ------------------------------------------------------------------------------------------

BAD_IMPORTS = [
    ("node.kernel.types", "from node.config import Config"),
    ("node.kernel.types", "import tenants.manifest"),
    ("node.kernel.types", "from ..state import fold"),
    ("node.cycle", "from tenants import scheduler"),
    ("node.cycle", "def late():\n    import replication.frame"),
    ("node.cycle", "from node import app"),
    ("node.cycle", "import rocksdict"),
    ("node.cycle", "from joblib import load"),
    ("node.app", "import pickle"),
    ("node.__main__", "from node.app import run"),
    ("node.__main__", "import tenants.manifest"),
    ("replication.changelog", "from tenants.cost import learned"),
    ("replication.changelog", "from node.columns import stack"),
    ("replication.changelog", "from pysyncobj import SyncObj"),
    ("tenants.pool", "import replication"),
    ("tenants.pool", "from node.state.fold import fold"),
    ("tenants.pool", "if True:\n    from node.app import run"),
    ("tenants.scheduler", "from time import monotonic"),
    ("tenants.scheduler", "import os.path"),
    ("replication.frame", "import asyncio"),
]
GOOD_IMPORTS = [
    ("node.kernel.ports", "from node.kernel.types import Frame"),
    ("node.app", "import replication.frame, tenants.pool, node.state"),
    ("node.__main__", "def run():\n    from node.app import run"),
    ("node.state.rocksdb", "import rocksdict"),
    ("node.cycle", "from node.columns import stack\nimport asyncio"),
    ("tenants.worker", "import joblib, pickle\nfrom node.kernel import limits\nfrom tenants import messages"),
    ("replication.raft_replica", "from pysyncobj import SyncObj\nfrom replication.frame import encode"),
]


@pytest.mark.parametrize(("module", "source"), BAD_IMPORTS)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert import_problems(source, module)


@pytest.mark.parametrize(("module", "source"), GOOD_IMPORTS)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    assert import_problems(source, module) == []


LONG_FUNCTION = "def long() -> None:\n" + "    x = 1\n" * FUNCTION_LINES_MAX
BAD_SOURCES: list[tuple[Callable[[str, str], list[str]], str]] = [
    (size_problems, LONG_FUNCTION),
    (size_problems, "class A:\n    async " + LONG_FUNCTION.replace("\n", "\n    ").rstrip(" ")),
    (size_problems, "x = 1\n" * (FILE_LINES_MAX + 1)),
    (docstring_problems, "x = 1\n"),
    (annotation_problems, "def half(a: int, b) -> int: ..."),
    (annotation_problems, "class A:\n    def none(self): ..."),
    (annotation_problems, "def some(*, a) -> None: ..."),
    (word_problems, "# TO" + "DO later"),
    (word_problems, "# FIX" + "ME"),
    (word_problems, "--extra-index-" + "url=x"),
    (word_problems, "https://py" + "pi.org/simple"),
    (word_problems, "https://files.pythonho" + "sted.org/x"),
    (word_problems, "http://repo.mav" + "en.example/x"),
    (sleep_problems, "import time\ntime.sleep(1)"),
    (sleep_problems, "from time import sleep"),
    (fork_problems, "import asyncio\nasyncio.create_subprocess_exec('ls')"),
    (session_problems, "subprocess.Popen('ls', start_new_session=True)"),
    (session_problems, "import os\nos.setsid()"),
    (requirement_problems, "import nobody_s"),
    (requirement_problems, "import pandas"),
    (requirement_problems, "def late():\n    import hypothesis"),
]


@pytest.mark.parametrize(("checker", "source"), BAD_SOURCES)
def test_a_wrong_source_is_found(checker: Callable[[str, str], list[str]], source: str) -> None:
    assert checker(source, "sample")


def test_a_right_source_is_let_through() -> None:
    source = '"""A module."""\n\n\ndef add(a: int, *, b: int) -> int:\n    return a + b\n'
    for checker in (
        size_problems,
        docstring_problems,
        annotation_problems,
        word_problems,
        sleep_problems,
        fork_problems,
        session_problems,
        requirement_problems,
    ):
        assert checker(source, "sample") == []
    assert requirement_problems("import os, node.app, orjson\ndef late():\n    import pandas", "sample") == []
    at_the_limit = "def long() -> None:\n" + "    x = 1\n" * (FUNCTION_LINES_MAX - 1)
    assert size_problems(at_the_limit, "sample") == []
