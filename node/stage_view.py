"""Models' versions in the words of the HTTP interface: what is live, what is in stages, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from node.kernel.types import ModelName
from node.serving.view import ConsistencyStatus, ModelCost, ModelDetail, ModelInfo, StageStatus, VersionChange
from node.training.consistency import Consistency
from tenants.comparison import Figures
from tenants.judge import Verdict
from tenants.registry import Entry, Staged

Judged = tuple[Mapping[str, Figures], Mapping[str, Verdict]]
"""By version: what this node has seen, and what was last judged."""
Checked = Callable[[ModelName], Consistency | None]
"""What the last check of a model's training data found on this node."""


def infos(
    entry: Entry, costs: Mapping[str, ModelCost], judged: Judged, checked: Checked = lambda name: None
) -> Iterator[ModelInfo]:
    """The live version first, then what runs beside it, then the pair found last if that is another."""
    if entry.live is not None:
        version, failing = entry.live.version, entry.live.failing
        yield ModelInfo.of(
            version,
            "failing" if failing else "live",
            [failing] if failing else [],
            costs.get(version.version),
            consistency=consistency_status(entry.name, checked),
        )
    staged = entry.staged
    if staged is not None:
        yield ModelInfo.of(
            staged.version,
            staged.asked.kind,
            [staged.failing] if staged.failing else [],
            costs.get(staged.version.version),
            stage_status(staged, judged),
        )
    newest = entry.newest
    if newest is not None and (staged is None or newest.version != staged.version.version):
        yield ModelInfo(
            tenant=entry.name.tenant,
            model=entry.name.model,
            version=newest.version[:12],
            sha256=newest.version,
            state=newest.state,
            reasons=list(newest.problems),
        )


def detail(
    entry: Entry, costs: Mapping[str, ModelCost], judged: Judged, checked: Checked = lambda name: None
) -> ModelDetail:
    history = [
        VersionChange(at_ms=one.at_ms, version=one.version, to=one.to, who=one.who, reason=one.reason)
        for one in entry.history
    ]
    name = entry.name
    return ModelDetail(
        tenant=name.tenant, model=name.model, versions=list(infos(entry, costs, judged, checked)), history=history
    )


def consistency_status(name: ModelName, checked: Checked) -> ConsistencyStatus | None:
    found = checked(name)
    if found is None:
        return None
    return ConsistencyStatus(
        tenant=name.tenant,
        model=name.model,
        checked_at_ms=found.checked_at_ms,
        share=found.share,
        logged=found.logged,
        compared=found.compared,
        different=found.different,
        unchecked=found.unchecked,
        state_rows=found.state_rows,
        state_different=found.state_different,
    )


def stage_status(staged: Staged, judged: Judged) -> StageStatus:
    version = staged.version.version
    figures, verdict = judged[0].get(version, Figures(staged.stage)), judged[1].get(version)
    return StageStatus(
        model=staged.version.name.model,
        version=staged.version.short_version,
        stage=str(staged.asked),
        number=staged.stage + 1,
        of=len(staged.manifest.rollout),
        since_ms=staged.since_ms,
        who=staged.who,
        why=staged.reason,
        verdict="" if verdict is None else verdict.decision,
        verdict_reason="" if verdict is None else verdict.reason,
        rows=figures.rows,
        errors=figures.errors,
        live_rows=figures.live_rows,
        live_errors=figures.live_errors,
        compared=figures.compared,
        agreed=figures.agreed,
        dropped=figures.dropped,
        agreement=figures.agreement,
        cost_ratio=figures.cost_ratio,
        drift=figures.drift,
        p99_ms=figures.p99_ms,
        live_p99_ms=figures.live_p99_ms,
    )
