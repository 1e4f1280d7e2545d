"""What tenants' models print: read from their workers' pipes at a bounded rate, kept in a bounded ring each.

A worker's end of the pipe never blocks it: when the pipe is full, what it prints is lost, to it and nobody else. The
node takes so many bytes a second of each tenant and leaves the rest in the pipe. All of it is a tenant's text: it is
decoded with replacements here, and escaped where a terminal shows it.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from dataclasses import dataclass

from node.kernel.clock import Clock
from node.kernel.limits import (
    TENANT_LOG_BURST_BYTES,
    TENANT_LOG_BYTES_MAX,
    TENANT_LOG_BYTES_PER_SECOND,
    TENANT_LOG_LINE_BYTES_MAX,
    TENANTS_MAX,
)

LINE_OVERHEAD_BYTES = 128
"""What a line costs beside its text, in memory and in time: so that empty lines are not free."""
READ_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class LogLine:
    """`number` counts a tenant's lines from 1; `pid` is the worker that printed it, at `time_ms` or before."""

    number: int
    time_ms: int
    pid: int
    text: str


class TenantLog:
    """The last lines of one tenant, and how much more may be taken now. Pure: time arrives as an argument."""

    def __init__(self) -> None:
        self._lines: deque[LogLine] = deque()
        self._bytes = 0
        self._credit = float(TENANT_LOG_BURST_BYTES)
        self._credited_at = 0.0
        self.count = 0
        self.readers = 0
        """Pipes that lead here and have not ended."""
        self.dropped = 0
        """Lines that were taken and had to go for newer ones."""

    def add(self, texts: list[bytes], time_ms: int, pid: int) -> None:
        for printed in texts:
            self.count += 1
            self._credit -= len(printed) + LINE_OVERHEAD_BYTES
            text = printed.decode("utf-8", "replace")
            self._lines.append(LogLine(self.count, time_ms, pid, text))
            self._bytes += _kept_bytes(text)
        while self._bytes > TENANT_LOG_BYTES_MAX:
            self._bytes -= _kept_bytes(self._lines.popleft().text)
            self.dropped += 1

    def wait_seconds(self, now: float) -> float:
        """How long nothing more is to be taken; 0 when something may."""
        earned = max(0.0, now - self._credited_at) * TENANT_LOG_BYTES_PER_SECOND
        self._credit = min(self._credit + earned, TENANT_LOG_BURST_BYTES)
        self._credited_at = now
        return max(0.0, -self._credit / TENANT_LOG_BYTES_PER_SECOND)

    def lines(self, after: int = 0) -> list[LogLine]:
        """Those with a larger number, in order."""
        return [line for line in self._lines if line.number > after]


def _kept_bytes(text: str) -> int:
    """Of a line as it is kept: a byte that is no UTF-8 has become a character of three."""
    return len(text.encode()) + LINE_OVERHEAD_BYTES


class Lines:
    """Cuts a stream of bytes into lines of a bounded length. Pure."""

    def __init__(self) -> None:
        self._rest = b""

    def cut(self, data: bytes) -> list[bytes]:
        """The lines that `data` ends, without their ends."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        pieces = [piece for line in whole for piece in _bounded(line)]
        while len(self._rest) > TENANT_LOG_LINE_BYTES_MAX:
            pieces.append(self._rest[:TENANT_LOG_LINE_BYTES_MAX])
            self._rest = self._rest[TENANT_LOG_LINE_BYTES_MAX:]
        return pieces

    def end(self) -> list[bytes]:
        """The last line, if it has no end."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


def _bounded(line: bytes) -> list[bytes]:
    size = TENANT_LOG_LINE_BYTES_MAX
    return [line[start : start + size] for start in range(0, len(line), size)] or [b""]


class OutputReader:
    """Moves what one worker prints to its tenant's log, until the pipe ends; it owns the descriptor."""

    def __init__(self, descriptor: int, log: TenantLog, pid: int, clock: Clock) -> None:
        self._descriptor = descriptor
        self._log = log
        self._pid = pid
        self._clock = clock
        self._lines = Lines()
        self._resume: asyncio.TimerHandle | None = None
        os.set_blocking(descriptor, False)
        log.readers += 1
        self._listen()

    def _listen(self) -> None:
        self._resume = None
        asyncio.get_running_loop().add_reader(self._descriptor, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._descriptor, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._log.add(self._lines.cut(data), self._clock.now_ms(), self._pid)
        wait_seconds = self._log.wait_seconds(self._clock.monotonic())
        if wait_seconds > 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._descriptor)
            self._resume = loop.call_later(wait_seconds, self._listen)

    def close(self) -> None:
        """Idempotent; an unfinished last line is taken, what still lies in the pipe is not."""
        if self._descriptor < 0:
            return
        if self._resume is not None:
            self._resume.cancel()
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        self._log.add(self._lines.end(), self._clock.now_ms(), self._pid)
        self._log.readers -= 1


class TenantLogs:
    """The logs by tenant: at most TENANTS_MAX, the one that was asked for longest ago goes first."""

    def __init__(self) -> None:
        self._logs: dict[str, TenantLog] = {}

    def of(self, tenant: str) -> TenantLog:
        known = self._logs.pop(tenant, None) or TenantLog()
        self._logs[tenant] = known
        while len(self._logs) > TENANTS_MAX:
            self._logs.pop(next(iter(self._logs)))
        return known

    def find(self, tenant: str) -> TenantLog | None:
        return self._logs.get(tenant)
