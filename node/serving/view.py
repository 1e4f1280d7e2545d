"""What the HTTP API needs of the node, and the bodies it answers with: the one contract between the two.

Numbers that are missing (NaN inside) are null. Times ending in `_ms` are milliseconds since the Unix epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

from node.kernel.limits import (
    MEMORY_MB_MAX,
    MEMORY_MB_MIN,
    MODELS_PER_TENANT_MAX,
    ROWS_PER_SECOND_MAX,
    STORED_BYTES_MAX,
    WEIGHT_MAX,
    WEIGHT_MIN,
    WINDOW_BYTES_MAX,
)
from node.kernel.types import QUOTAS, ModelName, ModelVersion, Schedule

AsOf: TypeAlias = int | Literal["last"]
"""A time in ms, or "last": the time of the customer's own latest event."""

Delivery: TypeAlias = Literal["exactly_once", "at_least_once"]


class Body(Struct, frozen=True, kw_only=True):
    """Root of everything that is answered."""


class CustomerState(Body, frozen=True):
    """A customer's profile and every aggregate that is kept for it, as of `at_ms`."""

    customer: str
    partition: int
    also_on: list[int]
    """Further partitions that hold the customer: its events are not all keyed alike."""
    at_ms: int
    changed_ms: int | None
    """Time of the customer's latest event."""
    profile: dict[str, float | None]
    aggregates: dict[str, float | None]


class CustomerFeatures(Body, frozen=True):
    """One model's features as they would be computed at `at_ms`, were there no new event."""

    customer: str
    tenant: str
    model: str
    version: str
    partition: int
    at_ms: int
    features: dict[str, float | str | None]
    """In the order of the model's columns."""
    needs_event: list[str]
    """Features that only an event can give: null here."""


class Inference(Body, frozen=True):
    tenant: str
    model: str
    version: str
    """Its first 12 hex digits."""
    live: bool
    """Whether that version is the one that runs now."""
    outputs: dict[str, float | str | None]
    """A class that has a name is given by it, as in the inferences topic."""
    event_time_ms: int
    expires_ms: int | None
    """Null: never, or the model is gone and its TTL with it."""


class CustomerInferences(Body, frozen=True):
    """The latest stored inference of each model, without those expired by `at_ms`."""

    customer: str
    partition: int
    at_ms: int
    inferences: list[Inference]


class ModelCost(Body, frozen=True):
    """Learned from the calls so far; times are null before the first."""

    ms_per_call: float | None = None
    ms_per_row: float | None = None
    cpu_seconds: float = 0.0
    calls: int = 0
    rows: int = 0
    rows_queued: int = 0


class Waiting(Body, frozen=True):
    """What waits for a model, or for all of a tenant's, in the sequence logs of this node's partitions."""

    rows: int = 0
    seconds: float = 0.0
    """Since the oldest was queued: how far behind its events the model is."""
    bytes: int = 0
    shed: dict[str, int] = {}
    """Why (overload, superseded, age, deleted) -> triggers given up since the changelog began."""


class ScheduleInfo(Body, frozen=True):
    """When an interval model runs: every `every_ms`, or (0) each day `at_ms` after midnight in `zone`; with a `gap_ms`
    once for each closed session of that gap, looked for so often."""

    every_ms: int
    at_ms: int
    zone: str
    by: Literal["clock", "event"]
    grace_ms: int
    all: bool
    """Over all customers, not only those with events since the last run."""
    gap_ms: int = 0

    @staticmethod
    def of(schedule: Schedule) -> ScheduleInfo:
        return ScheduleInfo(
            every_ms=schedule.every_ms,
            at_ms=schedule.at_ms,
            zone=schedule.zone,
            by="event" if schedule.by_event else "clock",
            grace_ms=schedule.grace_ms,
            all=schedule.whole,
            gap_ms=schedule.gap_ms,
        )


