"""The borders between parts, as Protocols. `node.app` is the only place that joins implementations to them."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from node.kernel.backfills import BackfillState
from node.kernel.tables import TableSet
from node.kernel.types import (
    URGENT,
    Aggregate,
    Backfill,
    Bools,
    EventColumns,
    FeatureRows,
    Floats,
    Frame,
    IntervalRun,
    ModelName,
    ModelOutputs,
    ModelSource,
    ModelVersion,
    RowNeeds,
    SequenceChunk,
    StagedVersion,
    StoredOutput,
)


class StateStore(Protocol):
    """One partition's state. `apply` is atomic: rows, sequence log, cursors, progress and offset together.

    Raises StoreUnavailable when the disk refuses, StateCorrupt when what it holds can't be read.
    """

    def load(self, customers: Sequence[bytes]) -> list[bytes | None]:
        """The stored row of each customer (encoded by `node.state.codec`), None where there is none."""
        ...

    def apply(self, frame: Frame, changelog_offset: int) -> None:
        """Fold one committed frame; `changelog_offset` is where the changelog goes on after it."""
        ...

    def changelog_offset(self) -> int:
        """Where the changelog goes on after the last applied frame; 0 for an empty store."""
        ...

    def progress(self) -> Mapping[str, int]:
        """Source topic -> next offset, of the last applied frame; empty for an empty store."""
        ...

    def layout(self) -> bytes | None: ...

    def counters(self) -> Mapping[str, int]: ...

    def runs(self) -> Mapping[str, IntervalRun]:
        """By the text of the model's name."""
        ...

    def event_time_ms(self) -> int:
        """As the newest frame says; 0 for an empty store."""
        ...

    def chunks(self, limit: int, after: tuple[str, int] | None = None) -> list[SequenceChunk]:
        """Up to `limit` unanswered chunks by (model, number), strictly after `after`, so that they need not be held
        all at once."""
        ...

    def chunk(self, model: str, number: int) -> SequenceChunk:
        """One of them. Raises StateCorrupt when it is not there."""
        ...

    def scan(self, after: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        """Up to `limit` (customer, row) pairs in key order, strictly after the customer `after`."""
        ...

    def backfill(self) -> BackfillState:
        """As the last frame that told of it."""
        ...

    def flush(self) -> None:
        """Put everything applied on disk. May run in another thread; no frame is applied meanwhile."""
        ...

    def flush_rows(self) -> None:
        """Put most of what is applied on disk, so that `flush` has little left. May run in another thread while frames
        are applied: after a crash the offset is too old rather than too new."""
        ...

    def checkpoint(self, folder: Path) -> int:
        """Copy the store as of one frame into `folder`, which must not be there; the offset it goes on from.

        May run in another thread while frames are applied. Raises StoreUnavailable, also for a store that is closed
        meanwhile or keeps nothing on disk.
        """
        ...

    def close(self) -> None:
        """May take long, and may run in another thread, once nobody uses the store any more."""

    def statistics(self) -> Mapping[str, object]: ...


class Reads(Protocol):
    """What the compiled features need of one set of events, each column parallel to the events given."""

    def aggregate(self, aggregate: Aggregate) -> Floats: ...

    def stored(self, output: StoredOutput) -> Floats:
        """The stored output as of each event; NaN where there is none or its TTL has passed."""
        ...

    @property
    def tables(self) -> TableSet:
        """The versions that all look-ups for these events see."""
        ...


class FeatureBatch(Protocol):
    """The features of one micro-batch, model after model; what no model's output goes into is computed once."""

    def rows(self, names: Collection[ModelName], reads: Reads) -> Mapping[ModelName, FeatureRows]: ...


class FeaturePlan(Protocol):
    """Every live model's features, compiled together: immutable, swapped between cycles."""

    @property
    def models(self) -> tuple[ModelVersion, ...]: ...

    @property
    def aggregates(self) -> tuple[Aggregate, ...]:
        """What the row layout must hold, sorted, each once."""
        ...

    @property
    def stored_models(self) -> tuple[ModelVersion, ...]:
        """Models whose outputs the row must hold; all live models."""
        ...

    @property
    def needs(self) -> RowNeeds:
        """What rows must hold for its models."""
        ...

    @property
    def reserve(self) -> RowNeeds:
        """What they must go on holding for versions that may run in their place, as after a rollback."""
        ...

    @property
    def inputs(self) -> Mapping[ModelName, tuple[StoredOutput, ...]]:
        """The outputs of other models here that each model uses, sorted; those that use none are left out."""
        ...

    @property
    def histories(self) -> Mapping[ModelName, tuple[Backfill, frozenset[Aggregate]]]:
        """For each model, live or staged (by its key), that asks for history: which, and the aggregates it uses."""
        ...

    @property
    def current(self) -> frozenset[Aggregate]:
        """The aggregates that something uses which asks for no history."""
        ...

    def only(self, names: Collection[ModelName], before: FeaturePlan | None = None) -> FeaturePlan:
        """The plan of some of its models, staged ones by their keys. In place of a live one that is left out, the
        version that `before` has of it goes on; `before` itself where that makes the same plan."""
        ...

    def source(self, version: str) -> ModelSource | None:
        """What the features of a version, live or staged, follow from; None for one that is not here."""
        ...

    def tables(self, name: ModelName) -> tuple[str, ...]:
        """The tables that the model's features read, sorted."""
        ...

    def batch(self, events: EventColumns, selections: Mapping[ModelName, Bools]) -> FeatureBatch:
        """As `rows`, one model after another."""
        ...

    @property
    def staged(self) -> Mapping[ModelName, StagedVersion]:
        """By model: what runs beside its live version. `rows` knows each by its `key`."""
        ...

    def computable(self, wheres: Iterable[str]) -> frozenset[str]:
        """Those filters (`Aggregate.where`), of whatever models, whose fields the schema has, as they use them."""
        ...

    def masks(self, events: EventColumns, wheres: Iterable[str]) -> Mapping[str, Bools]:
        """The mask of each of these filters over all events; one that is not `computable` is left out.

        They need not be of models here: rows go on with the windows of models that were replaced.
        """
        ...

    def rows(
        self, events: EventColumns, reads: Reads, selections: Mapping[ModelName, Bools]
    ) -> dict[ModelName, FeatureRows]:
        """Each model's feature rows for the events its selection names (a mask over `events`).

        A feature that several models share is computed once.
        """
        ...


class ModelRunner(Protocol):
    """Runs models somewhere else, under fair shares. Every submission ends in outputs, sooner or later."""

    def submit(self, version: ModelVersion, rows: FeatureRows, priority: int = URGENT) -> Awaitable[ModelOutputs]:
        """Queue rows, URGENT or BACKGROUND; the awaitable gives one output row or one error for each.

        Raises BoundExceeded when the tenant's queue is full: the caller keeps the rows in the sequence log.
        """
        ...

    def rows_queued_max(self, name: ModelName) -> int: ...


class Shadows(Protocol):
    """Calls shadows, once the live version has answered."""

    def follow(self, staged: StagedVersion, rows: FeatureRows, live: Future[ModelOutputs] | None) -> None:
        """`rows` are the shadow's own for the triggers that `live` answers; None: these were not asked for yet, so
        they are not compared. Never waits, never raises."""
        ...
