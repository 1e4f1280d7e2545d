"""Step 7 of the cycle: run the models that a micro-batch's events concern, and say what became of each trigger."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from node.backlog import Answer, Backlog, Settled, finish_within, split
from node.kernel.errors import BoundExceeded
from node.kernel.limits import SEQUENCE_CHUNK_ROWS_MAX
from node.kernel.ports import FeaturePlan, Shadows
from node.kernel.types import (
    Bools,
    EventColumns,
    EventSchema,
    ModelName,
    ModelOutputs,
    ModelVersion,
    SequenceChunk,
    Triggers,
)
from node.ordering import Ordering
from node.staging import follow
from node.waiting import Answering


@dataclass(slots=True)
class Outcome:
    """What one micro-batch's triggers, and older ones that were answered meanwhile, add to the commit."""

    answers: list[Answer] = field(default_factory=list)
    appended: list[SequenceChunk] = field(default_factory=list)
    cursors: dict[str, int] = field(default_factory=dict)
    shed: Counter[str] = field(default_factory=Counter)


def select(plan: FeaturePlan, events: EventColumns, schema: EventSchema) -> dict[ModelName, Bools]:
    """For each model that some event concerns, the mask of its events."""
    masks: dict[ModelName, Bools] = {}
    for version in plan.models:
        codes = [code for code, name in enumerate(schema.types) if name in version.events]
        mask = np.isin(events.types, codes) if len(codes) > 1 else events.types == (codes[0] if codes else -1)
        if mask.any():
            masks[version.name] = mask
    return masks


async def run_triggers(
    backlog: Backlog,
    work: Sequence[tuple[ModelVersion, Triggers]],
    settled: Settled,
    deadline_seconds: float,
    ordering: Ordering | None = None,
    shadows: Shadows | None = None,
) -> Outcome:
    """Submit each model's triggers, and what `ordering` has as soon as it may run, and wait until the deadline. Shadows
    follow; they are never waited for.

    Those answered are in `answers`. The rest, and all of a model that is behind already, are appended to
    the sequence log, most of them still being worked on: a model that was late once is back in step when it has
    answered before the next cycle begins. Order within a model is kept.
    """
    outcome = Outcome(settled.answers, settled.appended, settled.cursors, settled.shed)
    started, loop = _Started(backlog), asyncio.get_running_loop()
    since = loop.time()
    try:
        started.submit(work)
        if ordering is not None:
            await _in_order(started, ordering, deadline_seconds)
        left_seconds = deadline_seconds if ordering is None else max(0.0, since + deadline_seconds - loop.time())
        await finish_within(started.joinable(deadline_seconds), left_seconds)
    except BaseException:  # the session ends: its rows must not fill the runner's queue for the next one
        for abandoned in started.running:
            abandoned.cancel()
        raise
    if ordering is not None and shadows is not None:
        follow(shadows, ordering.shown, started.pieces)
    for version, triggers, call in started.pieces:
        if call is not None and call.done() and not backlog.behind(triggers.line_name):
            outcome.answers.append(Answer(version, triggers, call.result()))
        else:
            chunk = backlog.append(version, triggers, call, settled)
            if chunk is not None:
                outcome.appended.append(chunk)
    return outcome


class _Started:
    """The pieces of work of one cycle, in the order in which they began, each with its call if it has one."""

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self.pieces: list[tuple[ModelVersion, Triggers, Answering | None]] = []

    @property
    def running(self) -> list[Answering]:
        return [call for _, _, call in self.pieces if call is not None]

    def joinable(self, wait_seconds: float) -> list[Answering]:
        """Those whose answers may join this commit: not of a model that is behind, and, as the commit is for all, not
        of one that is slow while another tenant's quick ones wait for it."""
        in_step = [
            (one, call) for _, one, call in self.pieces if call is not None and not self._backlog.behind(one.line_name)
        ]
        waiting = self._backlog.times.worth_waiting(
            in_step, lambda piece: piece[0].line_name, lambda piece: piece[0].name.tenant, wait_seconds
        )
        return [call for _, call in waiting]

    def submit(self, work: Sequence[tuple[ModelVersion, Triggers]]) -> None:
        for version, triggers in work:
            rows_max = min(SEQUENCE_CHUNK_ROWS_MAX, self._backlog.rows_max(triggers))
            for piece in split(triggers, rows_max):
                self.pieces.append((version, piece, _submit(self._backlog, version, piece)))

    def tell(self, ordering: Ordering) -> list[Answering]:
        """Say which of the awaited models have answered, and which will not in this cycle; calls of the others."""
        coming: list[Answering] = []
        for name in sorted(ordering.awaited):
            calls = [call for version, one, call in self.pieces if version.name == name and not one.line]
            if not calls:
                continue  # waits itself
            if None in calls or self._backlog.behind(str(name)):
                ordering.given_up(name)
            elif all(call.done() for call in calls if call is not None):
                ordering.answered(name, _joined([call.result() for call in calls if call is not None]))
            else:
                coming += [call for call in calls if call is not None and not call.done()]
        return coming


async def _in_order(started: _Started, ordering: Ordering, deadline_seconds: float) -> None:
    """Start each model once those whose outputs it uses have answered, or it may wait no longer."""
    loop = asyncio.get_running_loop()
    since = loop.time()
    while ordering.waiting:
        coming, passed = started.tell(ordering), loop.time() - since
        ordering.late(passed if passed < deadline_seconds else math.inf)
        work = ordering.ready()
        if work:
            started.submit(work)
            await asyncio.sleep(0)  # so that the pool has begun before anything is waited for
        elif coming:
            wait_seconds = max(0.0, min(deadline_seconds, ordering.next_late()) - passed)
            await asyncio.wait(coming, timeout=wait_seconds, return_when=asyncio.FIRST_COMPLETED)
        else:
            ordering.late(math.inf)  # no answer can come any more


def _joined(outputs: Sequence[ModelOutputs]) -> ModelOutputs:
    """Of the pieces of one model, in order."""
    if len(outputs) == 1:
        return outputs[0]
    errors: dict[int, str] = {}
    before = 0
    for piece in outputs:
        errors |= {before + row: reason for row, reason in piece.errors.items()}
        before += len(piece.values)
    return ModelOutputs(np.concatenate([piece.values for piece in outputs]), errors)


def _submit(backlog: Backlog, version: ModelVersion, triggers: Triggers) -> Answering | None:
    """None when older triggers of the model wait, or the runner's queue is full: the sequence log takes these."""
    if not backlog.may_submit(triggers.line_name):
        return None
    try:
        return backlog.submit(version, triggers)
    except BoundExceeded:
        return None
