"""The node runs on uvloop: the same workers there, with its own transports and watchers."""

from __future__ import annotations

import numpy as np
import uvloop
from sklearn.linear_model import LogisticRegression
from worker_support import MEMORY_BYTES, called_while_the_loop_stands_still, rows_of, stored, version_of, warm_server

NAMES = ("a", "b")
ROWS = np.random.default_rng(3).random((2000, 2))


async def call_and_kill() -> tuple[int, ...]:
    async with warm_server() as server:
        worker = await server.spawn("grocery", MEMORY_BYTES)
        version = version_of(NAMES)
        await worker.load(version, stored(LogisticRegression().fit(ROWS, ROWS[:, 0] > 0.5)))
        shape = (await worker.call(version.version, rows_of(NAMES, ROWS), 10)).values.shape
        assert (
            await called_while_the_loop_stands_still(worker, version.version, rows_of(NAMES, ROWS))
        ).values.shape == shape
        worker.kill()
        await worker.lost.wait()
        return shape


def test_call_and_kill() -> None:
    assert uvloop.run(call_and_kill()) == (2000, 1)
