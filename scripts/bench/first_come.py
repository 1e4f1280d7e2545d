"""What the scheduler is compared with: one queue, first come first served, every ticket whole. For benchmarks only.

Run as a program it is a node whose scheduler is this one: `first_come.py run --config FILE`.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from node.kernel.types import URGENT  # noqa: E402
from tenants import pool  # noqa: E402
from tenants.scheduler import Dispatch, Part, Scheduler, _Flow, _Tenant  # noqa: E402

QUANTUM_SECONDS = 3600.0
"""A batch is as long as its ticket."""


class FirstCome(Scheduler):
    """The tenant whose oldest ticket came first goes next, however much it has had; a ticket is one batch.

    The base class chooses by virtual time, so before each choice that is set to the oldest ticket's arrival number.
    """

    def __init__(self, parallel: int, quantum_seconds: float = QUANTUM_SECONDS) -> None:
        super().__init__(parallel, QUANTUM_SECONDS)
        self._arrivals: dict[Hashable, int] = {}
        self._arrived = 0

    def enqueue(
        self,
        ticket: Hashable,
        tenant: str,
        model: str,
        rows: int,
        priority: int = URGENT,
        *,
        whole: bool = False,
        first: bool = False,
    ) -> None:
        super().enqueue(ticket, tenant, model, rows, priority, whole=whole, first=first)
        self._arrived += 1
        self._arrivals[ticket] = 0 if first else self._arrived

    def next(self) -> Dispatch | None:
        for tenant in self._ready.values():
            for flow in tenant.ready.values():
                flow.virtual = float(self._arrivals.get(flow.entries[0].ticket, 0))
            tenant.virtual = min(flow.virtual for flow in tenant.ready.values())
        return super().next()

    def complete(
        self, dispatch: Dispatch, cpu_seconds: float, rows_done: int | None = None, *, learn: bool = True
    ) -> None:
        super().complete(dispatch, cpu_seconds, rows_done, learn=learn)
        for part in dispatch.parts:
            self._arrivals.pop(part.ticket, None)  # what is left of it is the oldest there is

    def lend(self, dispatch: Dispatch, lent: bool) -> None:
        """Nothing goes before the queue's head has ended."""

    def _may_run_beside(self, tenant: _Tenant) -> bool:
        return False

    def _take(self, flow: _Flow, rows_max: int) -> tuple[tuple[Part, ...], int]:
        """The oldest ticket, as much of it as a call's deadline allows."""
        entry, model = flow.entries[0], flow.model
        if entry.whole:
            return super()._take(flow, rows_max)
        wanted = model.cost.rows_within(self.quantum_seconds, model.call_seconds_max, self.batch_rows_max)
        part = Part(entry.ticket, entry.start, min(entry.stop, entry.start + wanted))
        if part.stop == entry.stop:
            flow.entries.popleft()
        else:
            entry.start = part.stop
        return (part,), part.stop - part.start


def main() -> None:
    from node.__main__ import app

    vars(pool)["Scheduler"] = FirstCome
    app()


if __name__ == "__main__":
    main()
