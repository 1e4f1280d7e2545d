"""A process of its own for work that would hold the interpreter.

Not by asyncio's subprocesses: uvloop forks for them, and copying the page tables of a node stops its loop, 30 ms at
0.7 GB and in proportion to that. `subprocess` starts children by vfork, in 4 to 8.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from node.kernel.errors import StoreUnavailable

Result = TypeVar("Result")


async def in_child(
    arguments: Sequence[str], talk: Callable[[subprocess.Popen[bytes]], Result], stderr: int | None = None
) -> Result:
    """What `talk` gives, in a thread of its own, of this very Python with `arguments`: it reads and writes the pipes,
    which block. The child has nothing of the node's environment, which may hold secrets; `stderr` None: the node's own.

    The child is killed when `talk` has ended, or this is given up, which ends `talk` too, and when the node ends: a new
    one finds nobody else in its folders. Raises what `talk` raises, and StoreUnavailable if there can be no further
    process.
    """
    process = _started(arguments, stderr)
    # Not one of the loop's threads, which are few: a child may take minutes.
    with_child, loop = ThreadPoolExecutor(1, "child"), asyncio.get_running_loop()
    talking = loop.run_in_executor(with_child, talk, process)
    try:
        return await asyncio.shield(talking)
    finally:
        process.kill()
        # In the one thread, so after `talk`: nothing is closed under who reads it, or it would read the next socket's.
        await asyncio.wait({loop.run_in_executor(with_child, process.wait)})
        if not talking.cancelled():
            talking.exception()  # of one that is given up, nobody else asks
        for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
            with contextlib.suppress(OSError):  # what was not read by the child
                pipe.close()
        with_child.shutdown(wait=False)


def _started(arguments: Sequence[str], stderr: int | None) -> subprocess.Popen[bytes]:
    try:
        return _popen(arguments, stderr)
    except OSError as error:
        raise StoreUnavailable(
            f"no further process can be started ({error}); look at the limits of this machine"
        ) from error


def _popen(arguments: Sequence[str], stderr: int | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-sP", "-m", "node.kernel.parent", str(os.getpid()), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={
            "LANG": "C.UTF-8",
            "PATH": os.defpath,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OPENBLAS_NUM_THREADS": "1",
        },
        # A Ctrl-C at the terminal is the node's to handle. Not by a session of its own: where the kernel groups
        # processes by session to share the processor (autogroup, sched(7)), niceness would hold for nothing.
        process_group=0,
    )
