"""How far models' windows are filled from history, as the HTTP interface tells it."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from node.serving.view import BackfillStatus, ModelInfo
from node.session import PartitionSession


def backfills(session: PartitionSession) -> dict[str, BackfillStatus]:
    """Of one open partition, by model."""
    figures = session.state.backfilling.statistics(session.state.layout)
    return {model: msgspec.convert(one, BackfillStatus) for model, one in figures.items()}


def with_backfill(info: ModelInfo, sessions: Iterable[PartitionSession]) -> ModelInfo:
    """The live version with what is so over all partitions that are open here."""
    if info.state != "live":
        return info
    name = f"{info.tenant}/{info.model}"
    found = [status for session in sessions if (status := backfills(session).get(name)) is not None]
    if not found:
        return info
    whole = BackfillStatus(
        warming=any(one.warming for one in found),
        events=sum(one.events for one in found),
        percent=min(one.percent for one in found),
        lost=sum(one.lost for one in found),
        floor_ms=max(one.floor_ms for one in found),
    )
    return msgspec.structs.replace(info, backfill=whole)
