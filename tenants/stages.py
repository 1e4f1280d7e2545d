"""(P) How a version goes through its stages on a node by itself: the registry's entry after each step.

In a cluster the catalog takes the same steps (`replication.catalog_models`), and `tenants.standing` follows it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from node.kernel import limits
from node.kernel.types import ModelVersion, StageChange
from tenants.registry import (
    AUTOMATIC,
    TENANT,
    Action,
    Entry,
    GoLive,
    Live,
    Newest,
    Retire,
    RunBeside,
    Staged,
    WriteStatus,
    quarantine_problem,
    text_features,
)
from tenants.stage import Promote, RollBack

Stepped: TypeAlias = tuple[Entry, tuple[Action, ...]]


def unlike(live: ModelVersion, staged: ModelVersion) -> str:
    """Why the one can't stand beside the other, '' when it can: their outputs must mean the same to whoever reads
    them, and either must answer the same events."""
    different = [
        what
        for what, one, other in (
            ("on", live.events, staged.events),
            ("output", live.outputs, staged.outputs),
            ("class names", live.labels, staged.labels),
        )
        if one != other
    ]
    if not different:
        return ""
    return (
        f"its {' and '.join(different)} differ from the live version's, so it can't run beside that; leave [rollout]"
        " out to replace the live version at once"
    )


def begin(entry: Entry, passed: Live, at_ms: int) -> Stepped:
    """The first stage of a version that passed its trial; another one that was staged goes."""
    staged = Staged(passed.manifest, passed.version, passed.report, 0, at_ms, TENANT, "passed its trial")
    newest = Newest(staged.asked.kind, passed.version.version, passed.version.blob, at_ms, manifest=passed.manifest)
    changes = [] if entry.staged is None else [_changed(entry.staged, "retired", TENANT, "a newer one passed", at_ms)]
    after = replace(entry, staged=staged, newest=newest)
    gone = () if entry.staged is None else (Retire(entry.staged.version),)
    actions = (RunBeside(staged.version, text_features(staged.manifest)), *gone, WriteStatus(entry.name))
    return after.remembering(*changes, _changed(staged, str(staged.asked), TENANT, staged.reason, at_ms)), actions


def found_again(staged: Staged, at_ms: int) -> Newest:
    """The pair of files of a staged version."""
    version = staged.version
    return Newest(staged.asked.kind, version.version, version.blob, at_ms, manifest=staged.manifest)


def promote(entry: Entry, event: Promote) -> Stepped | None:
    """None when the version is not in that stage any more."""
    staged, live = entry.staged, entry.live
    if staged is None or live is None or (staged.version.version, staged.stage) != (event.version, event.stage):
        return None
    mine = entry.newest is not None and entry.newest.version == event.version
    if not event.to_live and staged.stage + 1 < len(staged.manifest.rollout):
        onwards = replace(staged, stage=staged.stage + 1, since_ms=event.at_ms, who=event.who, reason=event.reason)
        newest = found_again(onwards, event.at_ms) if mine else entry.newest
        after = replace(entry, staged=onwards, newest=newest)
        change = _changed(onwards, str(onwards.asked), event.who, event.reason, event.at_ms)
        return after.remembering(change), (WriteStatus(entry.name),)
    after = replace(
        entry,
        live=Live(staged.manifest, staged.version, staged.report, event.at_ms),
        newest=None if mine else entry.newest,
        previous=live if not live.failing else entry.previous,
        staged=None,
    )
    change = _changed(staged, "live", event.who, event.reason, event.at_ms)
    went = GoLive(staged.version, text_features(staged.manifest))
    return after.remembering(change), (went, Retire(live.version), WriteStatus(entry.name))


def roll_back(entry: Entry, event: RollBack) -> Stepped | None:
    """The version is quarantined; of the live one, that needs one before it. None when it does not run, or can't be."""
    kept = dict(list(entry.quarantined.items())[-(limits.QUARANTINED_PER_MODEL_MAX - 1) :])
    quarantined = {**kept, event.version: event.reason}
    change = StageChange(event.at_ms, event.version, "quarantined", event.who, event.reason)
    staged, live, good = entry.staged, entry.live, entry.previous
    problems = (quarantine_problem(entry.name, event.reason),)
    if staged is not None and staged.version.version == event.version:
        newest = Newest("quarantined", event.version, staged.version.blob, event.at_ms, problems, staged.manifest)
        mine = entry.newest is None or entry.newest.version == event.version
        after = replace(entry, staged=None, newest=newest if mine else entry.newest, quarantined=quarantined)
        # The live one takes over what the staged one has queued.
        over = () if live is None else (GoLive(live.version, text_features(live.manifest)),)
        return after.remembering(change), (*over, Retire(staged.version), WriteStatus(entry.name))
    if live is None or live.version.version != event.version or good is None:
        return None
    newest = entry.newest or Newest(
        "quarantined", event.version, live.version.blob, event.at_ms, problems, live.manifest
    )
    after = replace(
        entry, live=replace(good, live_since_ms=event.at_ms), newest=newest, previous=None, quarantined=quarantined
    )
    again = StageChange(event.at_ms, good.version.version, "live", event.who, "the version after it was quarantined")
    after = after.remembering(change, again)
    actions: list[Action] = [
        GoLive(good.version, text_features(good.manifest)),
        Retire(live.version),
        WriteStatus(entry.name),
    ]
    if staged is not None and (why := unlike(good.version, staged.version)):
        after, gone = taken_back(after, staged, AUTOMATIC, why, event.at_ms)
        actions += gone
    return after, tuple(actions)


def taken_back(entry: Entry, staged: Staged, who: str, reason: str, at_ms: int) -> Stepped:
    """The staged version runs no more, without blame."""
    newest = entry.newest
    if newest is not None and newest.version == staged.version.version:
        newest = replace(newest, state="refused", problems=(f"{entry.name.model}.toml: {reason}",))
    change = _changed(staged, "retired", who, reason, at_ms)
    return replace(entry, staged=None, newest=newest).remembering(change), (Retire(staged.version),)


def _changed(staged: Staged, to: str, who: str, reason: str, at_ms: int) -> StageChange:
    return StageChange(at_ms, staged.version.version, to, who, reason)
