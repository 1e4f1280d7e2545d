"""(P) What a tenant's windows of time say, in plain words: what it asked for, what it got, and what held it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from tenants.shares import Hold, ShareWindow

_HOLDS_BACK: Final[tuple[Hold, ...]] = ("quota", "turn", "worker", "blocked")
_TOLD_SHARE_MIN: Final = 0.01
"""Of the window: what held a tenant for less is not told."""
NOTHING: Final = "nothing"


@dataclass(frozen=True, slots=True)
class TenantFacts:
    """What the words need beside the windows. `weight` and `rows_s_max` (0: none) as they are now.

    `own` names the limits that the tenant has set itself, below what it might have. `worker` is what its worker process
    does, '' while it runs; `troubles` are reasons why it was lost, or why a version can't run.
    """

    tenant: str
    weight: float
    rows_s_max: float
    memory_mb: int
    slots: int
    own: frozenset[str] = frozenset()
    worker: str = ""
    troubles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CompetitorExplained:
    tenant: str
    weight: float
    competed_seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class WindowExplained:
    """`tenants.shares.ShareWindow`, and what it says. CPU seconds asked for are those got and those held back."""

    seconds: float
    rows_waited: int
    rows_asked: int
    rows_got: int
    rows_dropped: int
    rows_running: int
    rows_waiting: int
    cpu_asked_seconds: float
    cpu_got_seconds: float
    cpu_held_back_seconds: float
    cpu_all_seconds: float
    share_got: float | None
    share_due: float | None
    held_seconds: Mapping[Hold, float]
    held_back_by: str
    competitors: tuple[CompetitorExplained, ...]
    says: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShareExplained:
    tenant: str
    weight: float
    rows_s_max: float
    slots: int
    windows: tuple[WindowExplained, ...]
    notes: tuple[str, ...]


def explain(windows: tuple[ShareWindow, ...], facts: TenantFacts) -> ShareExplained:
    notes = [f"its worker does not run now: {facts.worker}"] if facts.worker else []
    explained = tuple(_explained(window, facts) for window in windows)
    return ShareExplained(
        facts.tenant, facts.weight, facts.rows_s_max, facts.slots, explained, (*notes, *facts.troubles)
    )


def held_back_by(window: ShareWindow) -> str:
    """The one thing that kept waiting rows waiting for the longest time; NOTHING when none wait now."""
    if not window.waiting:
        return NOTHING
    longest = max(_HOLDS_BACK, key=lambda hold: window.held[hold])
    return longest if window.held[longest] > 0 else NOTHING


def _explained(window: ShareWindow, facts: TenantFacts) -> WindowExplained:
    return WindowExplained(
        seconds=window.seconds,
        rows_waited=window.waited,
        rows_asked=window.asked,
        rows_got=window.got,
        rows_dropped=window.dropped,
        rows_running=window.running,
        rows_waiting=window.waiting,
        cpu_asked_seconds=window.cpu_seconds + window.cpu_waiting,
        cpu_got_seconds=window.cpu_seconds,
        cpu_held_back_seconds=window.cpu_waiting,
        cpu_all_seconds=window.cpu_all,
        share_got=window.share_got,
        share_due=window.share_due,
        held_seconds=window.held,
        held_back_by=held_back_by(window),
        competitors=tuple(
            CompetitorExplained(one.tenant, one.weight, one.competed_seconds, one.cpu_seconds)
            for one in window.competitors
        ),
        says=tuple(_sentences(window, facts)),
    )


def _sentences(window: ShareWindow, facts: TenantFacts) -> Iterator[str]:
    if not (window.waited or window.asked or window.cpu_seconds):
        yield "it had no work at all: no event concerned its models, or none of them is live"
        return
    dropped = f", {window.dropped:,} were dropped" if window.dropped else ""
    yield (
        f"it asked for {window.waited + window.asked:,} rows, {window.waited:,} of them from before;"
        f" {window.got:,} were computed{dropped}, {window.running:,} are being computed, {window.waiting:,} wait"
    )
    yield (
        f"that is {_seconds(window.cpu_seconds + window.cpu_waiting)} of CPU time asked for,"
        f" {_seconds(window.cpu_seconds)} got and {_seconds(window.cpu_waiting)} held back"
    )
    if window.share_got is not None:
        due = "" if window.share_due is None else f"; its weight made it {window.share_due:.0%}"
        yield f"it got {window.share_got:.0%} of all CPU time of models{due}"
    for hold in sorted(window.held, key=lambda hold: -window.held[hold]):
        if window.held[hold] > _TOLD_SHARE_MIN * window.seconds:
            yield f"{_seconds(window.held[hold])}: {_reason(hold, window, facts)}"
    if window.forgiven_seconds > _TOLD_SHARE_MIN * window.seconds:
        yield f"{_seconds(window.forgiven_seconds)} of CPU time was due to it that its one worker could not take"


def _reason(hold: Hold, window: ShareWindow, facts: TenantFacts) -> str:
    match hold:
        case "idle":
            return "nothing waited"
        case "served":
            return "all that it asked for was being computed"
        case "worker":
            return "rows waited behind its own batch: a tenant has one worker, which computes one batch at a time"
        case "turn":
            return f"rows waited while others had the {facts.slots} CPU slots: {_against(window, facts)}"
        case "blocked":
            why = f" ({facts.troubles[0]})" if facts.troubles else f", in {facts.memory_mb} MB of memory"
            return f"rows waited for its worker, which was starting, loading a model or backing off{why}"
        case "quota":
            whose = "its tenant.toml sets" if "rows_s_max" in facts.own else "the operator may raise"
            return f"rows waited for its quota of {facts.rows_s_max:g} rows a second (rows_s_max, which {whose})"


def _against(window: ShareWindow, facts: TenantFacts) -> str:
    others = [f"{one.tenant} {one.weight:g}" for one in window.competitors]
    return f"weight {facts.weight:g} against " + (", ".join(others) if others else "tenants that are gone")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
