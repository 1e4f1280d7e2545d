"""Processes of their own end with the work that they were started for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys

import pytest

from node.kernel.child import in_child

_ECHO = "import os, sys; print(os.environ.get('SECRET', 'none'), sys.stdin.readline().strip(), flush=True); {then}"


async def test_a_child_answers_and_has_nothing_of_the_nodes_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "secret")

    def talk(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes, int]:
        return (*process.communicate(b"asked\n"), process.returncode)

    said = await in_child(("-c", _ECHO.format(then="sys.exit(3)")), talk, subprocess.PIPE)
    assert said == (b"none asked\n", b"", 3)


async def test_a_child_is_of_the_nodes_session_where_niceness_holds_and_of_a_process_group_of_its_own() -> None:
    def talk(process: subprocess.Popen[bytes]) -> bytes:
        return process.communicate()[0]

    said = await in_child(("-c", "import os; print(os.getsid(0), os.getpgid(0) == os.getpid())"), talk)
    assert said.split() == [str(os.getsid(0)).encode(), b"True"]


@pytest.mark.parametrize("outer", ["cancelled", "late"])
async def test_a_child_that_is_given_up_is_killed_and_nothing_reads_from_it_any_more(outer: str) -> None:
    reading, loop = asyncio.Event(), asyncio.get_running_loop()
    talks: list[tuple[subprocess.Popen[bytes], bool]] = []

    def talk(process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"asked\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"none asked\n"
        loop.call_soon_threadsafe(reading.set)
        assert process.stdout.readline() == b"", "it is killed"
        talks.append((process, process.stdout.closed))

    async def work() -> None:
        async with asyncio.timeout(None) as bound:
            working = asyncio.ensure_future(in_child(("-c", _ECHO.format(then="sys.stdin.readline()")), talk))
            await reading.wait()
            if outer == "late":
                bound.reschedule(loop.time())
            else:
                working.cancel()
            await working

    with pytest.raises(TimeoutError if outer == "late" else asyncio.CancelledError):
        await work()
    ((process, closed),) = talks
    assert not closed, "under the thread that reads"
    assert process.returncode == -signal.SIGKILL
    assert process.stdout is not None
    assert process.stdout.closed


async def test_what_goes_wrong_in_talking_is_told() -> None:
    def talk(process: subprocess.Popen[bytes]) -> None:
        raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        await in_child(("-c", "import sys; sys.stdin.read()"), talk)


_NODE = """
import asyncio, sys
from node.kernel.child import in_child

def talk(process):
    print(process.stdout.readline().decode().strip(), flush=True)
    process.wait()

asyncio.run(in_child(("-c", "import os, signal; print(os.getpid(), flush=True); signal.pause()"), talk))
"""


def test_a_child_does_not_outlive_a_node_that_is_killed() -> None:
    """It would go on in folders that the next node finds its own to clear."""
    with subprocess.Popen([sys.executable, "-c", _NODE], stdout=subprocess.PIPE) as node:
        assert node.stdout is not None
        child = int(node.stdout.readline())
        ended = os.pidfd_open(child)
        try:
            node.kill()
            assert node.wait(10) == -signal.SIGKILL
            assert select.select([ended], [], [], 10)[0], "it lives on"
        finally:
            os.close(ended)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_a_child_whose_node_is_gone_before_it_begins_does_nothing() -> None:
    gone = str(os.getppid())
    started = subprocess.run(
        [sys.executable, "-m", "node.kernel.parent", gone, "-c", "print('begun')"], capture_output=True, timeout=10
    )
    assert started.stdout == b""
    assert started.returncode != 0