class StageStatus(Body, frozen=True):
    """A version that runs beside its model's live one, and what this node has seen of it in its present stage."""

    model: str
    version: str
    """Its first 12 hex digits."""
    stage: str
    """shadow, or canary and its share of customers."""
    number: int
    of: int
    """Stages there are."""
    since_ms: int
    who: str
    """Who brought it there: auto, a tenant or node, an operator."""
    why: str
    verdict: str
    """keep, promote or roll back, as last judged; of a cluster, told by its leader alone."""
    verdict_reason: str
    rows: int
    """That it was called with."""
    errors: int
    live_rows: int
    live_errors: int
    compared: int
    """Rows of a shadow that the live version answered too."""
    agreed: int
    dropped: int
    """Rows that were not shown to a shadow: its tenant had no share to spare."""
    agreement: float | None
    cost_ratio: float | None
    """CPU time a row, in that of the live version."""
    drift: float
    """Kolmogorov-Smirnov distance of the outputs' distributions, 0 to 1."""
    p99_ms: float
    """Of the call that a row was in."""
    live_p99_ms: float


class VersionChange(Body, frozen=True):
    at_ms: int
    version: str
    """The whole one."""
    to: str
    """live, a stage, retired or quarantined."""
    who: str
    reason: str


class ConsistencyStatus(Body, frozen=True):
    """What the last `headrace check-training` on this node found of a model's training data."""

    tenant: str
    model: str
    checked_at_ms: int
    share: float | None
    """Of the rows compared, those that the events give bit for bit; null: none could be compared."""
    logged: int
    compared: int
    different: int
    unchecked: dict[str, int]
    """Why other rows were not compared -> how many."""
    state_rows: int
    state_different: int
    """Rows of state computed anew, and those that differ from the changelog's."""


class BackfillStatus(Body, frozen=True):
    """How far the windows of a model that asks for history are filled from it."""

    warming: bool
    """They are not yet; its inferences say so, or it is held."""
    events: int
    """Taken in so far."""
    percent: float
    """Of the records to read; of several partitions, the least."""
    lost: int = 0
    """Records that the broker deleted before they were read."""
    floor_ms: int = 0
    """Kafka time of the oldest record there was, where older ones were wanted; else 0."""


class ModelInfo(Body, frozen=True):
    """One version of one model, whatever its state."""

    tenant: str
    model: str
    version: str
    """Its first 12 hex digits."""
    sha256: str
    """The whole version: sha256 of model file and manifest together; empty if the pair could not be read."""
    state: str
    reasons: list[str] = []
    """Why it is in this state, when that needs a reason: what its tenant has to mend."""
    events: list[str] = []
    schedule: ScheduleInfo | None = None
    """Of an interval model, which has no events."""
    columns: list[str] = []
    outputs: list[str] = []
    labels: list[str] = []
    method: str = ""
    ttl_ms: int = 0
    """Of the stored inference; 0: never expires."""
    deadline_ms: int = 0
    weight: float = 1.0
    cost: ModelCost = ModelCost()
    waiting: Waiting = Waiting()
    """Of all versions of the model, told with the first of them."""
    stage: StageStatus | None = None
    """While it runs beside the live version."""
    log_rows: float = 0.0
    """The share of customers whose rows are kept as training data."""
    consistency: ConsistencyStatus | None = None
    """Of all versions of the model, told with the live one; null before its training data was checked here."""
    backfill: BackfillStatus | None = None
    """Over the partitions that are open here, told with the live version; null if it asks for no history."""

    @staticmethod
    def of(
        version: ModelVersion,
        state: str,
        reasons: Sequence[str] = (),
        cost: ModelCost | None = None,
        stage: StageStatus | None = None,
        consistency: ConsistencyStatus | None = None,
    ) -> ModelInfo:
        return ModelInfo(
            tenant=version.name.tenant,
            model=version.name.model,
            version=version.short_version,
            sha256=version.version,
            state=state,
            reasons=list(reasons),
            events=list(version.events),
            schedule=None if version.schedule is None else ScheduleInfo.of(version.schedule),
            columns=list(version.features),
            outputs=list(version.outputs),
            labels=list(version.labels),
            method=version.method,
            ttl_ms=version.ttl_ms,
            deadline_ms=version.deadline_ms,
            weight=version.weight,
            cost=cost or ModelCost(),
            stage=stage,
            log_rows=version.log_rows,
            consistency=consistency,
        )


