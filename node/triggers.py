"""Step 7 of the cycle: run the models that a micro-batch's events concern, and say what became of each trigger."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from node.backlog import Answer, Backlog, Settled, finish_within, split
from node.kernel.errors import BoundExceeded
from node.kernel.limits import SEQUENCE_CHUNK_ROWS_MAX
from node.kernel.ports import FeaturePlan, ModelRunner
from node.kernel.types import (
    Bools,
    EventColumns,
    EventSchema,
    FeatureRows,
    ModelName,
    ModelVersion,
    SequenceChunk,
    Triggers,
)
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


def triggers_of(version: ModelVersion, events: EventColumns, mask: Bools, rows: FeatureRows) -> Triggers:
    at = np.flatnonzero(mask)
    customers = events.customers
    return Triggers(
        version.name,
        version.version,
        tuple([customers[row] for row in events.rows[at].tolist()]),
        events.topics[at],
        events.offsets[at],
        events.types[at],
        events.times_ms[at],
        rows,
    )


async def run_triggers(
    runner: ModelRunner,
    backlog: Backlog,
    work: Sequence[tuple[ModelVersion, Triggers]],
    settled: Settled,
    deadline_seconds: float,
) -> Outcome:
    """Submit each model's triggers and wait until the deadline.

    Those answered are in `answers`. The rest, and all of a model that is behind already, are appended to
    the sequence log, most of them still being worked on: a model that was late once is back in step when it has
    answered before the next cycle begins. Order within a model is kept.
    """
    outcome = Outcome(settled.answers, settled.appended, settled.cursors, settled.shed)
    pieces = [
        (version, piece)
        for version, triggers in work
        for piece in split(triggers, min(SEQUENCE_CHUNK_ROWS_MAX, backlog.rows_max(triggers)))
    ]
    calls = [_submit(runner, backlog, version, triggers) for version, triggers in pieces]
    running = [call for call in calls if call is not None]
    # Of a model that is behind nothing can join this commit: waiting for it would only hold up the others.
    awaited = [
        call
        for (_, triggers), call in zip(pieces, calls, strict=True)
        if call is not None and not backlog.behind(str(triggers.name))
    ]
    try:
        await finish_within(awaited, deadline_seconds)
    except BaseException:  # the session ends: its rows must not fill the runner's queue for the next one
        for abandoned in running:
            abandoned.cancel()
        raise
    for (version, triggers), call in zip(pieces, calls, strict=True):
        if call is not None and call.done() and not backlog.behind(str(triggers.name)):
            outcome.answers.append(Answer(version, triggers, call.result()))
        else:
            chunk = backlog.append(version, triggers, call, settled)
            if chunk is not None:
                outcome.appended.append(chunk)
    return outcome


def _submit(runner: ModelRunner, backlog: Backlog, version: ModelVersion, triggers: Triggers) -> Answering | None:
    """None when older triggers of the model wait, or the runner's queue is full: the sequence log takes these."""
    if not backlog.may_submit(str(triggers.name)):
        return None
    try:
        return asyncio.ensure_future(runner.submit(version, triggers.rows))
    except BoundExceeded:
        return None
