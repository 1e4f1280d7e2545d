"""The vocabulary that node, replication and tenants share.

Everything here is data: frozen where it crosses a task or process border, columns where it is hot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from node.kernel.backfills import BackfillState

if TYPE_CHECKING:
    from node.kernel.tables import TableSchema

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Texts: TypeAlias = NDArray[np.object_]
"""str, or None where missing."""
Column: TypeAlias = Floats | Texts

FieldType: TypeAlias = Literal["number", "text", "boolean"]
"""Booleans travel as float64 0.0 and 1.0; a missing number or boolean is NaN, a missing text None."""

AggregateFunction: TypeAlias = Literal[
    "count", "sum", "mean", "min", "max", "std", "last", "first", "distinct", "since"
]

ANY_EVENT = "*"
"""The event name that stands for events of every type."""

EVENT_TIME = "time"
"""The pseudo-field every event has: its own time, in seconds since the Unix epoch, as a number."""


@dataclass(frozen=True, slots=True, order=True)
class Aggregate:
    """One reduction over a customer's events, kept in the customer's row.

    `window_ms` 0 means for ever, below 0 the customer's session with that gap. `where` is the canonical text of a
    filter over the event's fields
    ('' for none); its mask comes from `FeaturePlan.masks`. The value is as of an event's own time and
    includes that event, except for `since`: the seconds from the previous event of the type.
    """

    function: AggregateFunction
    event: str
    field: str = ""
    window_ms: int = 0
    """0: for ever (kept an int so that aggregates sort); -gap: the session, of events at most the gap apart."""
    where: str = ""

    def __str__(self) -> str:
        subject = f"{self.event}.{self.field}" if self.field else self.event
        window = f", {self.window_ms}ms" if self.window_ms > 0 else ""
        window = f", session={-self.window_ms}ms" if self.window_ms < 0 else window
        where = f", where={self.where}" if self.where else ""
        return f"{self.function}({subject}{window}{where})"


def session_newest(gap_ms: int) -> Aggregate:
    """The time of the newest event of a customer's session: every row with sessions of that gap holds it."""
    return Aggregate("max", ANY_EVENT, EVENT_TIME, -gap_ms)


@dataclass(frozen=True, slots=True, order=True)
class ModelName:
    tenant: str
    model: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.model}"


OTHER = "_other"
"""What is beyond a bound is added up under this name; no tenant and no model can have it."""


@dataclass(frozen=True, slots=True, order=True)
class StoredOutput:
    """One output of one model, as it is kept in the customer's row: `models.<tenant>.<model>.<output>`."""

    name: ModelName
    output: str

    def __str__(self) -> str:
        return f"models.{self.name.tenant}.{self.name.model}.{self.output}"


@dataclass(frozen=True, slots=True)
class RowNeeds:
    """What customers' rows must go on holding: of models that run, and of versions that may in their place."""

    aggregates: frozenset[Aggregate] = frozenset()
    outputs: frozenset[StoredOutput] = frozenset()

    @property
    def models(self) -> frozenset[ModelName]:
        return frozenset(output.name for output in self.outputs)

    def __or__(self, other: RowNeeds) -> RowNeeds:
        return RowNeeds(self.aggregates | other.aggregates, self.outputs | other.outputs)


@dataclass(frozen=True, slots=True)
class EventSchema:
    """What the operator declared of the events: all that a manifest may name."""

    types: tuple[str, ...]
    fields: Mapping[str, FieldType]
    """Field name -> type; a field that an event lacks is missing (NaN or None), not an error."""
    profile: Mapping[str, str] = field(default_factory=dict)
    """Shared profile values: name -> aggregate expression, used in manifests as `profile.<name>`."""
    tables: Mapping[str, TableSchema] = field(default_factory=dict)
    """The tables there are now: on a running node this follows what is agreed."""