class SharedFeatureInfo(Body, frozen=True):
    """One version of a feature that a tenant shares, as this node has it in force."""

    name: str
    """As expressions say it."""
    owner: str
    version: int
    newest: bool
    """Whether expressions that name no version mean this one."""
    type: str
    definition: str
    description: str
    shared_with: list[str] | None
    """Null: all tenants."""
    users: list[str]
    """Live models, and other shared features, that name it."""
    inputs: list[str]
    """Models' outputs that it depends on; the rest of it is as fresh as the event."""
    aggregates: list[str]
    """What it needs of a customer's row; folded once for all that need the same."""
    values: int
    """How many were computed since the node started, each once for all its users."""
    us_per_value: float | None
    """CPU time, with all it is computed from but the fold; null before the first."""


class SharedFeatures(Body, frozen=True):
    """All shared features, by name and version."""

    features: list[SharedFeatureInfo]
    refused: dict[str, list[str]]
    """Tenant -> why the newest state of its features.toml is not in force."""


class ModelDetail(Body, frozen=True):
    tenant: str
    model: str
    versions: list[ModelInfo]
    history: list[VersionChange]
    """What became of its versions, the newest last."""


class StageMove(Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator decides of a model's versions."""

    move: Literal["promote", "roll_back"]
    """promote: the staged version goes to its next stage. roll_back: the staged version, or else the live one, is
    quarantined, and the live one before it runs."""
    version: Annotated[str, Meta(pattern="^[0-9a-f]{0,64}$")] = ""
    """Its first digits; refused when another version is meant by now."""
    live: bool = False
    """Promote it past all further stages."""
    reason: Annotated[str, Meta(max_length=256)] = ""
    who: Annotated[str, Meta(min_length=1, max_length=64, pattern="^[ -~]*$")] = "operator"


class Models(Body, frozen=True):
    """Up to HTTP_MODELS_MAX versions, by tenant, model and version."""

    models: list[ModelInfo]
    next: str | None
    """Ask again with this as `after`; null: these were all."""


class BacklogStatus(Body, frozen=True):
    """Triggers of one model that wait in the sequence log."""

    rows: int
    chunks: int
    oldest_ms: int
    """Age of the oldest, by event time."""
    waiting_ms: int = 0
    """Since the oldest was queued."""
    bytes: int = 0
    given_up: int = 0
    """Triggers still in the log that will not run: counted as shed once they are taken out."""


class IntervalStatus(Body, frozen=True):
    """The last run of an interval model."""

    due_ms: int
    """The end of its interval."""
    running: bool
    late: bool
    """It was not finished when the next interval had ended; what passed meanwhile is skipped."""
    rows: int
    """Customers it has run over."""


class CacheStatus(Body, frozen=True):
    """The row cache."""

    hits: int = 0
    misses: int = 0
    rows: int = 0
    bytes: int = 0


class PartitionStatus(Body, frozen=True):
    number: int
    phase: str
    reason: str = ""
    """Why it waits; empty while it runs."""
    failures: int = 0
    role: str = "owner"
    """owner or standby; what is read of a standby is as old as `ms_behind` says."""
    epoch: int = 0
    """Of the cluster's assignment; 0 on a node that is alone."""
    frames_behind: int | None = None
    """Commits of the owner that are not folded here yet, at most; null while it is closed."""
    ms_behind: int | None = None
    """Since everything committed was last seen to be folded here; 0 where that is so now."""
    delivery: Delivery = "exactly_once"
    lag: int | None = None
    """Events between the progress and the end of the source."""
    progress: dict[str, int] = {}
    """Source topic -> next offset."""
    progress_left: dict[str, int] = {}
    """The same of topics out of the config: where they go on should they come back."""
    counters: dict[str, int] = {}
    """Totals since the changelog began: `events`, `late`, `dead_letters <reason>`, `inferences <model>`, runs finished
    (`intervals <model>`)…"""
    step_seconds: dict[str, float] = {}
    row_bytes: int | None = None
    """Of a customer's row, of 32768 that it may have; null while it is closed."""
    backlog: dict[str, BacklogStatus] = {}
    intervals: dict[str, IntervalStatus] = {}
    backfills: dict[str, BackfillStatus] = {}
    """By model; of a staged version, by its key."""
    cache: CacheStatus = CacheStatus()


class SandboxStatus(Body, frozen=True):
    """What holds a worker in: the layers in force, and why each of the others is missing."""

    layers: list[str]
    missing: dict[str, str]


class MemoryStatus(Body, frozen=True):
    """Of a worker, as the kernel counted it last."""

    own_bytes: int
    """Free if it ended."""
    shared_bytes: int
    """Mapped by other processes too; every worker counts it whole."""
    proportional_bytes: int
    """PSS: its own, and its part of what is shared."""


class PrintedLine(Body, frozen=True):
    """A line that a tenant's model printed; untrusted text."""

    number: int
    """Counts the tenant's lines from 1."""
    time_ms: int
    """When the node read it."""
    pid: int
    """Of the worker."""
    text: str


class TenantLog(Body, frozen=True):
    """The last lines that a tenant's models printed."""

    tenant: str
    lines: list[PrintedLine]
    dropped: int
    """Lines that went for newer ones."""


class ShareCompetitor(Body, frozen=True):
    """Another tenant that ran, or waited for its turn, in the window."""

    tenant: str
    weight: float
    competed_seconds: float
    cpu_seconds: float


class WindowShare(Body, frozen=True):
    """The last `seconds` of a tenant on this node. Rows that waited before and those asked for are those got, dropped,
    running and waiting now; CPU seconds asked for are those got and those held back (estimated, for rows that wait)."""

    seconds: float
    rows_waited: int
    rows_asked: int
    """Submitted to the tenant's worker; one that is tried again counts again."""
    rows_got: int
    rows_dropped: int
    rows_running: int
    rows_waiting: int
    cpu_asked_seconds: float
    cpu_got_seconds: float
    cpu_held_back_seconds: float
    cpu_all_seconds: float
    """Of all tenants."""
    share_got: float | None
    """Of all tenants' CPU time, 0 to 1; null if nothing ran."""
    share_due: float | None
    """Its weight among those that had work, averaged over the time in which anybody had; null if nobody had."""
    held_seconds: dict[str, float]
    """idle, served, worker, turn, blocked, quota -> seconds; together the window."""
    held_back_by: str
    """What kept the rows that wait now for the longest: worker, turn, blocked or quota; else nothing."""
    competitors: list[ShareCompetitor]
    """At most five, those first that used most."""
    says: list[str]
    """All this in words."""


class TenantShare(Body, frozen=True):
    """What a tenant asked of this node's workers of late, what it got, and what held it back."""

    tenant: str
    weight: float
    rows_s_max: float
    """Its quota of rows a second; 0: none."""
    slots: int
    """Batches that the node computes at once."""
    windows: list[WindowShare]
    notes: list[str]
    """Why its worker, or a version, can't run."""
    waiting: Waiting = Waiting()
    """In the sequence logs: what is not submitted yet comes from there."""


class QuotaChange(Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator changes of a tenant's quota: what is left out stays; null: what the config allows all."""

    weight: Annotated[float, Meta(ge=WEIGHT_MIN, le=WEIGHT_MAX)] | UnsetType | None = UNSET
    memory_mb: Annotated[int, Meta(ge=MEMORY_MB_MIN, le=MEMORY_MB_MAX)] | UnsetType | None = UNSET
    rows_s_max: Annotated[float, Meta(ge=0, le=ROWS_PER_SECOND_MAX)] | UnsetType | None = UNSET
    models_max: Annotated[int, Meta(ge=0, le=MODELS_PER_TENANT_MAX)] | UnsetType | None = UNSET
    stored_bytes_max: Annotated[int, Meta(ge=0, le=STORED_BYTES_MAX)] | UnsetType | None = UNSET
    window_bytes_max: Annotated[int, Meta(ge=0, le=WINDOW_BYTES_MAX)] | UnsetType | None = UNSET
    who: Annotated[str, Meta(min_length=1, max_length=64, pattern="^[ -~]*$")] = "operator"
    """Noted beside the quota."""

    def changes(self) -> dict[str, float | None]:
        given = {name: getattr(self, name) for name in QUOTAS}
        return {name: value for name, value in given.items() if value is not UNSET}


class TenantQuota(Body, frozen=True):
    """What a tenant may have and has."""

    tenant: str
    quota: dict[str, float]
    """What operators have set for it; for what is not there the config's caps hold."""
    who: str
    """Who set it last; empty: nobody."""
    at_ms: int
    limits: dict[str, float]
    """What holds now: the quota or cap, or less if the tenant asked for less. `rows_s_max` 0: any number."""
    asked: dict[str, float]
    """What its tenant.toml asks for."""
    models: int
    """That are live or about to be."""
    stored_bytes: int
    """Of each customer's row, for their outputs."""
    window_bytes: int
    """Of each customer's row, for the windows that it asks for."""
    refused: dict[str, int]
    """Quota -> pairs of files refused because of it, since the node started; their status files say more."""


class TenantStatus(Body, frozen=True):
    tenant: str
    weight: float = 1.0
    cpu_seconds: float = 0.0
    """Of its worker, since the node started."""
    cpu_share: float | None = None
    """Of all tenants' CPU time since the node started, 0 to 1; of late: /v1/tenants/{tenant}/share."""
    calls: int = 0
    rows_queued: int = 0
    restarts: int = 0
    worker: str = ""
    """What its worker process does: running, starting, backing off…"""
    memory: MemoryStatus | None = None
    """Null before it was measured."""
    sandbox: SandboxStatus | None = None
    """Of its worker; null while it has none."""
    waiting: Waiting = Waiting()
    stages: list[StageStatus] = []
    consistency: list[ConsistencyStatus] = []
    refused: dict[str, int] = {}
    """Quota -> pairs of files refused because of it, since the node started."""


class HttpStatus(Body, frozen=True):
    in_progress: int
    connections: int
    answered: dict[str, int]
    """Route and status ("/v1/models 200") -> requests."""
    refused: dict[str, int]
    """Why (requests, connections, time) -> how many."""
    seconds: float
    """Spent answering, added up."""


class NodeStatus(Body, frozen=True):
    node: str
    started_ms: int
    now_ms: int
    delivery: Delivery = "exactly_once"
    """at_least_once: the broker has no transactions; drop duplicates by the inference's id."""
    ready: bool = True
    reasons: list[str] = []
    """Why it is not ready."""
    partitions: list[PartitionStatus] = []
    counters: dict[str, int] = {}
    """As of the partitions, but all together, and since the node started."""
    step_seconds: dict[str, float] = {}
    """Likewise."""
    tenants: list[TenantStatus] = []
    sandbox: SandboxStatus | None = None
    """Of every worker on this node, as found at its start."""
    tasks: list[str] = []
    """Background tasks that run."""
    http: HttpStatus | None = None
    cluster_parts: dict[str, Any] = {}
    """What each part of this node's side of the cluster has done: agreement, standbys, snapshots, changelog cuts, model
    files and calls between peers. Empty for a node that is alone."""


class NodeView(Protocol):
    """The node, as the HTTP API sees it: committed state only, and never a long wait on the event loop.

    Reads of a customer raise NotFound (unknown customer or model), StoreUnavailable, StateCorrupt; of its features also
    TableUnavailable.
    """

    def status(self) -> NodeStatus:
        """`ready`, `reasons` and `http` are filled in by the server."""
        ...

    def unready(self) -> Sequence[str]:
        """Why the node can't do its work now, one line each: partitions not running, the broker gone. Empty: ready."""
        ...

    def models(self) -> Sequence[ModelInfo]: ...

    def model(self, name: ModelName) -> ModelDetail:
        """Raises NotFound."""
        ...

    async def move_stage(self, name: ModelName, move: StageMove) -> None:
        """Returns once it holds here and is kept. Raises NotFound, PeerRefused, ClusterUnavailable."""
        ...

    def shared_features(self) -> SharedFeatures: ...

    def printed(self, tenant: str, after: int) -> TenantLog:
        """The tenant's lines with a larger number than `after`. Raises NotFound for an unknown tenant."""
        ...

    def share(self, tenant: str) -> TenantShare:
        """Raises NotFound for an unknown tenant."""
        ...

    def quota(self, tenant: str) -> TenantQuota:
        """Also of a tenant that is yet to come: an operator may say first what it may have."""
        ...

    async def change_quota(self, tenant: str, change: QuotaChange) -> None:
        """Returns once it holds here and is kept. Raises BoundExceeded, PeerRefused, ClusterUnavailable."""
        ...

    async def customer(self, customer: str, at: AsOf) -> CustomerState: ...

    async def features(self, customer: str, model: ModelName, at: AsOf) -> CustomerFeatures: ...

    async def inferences(self, customer: str, at: AsOf) -> CustomerInferences: ...
