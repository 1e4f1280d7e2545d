"""Runs live versions, canaries and shadows, and keeps what is seen of those that are staged.

A shadow is called once the live version has answered, as background work of its tenant: with its own rows for the same
triggers, in nobody's way. Where the tenant has no room for that, the rows are dropped, and counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from node.kernel.errors import BoundExceeded
from node.kernel.limits import SHADOW_ROWS_MAX
from node.kernel.types import BACKGROUND, URGENT, FeatureRows, ModelName, ModelOutputs, ModelVersion, StagedVersion
from tenants.comparison import Comparison, Figures
from tenants.pool import ModelPool
from tenants.registry import Snapshot, Staged


@dataclass(slots=True, eq=False)
class _Watched:
    live: str
    staged: str
    comparison: Comparison
    canary: bool
    rows_open: int = 0
    """Given to the shadow, or to be once the live version has answered."""
    calls: set[asyncio.Future[ModelOutputs]] = field(default_factory=set)
    """Of the shadow."""

    def is_of(self, live: ModelVersion, staged: Staged) -> bool:
        known = (self.live, self.staged, self.comparison.stage)
        return known == (live.version, staged.version.version, staged.stage)


class StagedRunner:
    """The `ModelRunner` of a node and its `Shadows`, over the pool. Figures of a stage begin anew at a restart."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool
        self._watched: dict[ModelName, _Watched] = {}

    def observe(self, snapshot: Snapshot) -> None:
        """Watch what is staged now, and nothing else: what waits for a shadow that is over would hold up others."""
        before, self._watched = self._watched, {}
        for name, entry in snapshot.models.items():
            staged, live = entry.staged, entry.live
            if staged is None or live is None:
                continue
            known = before.get(name)
            if known is None or not known.is_of(live.version, staged):
                asked = staged.asked
                comparison = Comparison(staged.stage, 0.0 if staged.version.labels else asked.tolerance)
                canary = asked.kind == "canary"
                known = _Watched(live.version.version, staged.version.version, comparison, canary)
            self._watched[name] = known
        for ended in before.values():
            if ended not in self._watched.values():
                for call in list(ended.calls):
                    call.cancel()

    def figures(self) -> Mapping[str, Figures]:
        """Of each staged version, as this node has seen it in its present stage."""
        return {known.staged: known.comparison.figures() for known in self._watched.values()}

    def submit(self, version: ModelVersion, rows: FeatureRows, priority: int = URGENT) -> asyncio.Future[ModelOutputs]:
        """As `ModelPool.submit`; while a canary runs, what it and the live version give is kept apart."""
        answering = self._pool.submit(version, rows, priority)
        known = self._watched.get(version.name)
        if known is not None and known.canary and version.version in (known.live, known.staged):
            answering.add_done_callback(partial(_one_gave, known, version.version))
        return answering

    def rows_queued_max(self, name: ModelName) -> int:
        return self._pool.rows_queued_max(name)

    def follow(self, staged: StagedVersion, rows: FeatureRows, live: asyncio.Future[ModelOutputs] | None) -> None:
        known = self._watched.get(staged.version.name)
        if known is None or known.staged != staged.version.version:
            return
        if live is None or known.rows_open + len(rows) > SHADOW_ROWS_MAX:
            known.comparison.dropped(len(rows))
            return
        known.rows_open += len(rows)
        live.add_done_callback(partial(self._live_gave, known, staged.version, rows))

    def _live_gave(
        self, known: _Watched, version: ModelVersion, rows: FeatureRows, live: asyncio.Future[ModelOutputs]
    ) -> None:
        current = self._watched.get(version.name) is known
        if current and _has_outputs(live):
            try:
                shadow = self._pool.submit(version, rows, BACKGROUND)
            except BoundExceeded:
                pass
            else:
                known.calls.add(shadow)
                shadow.add_done_callback(partial(_both_gave, known, live.result(), len(rows)))
                return
        known.rows_open -= len(rows)
        known.comparison.dropped(len(rows))


def _one_gave(known: _Watched, version: str, answering: asyncio.Future[ModelOutputs]) -> None:
    if not _has_outputs(answering):
        return
    if version == known.staged:
        known.comparison.staged_gave(answering.result())
    else:
        known.comparison.live_gave(answering.result())


def _both_gave(known: _Watched, live: ModelOutputs, rows: int, shadow: asyncio.Future[ModelOutputs]) -> None:
    known.rows_open -= rows
    known.calls.discard(shadow)
    if _has_outputs(shadow):
        known.comparison.both_gave(live, shadow.result())
    else:
        known.comparison.dropped(rows)


def _has_outputs(answering: asyncio.Future[ModelOutputs]) -> bool:
    return not answering.cancelled() and answering.exception() is None