@dataclass(slots=True)
class EventColumns:
    """A micro-batch of `n` decoded events of one partition, in arrival order.

    `rows[i]` is the position of event i's customer in `customers` (each customer once, in order of first
    appearance). `types[i]` indexes `EventSchema.types`; `topics[i]` the configured source topics.
    """

    types: Ints
    times_ms: Ints
    rows: Ints
    customers: list[str]
    topics: Ints
    offsets: Ints
    fields: Mapping[str, Column]

    def __len__(self) -> int:
        return len(self.types)


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """The rows one model is called with: `names` in the model's column order.

    `numbers` has shape [rows, len(names)], float64, C order; a text feature's column there is NaN and its
    values are in `texts` by name (None where missing).
    """

    names: tuple[str, ...]
    numbers: Floats
    texts: Mapping[str, list[str | None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, selection: slice) -> FeatureRows:
        """The rows of `selection`, without a copy of the numbers."""
        return FeatureRows(
            self.names, self.numbers[selection], {name: column[selection] for name, column in self.texts.items()}
        )


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """What a call gave: `values` is float64 [rows, outputs]; `errors` maps a row that failed to the reason."""

    values: Floats
    errors: Mapping[int, str] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    call_seconds: float = 0.0
    """Of the longest call that gave them, by the clock."""


OverloadPolicy: TypeAlias = Literal["shed_oldest", "shed_newest", "latest_per_customer"]
"""What of a model's waiting triggers goes when it falls behind: the oldest or the newest once the bound is reached, or
all but each customer's newest at once, and then the oldest."""


URGENT = 0
BACKGROUND = 1
"""Priorities of rows: background ones go by what urgent rows of the same tenant leave, and a little."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When an interval model runs: at each multiple of `every_ms` since the Unix epoch; where that is 0, each day
    `at_ms` after midnight in `zone`.

    `by_event`: by the time of the partition's events instead of the clock, once they are `grace_ms` past the end of the
    interval. `whole`: over all customers, not only those with events since the last run.
    """

    every_ms: int = 0
    at_ms: int = 0
    zone: str = "UTC"
    by_event: bool = False
    grace_ms: int = 0
    whole: bool = False
    gap_ms: int = 0
    """Above 0: the model runs once for each session of this gap that has closed instead, of those that had by the end
    of an interval."""


@dataclass(frozen=True, slots=True)
class IntervalRun:
    """How far one interval model has come in one partition, as frames and the store hold it.

    `number` counts the intervals of `schedule`, `due_ms` is the end of this one. Customers up to `cursor`, in the order
    of their bytes, are done. `version` is what it began with, '' where the model was only seen: its first run is of the
    next interval.
    """

    schedule: Schedule
    number: int
    due_ms: int
    version: str = ""
    whole: bool = True
    finished: bool = True
    late: bool = False
    """It was not finished when the next interval had ended."""
    cursor: bytes = b""
    rows: int = 0
    """Customers it has run over so far."""
    since_ms: int = 0
    """The end of the interval in which the model was first seen with this schedule."""


@dataclass(frozen=True, slots=True)
class Backfill:
    """The history that a model's windows are filled from: the last `back_ms`, or from `since_ms` (Kafka time) on; both
    0: all there is. `hold`: the model is not run until they are; else its inferences are marked as warming."""

    back_ms: int = 0
    since_ms: int = 0
    hold: bool = False

    def wanted_ms(self, now_ms: int) -> int:
        """From when on, asked at `now_ms`."""
        return max(1, now_ms - self.back_ms) if self.back_ms else self.since_ms


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One immutable version of a model, as the cycle and the pool need it.

    `version` is the sha256 (hex) of the model file and its manifest together; `blob` that of the file.
    `labels` names the classes when `method` is predict and they are texts: the output is then their index.
    """

    name: ModelName
    version: str
    blob: str
    events: tuple[str, ...]
    features: tuple[str, ...]
    """Feature names in the model's column order."""
    outputs: tuple[str, ...]
    method: str
    ttl_ms: int
    """Of the stored inference, by event time; 0: never expires."""
    deadline_ms: int
    """Bound on one call in the worker; a call past it kills the worker."""
    labels: tuple[str, ...] = ()
    weight: float = 1.0
    schedule: Schedule | None = None
    """Of an interval model, which has no `events`."""
    log_rows: float = 0.0
    """The share of customers whose rows are kept as training data, with the outputs."""
    backfill: Backfill | None = None
    """The history that its windows are to be filled from."""

    @property
    def short_version(self) -> str:
        """The first 12 hex digits: 48 bits, so it fits a float64 slot exactly."""
        return self.version[:12]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What the features of one version follow from, for somebody who computes them elsewhere."""

    manifest: str
    definitions: Mapping[str, str]
    """Tenant -> its features.toml, of all that were in force."""
    inputs: Mapping[str, tuple[tuple[str, ...], int]]
    """By the text of its name, each other model whose outputs it uses -> its outputs, and their time to live in ms."""


StageKind: TypeAlias = Literal["shadow", "canary"]


@dataclass(frozen=True, slots=True)
class StagedVersion:
    """A version that runs beside its model's live one.

    A shadow is called for the live one's triggers, and its outputs are compared and dropped. A canary answers the
    triggers of some customers in place of the live one.
    """

    version: ModelVersion
    kind: StageKind
    share: float = 0.0
    """Of customers, that a canary serves: the same ones on every node, by hash."""

    @property
    def key(self) -> ModelName:
        """What a feature plan calls it beside the live one: no model's name, as none has an '@'."""
        return ModelName(self.version.name.tenant, f"{self.version.name.model}@{self.version.short_version}")


@dataclass(frozen=True, slots=True)
class StageChange:
    """One change of what runs of a model: `version` became `to`, when, by whom and why."""

    at_ms: int
    version: str
    to: str
    """live, shadow, canary, retired, quarantined, or deleted."""
    who: str
    """`auto`, the node in whose directory it was found, or an operator."""
    reason: str = ""


TriggerKind: TypeAlias = Literal["event", "interval", "session"]


@dataclass(frozen=True, slots=True)
class EventNames:
    """What the numbers of source topics and event types stand for: number -> name."""

    topics: Mapping[int, str] = field(default_factory=dict)
    types: Mapping[int, str] = field(default_factory=dict)

    @staticmethod
    def of(topics: Sequence[str], types: Sequence[str]) -> EventNames:
        """Numbered by their places in the lists, as a config has them."""
        return EventNames(dict(enumerate(topics)), dict(enumerate(types)))


NO_NAMES: Final = EventNames()


@dataclass(frozen=True, slots=True)
class Triggers:
    """The triggers of one model in one micro-batch: parallel columns, one entry a trigger.

    Those of an interval are of no event: `times_ms` is the interval's end, the other integers say nothing. Nor are
    those of closed sessions: `times_ms` is the session's newest event's, `offsets` that of the event that began it.
    `topics` and `types` are numbers in `event_names`, whatever the config says when the model answers.
    """

    name: ModelName
    version: str
    customers: tuple[str, ...]
    topics: Ints
    offsets: Ints
    types: Ints
    times_ms: Ints
    rows: FeatureRows
    kind: TriggerKind = "event"
    inputs: tuple[str, ...] = ()
    """Other models' outputs that went into the rows, such as `models.ads.bid.score`."""
    fresh: Ints | None = None
    """Which of the inputs were of the same event, bit i of input i; the others were stored before. None: no inputs."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """The version of each table that the rows were computed with."""
    line: str = ""
    """Which line of the model's they wait in, should they have to: '' or the short version of a canary, which must not
    hold up the live one."""
    warming: bool = False
    """Some window that went into the rows is not filled from history yet, as the manifest asks for."""
    event_names: EventNames = NO_NAMES
    """Of those of events."""

    def __len__(self) -> int:
        return len(self.customers)

    @property
    def moments(self) -> Ints:
        """Of those without an event, what tells a customer's apart: ends of intervals, or when sessions began."""
        return self.offsets if self.kind == "session" else self.times_ms

    @property
    def line_name(self) -> str:
        """The key of the line in frames and stores: unlike any other line's, as no model's name has an '@'."""
        return f"{self.name}@{self.line}" if self.line else str(self.name)


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """Triggers that missed their commit, kept until the model has answered: one entry of the sequence log.

    `number` rises by one for each chunk of a line in a partition; the line's cursor is the number of
    its oldest unanswered chunk.
    """

    number: int
    triggers: Triggers
    queued_ms: int = 0
    """When they were first queued, by the node's clock; 0: not known."""


@dataclass(frozen=True, slots=True)
class Frame:
    """All that one cycle changed in one partition; committed as one changelog entry, applied as one batch.

    `rows` holds whole row images, float64 [len(customers), slots], under `layout_id`, so folding a frame
    twice gives the same store. `layout` is the encoded definition, present whenever it may be new to a
    reader of this changelog. `cursors` gives, for each model named, the number of its oldest chunk to keep.
    `counters` are running totals of the partition (late, shed, dead letters…), so they survive a restart. `runs` gives
    the interval runs that went on, by the text of the model's name; None: forgotten. `event_time_ms` is the time by
    the partition's events: the newest's, but no later than its owner's clock allowed when it came. `backfill`, where it
    changed, is how far windows are filled from history.
    """

    progress: Mapping[str, int]
    """Source topic -> next offset to read."""
    layout_id: int
    customers: Sequence[bytes]
    rows: Floats
    layout: bytes | None = None
    appended: Sequence[SequenceChunk] = ()
    cursors: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    runs: Mapping[str, IntervalRun | None] = field(default_factory=dict)
    event_time_ms: int = 0
    backfill: BackfillState | None = None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that can't be used, whole, with the reason and where it came from."""

    reason: str
    detail: str
    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    model: str = ""
    """Set when an event was good and a model failed on it."""


@dataclass(frozen=True, slots=True)
class AgreedVersion:
    """A version of a model as the whole cluster knows it. `report` is what its trial found, as its trier wrote it."""

    name: ModelName
    version: str
    blob: str
    manifest: str
    report: str
    state: Literal["passed", "staged", "live", "retired", "quarantined"]
    here: bool
    """Whether this node has the model file and has verified it."""
    fallback: bool = False
    """Whether it is live again once the live one fails."""
    reason: str = ""
    """Why it is in its state, as whoever brought it there said."""
    stage: int = 0
    """Which of its manifest's stages it is in, while it is staged."""
    who: str = ""
    at_ms: int = 0
    put: int = 0
    """The catalog's revision that put it last."""


QUOTAS: Final = ("weight", "memory_mb", "rows_s_max", "models_max", "stored_bytes_max", "window_bytes_max")
"""What an operator may set for one tenant: names of limits in its `tenant.toml`."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What an operator allows one tenant in place of what [tenants] allows all; None: that holds.

    `rows_s_max` is rows a second on each node, 0: any number. `stored_bytes_max` and `window_bytes_max` are of each
    customer's row.
    """

    weight: float | None = None
    memory_mb: int | None = None
    rows_s_max: float | None = None
    models_max: int | None = None
    stored_bytes_max: int | None = None
    window_bytes_max: int | None = None
    who: str = ""
    at_ms: int = 0
    """Who set it last, and when."""

    def limits(self) -> dict[str, float]:
        """What is set, by the names of QUOTAS."""
        said = {name: getattr(self, name) for name in QUOTAS}
        return {name: value for name, value in said.items() if value is not None}

    def changed(self, changes: Mapping[str, float | None], who: str, at_ms: int) -> Quota:
        """With other values for the names in `changes`; None: what holds for all."""
        return replace(self, who=who, at_ms=at_ms, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class AgreedModels:
    """What the catalog says of tenants and models at one revision; the same on every node but for `here`."""

    revision: int
    versions: tuple[AgreedVersion, ...] = ()
    tenants: Mapping[str, str] = field(default_factory=dict)
    """Tenant -> its settings, as the node that read its tenant.toml wrote them."""
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """Tenant -> what operators allow it."""
    features: Mapping[str, str] = field(default_factory=dict)
    """Tenant -> its features.toml; those without one are left out."""
    histories: Mapping[ModelName, tuple[StageChange, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReplicaProgress:
    """What a node says of one partition it holds on disk, as owner or standby.

    `offset` is where the changelog goes on after what was folded. The lag is 0 for an owner that serves, else against
    the end that the broker told of last: `frames_behind` is at most too high for that, and `ms_behind` is the time
    since the end was seen to be reached, 0 if that was within STANDBY_PROOF_MS_MAX.
    """

    offset: int
    frames_behind: int
    ms_behind: int
    serving: bool = False
    """The owner has it open."""
    released_revision: int = 0
    """The owner has closed it for the move that it saw in the assignment of this revision."""


Statistics: TypeAlias = Mapping[str, Any]
