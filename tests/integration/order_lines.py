"""Processes that take orders and give answers, as JSON lines: both ends.

An order names a method of the process's object; what that raises becomes `Failed` on this side.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog

from node.kernel.errors import HeadraceError

ROOT = Path(__file__).resolve().parent.parent.parent
WAIT_S = 20.0
PORTS = range(10_000, 32_768)
_LINE_BYTES_MAX = 1 << 22
_ports_given: set[int] = set()


def free_address() -> str:
    """One that nobody listens on, and that was not given before. Below the ports that the kernel gives to clients: one
    of them could have it while the process whose address it is does not run."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", port))
            if port not in _ports_given:
                _ports_given.add(port)
                return f"127.0.0.1:{port}"


async def until(what: str, condition: Callable[[], Awaitable[Any]], wait_s: float = WAIT_S) -> Any:
    """The first truthy answer of the condition."""
    deadline_s = time.monotonic() + wait_s
    while time.monotonic() < deadline_s:
        answer = await condition()
        if answer:
            return answer
        await asyncio.sleep(0.05)
    raise AssertionError(f"waited {wait_s} s for {what}")


class Failed(Exception):
    """The answer was an error; `name` is that of its class."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class OrderedProcess:
    """`program` run with `settings` as JSON in argv; what it writes to stderr is in the file `log`."""

    def __init__(self, program: Path, settings: dict[str, Any], log: Path) -> None:
        self.program = program
        self.settings = settings
        self.log = log
        self.answers: dict[int, asyncio.Future[Any]] = {}
        self.number = 0
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.number = 0
        if self.process is not None:
            await self.process.wait()
            await self.reading
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(self.program), json.dumps(self.settings)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={"PYTHONPATH": str(ROOT), "PATH": ""},
                limit=_LINE_BYTES_MAX,
            )
        self.answers = {0: asyncio.get_running_loop().create_future()}
        self.reading = asyncio.create_task(self._read(self.process))
        await asyncio.wait_for(self.answers[0], WAIT_S)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            reply = json.loads(line)
            future = self.answers[reply["n"]]
            if future.done():
                continue
            if "error" in reply:
                future.set_exception(Failed(reply["error"], reply["message"]))
            else:
                future.set_result(reply["result"])
        for future in self.answers.values():
            if not future.done():
                future.set_exception(Failed("Ended", self.log.read_text()[-2000:]))
                future.exception()

    async def ask(self, do: str, **order: Any) -> Any:
        assert self.process is not None
        assert self.process.stdin is not None
        self.number += 1
        answer = self.answers[self.number] = asyncio.get_running_loop().create_future()
        self.process.stdin.write(json.dumps({"n": self.number, "do": do, **order}).encode() + b"\n")
        return await asyncio.wait_for(answer, WAIT_S)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            await self.process.wait()
            await self.reading

    async def stop(self) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.close()
        await asyncio.wait_for(self.process.wait(), WAIT_S)
        await self.reading


async def _answer(obeying: Any, line: bytes) -> None:
    order = json.loads(line)
    try:
        reply = {"n": order["n"], "result": await getattr(obeying, order["do"])(order)}
    except Exception as error:
        reply = {"n": order["n"], "error": type(error).__name__, "message": str(error)}
    print(json.dumps(reply), flush=True)


async def obey(obeying: Any) -> None:
    """The child's side: start it, carry orders out until the parent closes the pipe, stop it."""
    await obeying.start()
    print(json.dumps({"n": 0, "result": "started"}), flush=True)
    reader = asyncio.StreamReader(limit=_LINE_BYTES_MAX)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = set()
    while line := await reader.readline():
        task = asyncio.create_task(_answer(obeying, line))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await obeying.stop()


def run(make: Callable[[dict[str, Any]], Any], runner: Callable[[Any], Any] = asyncio.run) -> None:
    """The main program of a child: `make` is given the settings."""
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

    async def main() -> None:
        await obey(make(json.loads(sys.argv[1])))

    try:
        runner(main())
    except HeadraceError as failure:
        print(json.dumps({"n": 0, "error": type(failure).__name__, "message": str(failure)}), flush=True)
