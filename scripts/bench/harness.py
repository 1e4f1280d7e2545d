"""What benchmarks share: the result's envelope, CPU time from /proc, and brokers and nodes as subprocesses."""

from __future__ import annotations

import contextlib
import operator
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
KAFKA = ROOT / "scripts" / "kafka"
BROKER_START_S_MAX = 400.0
READY_S_MAX = 120.0
STOP_S_MAX = 45.0
POLL_S = 0.05
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
COMPARISONS = {"<=": operator.le, ">=": operator.ge, "=": operator.eq, "<": operator.lt, ">": operator.gt}


# --- the result -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """What a benchmark's `main` gives: a value for each of its AIMS, and anything worth keeping beside them."""

    values: Mapping[str, float]
    detail: Mapping[str, object] = field(default_factory=dict)


def evaluated(values: Mapping[str, float], aims: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """Each aim with its value and whether it was met. An aim reads like "<= 50"; one without a value is not met."""
    unknown = values.keys() - aims.keys()
    if unknown:
        raise ValueError(f"values without an aim: {', '.join(sorted(unknown))}")
    found: dict[str, dict[str, object]] = {}
    for name, aim in aims.items():
        sign, _, bound = aim.partition(" ")
        value = values.get(name)
        # NaN compares false with everything, so it does not meet an aim either.
        met = value is not None and bool(COMPARISONS[sign](value, float(bound)))
        found[name] = {"value": value if value == value else None, "aim": aim, "met": met}
    return found


def envelope(name: str, aims: Mapping[str, str], result: Result, quick: bool) -> dict[str, object]:
    return {
        "bench": name,
        "commit": commit(),
        "quick": quick,
        "machine": machine(),
        "aims": evaluated(result.values, aims),
        "detail": result.detail,
    }


def commit() -> str:
    """The commit measured, with "-dirty" when tracked files differ from it."""
    try:
        head = _git("rev-parse", "HEAD").strip()
        return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no").strip() else head
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout


def machine() -> dict[str, object]:
    return {
        "cpu": _first_value("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1024 * 1024),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _first_value(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return platform.machine()


# --- CPU time -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TreeCpu:
    """User and system seconds of a process alone, and of all below it: living, or dead and waited for.

    A dead child's time moves to its parent when it is waited for, so both only grow. A process that leaves
    the tree (its parent died, nobody adopted it here) takes its time along.
    """

    own_s: float
    below_s: float

    def __sub__(self, earlier: TreeCpu) -> TreeCpu:
        return TreeCpu(self.own_s - earlier.own_s, self.below_s - earlier.below_s)


@dataclass(frozen=True, slots=True)
class _Process:
    parent: int
    own_ticks: int
    waited_ticks: int


def tree_cpu(pid: int) -> TreeCpu:
    """CPU seconds so far of the process and its tree. Raises ProcessLookupError when it is gone."""
    processes = dict(_processes())
    if pid not in processes:
        raise ProcessLookupError(f"no process {pid}")
    children: dict[int, list[int]] = {}
    for child, process in processes.items():
        children.setdefault(process.parent, []).append(child)
    below = processes[pid].waited_ticks
    waiting = list(children.get(pid, ()))
    while waiting:
        child = waiting.pop()
        below += processes[child].own_ticks + processes[child].waited_ticks
        waiting.extend(children.get(child, ()))
    return TreeCpu(processes[pid].own_ticks / TICKS_PER_S, below / TICKS_PER_S)


def _processes() -> Iterator[tuple[int, _Process]]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # After the name, which may hold anything: state, parent, … utime, stime, cutime, cstime.
            fields = (entry / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        user, system, waited_user, waited_system = (int(value) for value in fields[11:15])
        yield int(entry.name), _Process(int(fields[1]), user + system, waited_user + waited_system)


# --- processes ------------------------------------------------------------------------------------------------------


_ports_given: set[int] = set()


def free_port() -> int:
    """One that nobody listens on, and that was not given before: the kernel may name one twice until it is used."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _ports_given:
            _ports_given.add(port)
            return port


@dataclass(frozen=True, slots=True)
class Broker:
    address: str
    pid: int

    def cpu(self) -> TreeCpu:
        return tree_cpu(self.pid)


@contextlib.contextmanager
def broker(
    folder: Path, heap: str = "1g", options: Mapping[str, object] | None = None, host: str = "127.0.0.1"
) -> Iterator[Broker]:
    """A Kafka of this benchmark's own on `folder`, stopped at the end; the data stays with the folder.

    `options` are settings of the broker, beside those of scripts/kafka; `host` is the address it listens on.
    """
    given = ",".join(f"{name}={value}" for name, value in (options or {}).items())
    environment = {
        **os.environ,
        "HEADRACE_KAFKA_HEAP": heap,
        "HEADRACE_KAFKA_HOST": host,
        **({"HEADRACE_KAFKA_OPTIONS": given} if given else {}),
    }
    command = [sys.executable, str(KAFKA), "start", "--dir", str(folder)]
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=BROKER_START_S_MAX,
    )
    if done.returncode:
        raise RuntimeError("the broker did not start; scripts/kafka says why above")
    try:
        yield Broker(done.stdout.strip().rpartition("\n")[2], int((folder / "pid").read_text()))
    finally:
        stop = [sys.executable, str(KAFKA), "stop", "--dir", str(folder)]
        subprocess.run(stop, env=environment, stdin=subprocess.DEVNULL, timeout=STOP_S_MAX * 2)


def as_installed() -> dict[str, str]:
    """Of nodes and their commands: those of an installed one have their bytecode, so a first start may leave it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


class Node:
    """`python -m node run --config F` as a subprocess; its output goes to `node.log` beside the config."""

    def __init__(
        self,
        config: Path,
        port: int,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        program: Sequence[str] = ("-m", "node"),
    ) -> None:
        """`prefix` is put before the command: one that becomes the node, such as `ip netns exec NAME`; `program` is
        what Python runs, where that is a stand-in for the node."""
        self.config = config
        self.url = f"http://{host}:{port}"
        self.log = config.with_name("node.log")
        self._prefix = tuple(prefix)
        self._program = tuple(program)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the node was not started")
        return self._process.pid

    def start(self, wait_s_max: float = READY_S_MAX) -> None:
        """Start it and wait until /readyz answers 200; `wait_s_max` 0 does not wait."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, sys.executable, *self._program, "run", "--config", str(self.config)],
                cwd=ROOT,
                env=as_installed(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + wait_s_max
        while wait_s_max and not self.ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the node did not get ready; the end of its log:\n{self.log_tail()}")
            time.sleep(POLL_S)

    @property
    def started(self) -> bool:
        return self._process is not None

    @property
    def ended(self) -> bool:
        """Whether it was started and is gone."""
        return self._process is not None and self._process.poll() is not None

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def cpu(self) -> TreeCpu:
        """The node itself as `own_s`, its workers as `below_s`."""
        return tree_cpu(self.pid)

    def stop(self) -> int:
        """SIGTERM, and the exit status; a node that does not end within its bound is killed and raises."""
        process = self._process
        if process is None:
            return 0
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"the node outlived SIGTERM by {STOP_S_MAX} s; its log:\n{self.log_tail()}") from None

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(STOP_S_MAX)

    def pause(self) -> None:
        """SIGSTOP; its workers go on."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)

    def log_tail(self, lines: int = 30) -> str:
        if not self.log.exists():
            return "it was never started"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def running_node(config: Path, port: int) -> Iterator[Node]:
    """A ready node; stopped by SIGTERM at the end, killed if the benchmark failed."""
    node = Node(config, port)
    try:
        node.start()
        yield node
        node.stop()
    finally:
        node.kill()
