"""Models' versions in the words of the HTTP interface: what is live, what is in stages, and what became of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from node.serving.view import ModelCost, ModelDetail, ModelInfo, StageStatus, VersionChange
from tenants.comparison import Figures
from tenants.judge import Verdict
from tenants.registry import Entry, Staged

Judged = tuple[Mapping[str, Figures], Mapping[str, Verdict]]
"""By version: what this node has seen, and what was last judged."""


def infos(entry: Entry, costs: Mapping[str, ModelCost], judged: Judged) -> Iterator[ModelInfo]:
    """The live version first, then what runs beside it, then the pair found last if that is another."""
    if entry.live is not None:
        version, failing = entry.live.version, entry.live.failing
        yield ModelInfo.of(
            version, "failing" if failing else "live", [failing] if failing else [], costs.get(version.version)
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


def detail(entry: Entry, costs: Mapping[str, ModelCost], judged: Judged) -> ModelDetail:
    history = [
        VersionChange(at_ms=one.at_ms, version=one.version, to=one.to, who=one.who, reason=one.reason)
        for one in entry.history
    ]
    name = entry.name
    return ModelDetail(
        tenant=name.tenant, model=name.model, versions=list(infos(entry, costs, judged)), history=history
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
