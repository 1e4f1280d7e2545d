"""What waits and what was shed, gathered from partitions into the figures of models and tenants."""

from __future__ import annotations

from node.serving.view import BacklogStatus, ModelInfo, PartitionStatus, TenantStatus
from node.view import with_lag, with_waiting


def model(name: str, state: str) -> ModelInfo:
    return ModelInfo(tenant="ads", model=name, version="0" * 12, sha256="0" * 64, state=state)


def test_a_models_lag_is_told_once_over_all_partitions() -> None:
    models = [model("bid", "live"), model("bid", "candidate"), model("click", "live")]
    figures = {"rows": 3, "chunks": 1, "bytes": 900, "oldest_ms": 50, "waited_ms": 20}
    told = with_lag(models, [{"ads/bid": figures}, {"ads/bid": {**figures, "oldest_ms": 9, "waited_ms": 30}}, {}])
    assert [one.waiting for one in told] == [BacklogStatus(6, 2, 50, 1800, 30), None, None]


def test_a_tenant_is_told_what_waits_and_what_was_shed_by_reason_and_model() -> None:
    partitions = [
        PartitionStatus(
            number=number,
            phase="running",
            counters={"events": 9, "shed age ads/bid": 2, "shed superseded ads/bid": 1, "shed age risk/score": 4},
            backlog={"ads/bid": BacklogStatus(5, 1, 0), "ads/click": BacklogStatus(1, 1, 0)},
        )
        for number in range(2)
    ]
    ads, risk, idle = with_waiting([TenantStatus(tenant=name) for name in ("ads", "risk", "idle")], partitions)
    assert (ads.rows_waiting, ads.shed) == (12, {"age ads/bid": 4, "superseded ads/bid": 2})
    assert (risk.rows_waiting, risk.shed) == (0, {"age risk/score": 8})
    assert (idle.rows_waiting, idle.shed) == (0, {})
