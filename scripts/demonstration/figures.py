"""What the demo shows and reports, made from what it produced, what it read and what the node says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from node.kernel.types import ModelName


@dataclass(frozen=True)
class TenantFigures:
    cpu_share: float | None = None
    """Of all tenants' CPU time lately, 0 to 1."""
    cpu_seconds: float = 0.0
    rows_queued: int = 0
    worker: str = ""


@dataclass(frozen=True)
class NodeFigures:
    """What matters here of the node's /v1/status; all of the run so far."""

    ready: bool = False
    reasons: tuple[str, ...] = ()
    delivery: str = ""
    processed: int = 0
    """Events whose cycle has begun, of the demo's topic."""
    refused: int = 0
    """Events that could not be decoded: dead letters."""
    failed: int = 0
    """Triggers that a model failed on: dead letters too."""
    shed: int = 0
    backlog_rows: int = 0
    listed: int = 0
    """Inferences of interval models that are committed."""
    lists: Mapping[str, int] = field(default_factory=dict)
    """Of interval runs: `finished`, `late` and `skipped`, over all partitions."""
    lists_running: bool = False
    tenants: Mapping[str, TenantFigures] = field(default_factory=dict)

    def then(self, status: Mapping[str, Any], topic: str, interval_model: str) -> NodeFigures:
        """The next figures, from a newer status. While a partition is opened again it has no totals: these stand."""
        partitions = status["partitions"]
        counted: dict[str, int] = {}
        for partition in partitions:
            for name, value in partition["counters"].items():
                what = name.partition(" ")[0]
                counted[what] = counted.get(what, 0) + value
        failed = counted.get("failed", 0)
        told = all(partition["progress"] for partition in partitions)
        newer = NodeFigures(
            ready=status["ready"],
            reasons=tuple(status["reasons"]),
            delivery=status["delivery"],
            processed=sum(partition["progress"].get(topic, 0) for partition in partitions),
            refused=counted.get("dead_letters", 0) - failed,
            failed=failed,
            shed=counted.get("shed", 0),
            backlog_rows=sum(entry["rows"] for partition in partitions for entry in partition["backlog"].values()),
            listed=_total(partitions, f"inferences {interval_model}"),
            lists={
                "finished": _total(partitions, f"intervals {interval_model}"),
                "late": _total(partitions, f"intervals_late {interval_model}"),
                "skipped": _total(partitions, f"intervals_skipped {interval_model}"),
            },
            lists_running=any(run["running"] for partition in partitions for run in partition["intervals"].values()),
            tenants={
                tenant["tenant"]: TenantFigures(
                    tenant["cpu_share"], tenant["cpu_seconds"], tenant["rows_queued"], tenant["worker"]
                )
                for tenant in status["tenants"]
            },
        )
        if told:
            return newer
        kept = {name: getattr(self, name) for name in ("processed", "refused", "failed", "shed", "listed", "lists")}
        return replace(newer, **kept)


def _total(partitions: Sequence[Mapping[str, Any]], counter: str) -> int:
    return sum(partition["counters"].get(counter, 0) for partition in partitions)


@dataclass(frozen=True)
class Figures:
    """One moment of the stream."""

    phase: str
    total: int
    """Events to stream."""
    produced: int
    events_per_s: float
    """Lately."""
    day: str
    """How far the year has come, of the events processed."""
    inferences: Mapping[ModelName, int]
    inferences_per_s: Mapping[ModelName, float]
    """Lately."""
    dead_letters: int
    node: NodeFigures

    @property
    def lag(self) -> int:
        return max(0, self.produced - self.node.processed)


class Speed:
    """Rates over the last moments: totals by name, with the times they were told at."""

    WINDOW_SECONDS = 3.0

    def __init__(self) -> None:
        self._told: list[tuple[float, Mapping[object, int]]] = []

    def tell(self, now: float, totals: Mapping[Any, int]) -> None:
        """`now`: seconds of a clock that never goes back."""
        self._told.append((now, dict(totals)))
        while len(self._told) > 2 and self._told[1][0] <= now - self.WINDOW_SECONDS:
            self._told.pop(0)

    def of(self, name: object) -> float:
        """A second; 0.0 until it was told of twice."""
        if len(self._told) < 2:
            return 0.0
        (first, before), (last, after) = self._told[0], self._told[-1]
        return (after.get(name, 0) - before.get(name, 0)) / (last - first) if last > first else 0.0
