"""The memory of workers, as the kernel counts it: what is a worker's own, and what it shares with the warm server."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from node.kernel.limits import KIB

_ROLLUP_BYTES = 4096
_PRIVATE = ("Private_Clean", "Private_Dirty", "Private_Hugetlb")


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """`own_bytes` would be free if the worker ended; `shared_bytes` other processes have mapped too, each counts them
    whole; `proportional_bytes` (PSS) is own and this process's part of what is shared."""

    own_bytes: int
    shared_bytes: int
    proportional_bytes: int


def parse_rollup(text: str) -> MemoryUse | None:
    """From the text of /proc/<pid>/smaps_rollup; None when it holds no figures: the process has ended."""
    fields: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            fields[name] = int(words[0]) * KIB
    if "Rss" not in fields or "Pss" not in fields:
        return None
    own = sum(fields.get(name, 0) for name in _PRIVATE)
    return MemoryUse(own, max(0, fields["Rss"] - own), fields["Pss"])


class MemoryFile:
    """/proc/<pid>/smaps_rollup, opened while that was allowed: a worker that is locked down can't be looked into."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def read(self) -> MemoryUse | None:
        """Blocking, some milliseconds: the kernel walks the page tables. None when it can't be had."""
        with self._lock:  # or the number could be another file's by the time it is read
            if self._descriptor < 0:
                return None
            try:
                return parse_rollup(os.pread(self._descriptor, _ROLLUP_BYTES, 0).decode())
            except (OSError, ValueError):
                return None

    def close(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


class Measured(Protocol):
    """A process that knows whether its memory may have changed since it was measured."""

    @property
    def stale(self) -> bool: ...

    def measure(self) -> None:
        """Blocking; called in a thread."""
        ...


async def measured(workers: Iterable[Measured]) -> None:
    """Measure, one after the other, the workers that have done something."""
    for worker in workers:
        if worker.stale:
            await asyncio.to_thread(worker.measure)
