"""Background tasks that cannot die in silence."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

log = structlog.get_logger(__name__)


class Supervisor:
    """Owns the node's background tasks. The first one to fail is remembered and sets `failed`.

    The application waits on `failed`, stops loudly and exits non-zero: systemd starts a clean process,
    which beats limping on with a part missing.
    """

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], str] = {}
        self.failed = asyncio.Event()
        self.failure: BaseException | None = None

    def start(self, name: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks[task] = name
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        name = self._tasks.pop(task, task.get_name())
        if task.cancelled():
            return
        failure = task.exception()
        if failure is None:
            return
        log.error("background task died", task=name, error=str(failure), exc_info=failure)
        if self.failure is None:
            self.failure = failure
        self.failed.set()

    async def stop(self) -> None:
        """Cancel what still runs and wait for it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def statistics(self) -> dict[str, object]:
        return {"tasks": sorted(self._tasks.values())}
