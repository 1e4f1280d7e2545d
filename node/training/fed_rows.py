"""(P) Records of the rows topic: what one model was fed and gave in one commit, by columns, and what versions mean.

MessagePack with the columns as raw little-endian bytes: a copy of memory for each column, where JSON would cost more
than all else of a row, and what is read is what the model was fed, bit for bit. The key of a record is its model's
name, so a reader skips the records of others unread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from node.kernel.errors import StateCorrupt
from node.kernel.types import (
    EventNames,
    FeatureRows,
    Floats,
    Ints,
    ModelName,
    ModelOutputs,
    ModelSource,
    ModelVersion,
    TriggerKind,
    Triggers,
)

_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class FedRows:
    """One model's triggers that were answered in one commit of a partition.

    `commit` counts the partition's commits. `version` has answered: `triggers.version` unless the model fell back from
    that one. `marks`, of an interval run: how many events each customer had.
    """

    commit: int
    triggers: Triggers
    version: ModelVersion
    outputs: ModelOutputs
    marks: Floats | None = None

    def __len__(self) -> int:
        return len(self.triggers)


@dataclass(frozen=True, slots=True)
class Described:
    """What a version's rows follow from, from the record's place in the topic on."""

    name: ModelName
    version: str
    source: ModelSource


class _Rows(msgspec.Struct, array_like=True, frozen=True, tag="rows"):
    format: int
    commit: int
    tenant: str
    model: str
    version: str
    answered_by: str
    kind: TriggerKind
    customers: tuple[str, ...]
    topic_names: tuple[str, ...]
    topics: bytes
    offsets: bytes
    type_names: tuple[str, ...]
    types: bytes
    times_ms: bytes
    features: tuple[str, ...]
    numbers: bytes
    texts: dict[str, list[str | None]]
    outputs: tuple[str, ...]
    labels: tuple[str, ...]
    values: bytes
    errors: dict[int, str]
    inputs: tuple[str, ...]
    fresh: bytes
    tables: dict[str, str]
    marks: bytes


class _Described(msgspec.Struct, array_like=True, frozen=True, tag="version"):
    format: int
    tenant: str
    model: str
    version: str
    source: ModelSource


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Rows | _Described)


def encode_rows(rows: FedRows) -> bytes:
    triggers = rows.triggers
    topics, topic_names = _named(triggers.topics, triggers.event_names.topics)
    types, type_names = _named(triggers.types, triggers.event_names.types)
    return _encoder.encode(
        _Rows(
            _FORMAT,
            rows.commit,
            triggers.name.tenant,
            triggers.name.model,
            triggers.version,
            rows.version.version,
            triggers.kind,
            triggers.customers,
            topic_names,
            topics,
            triggers.offsets.tobytes(),
            type_names,
            types,
            triggers.times_ms.tobytes(),
            triggers.rows.names,
            triggers.rows.numbers.tobytes(),
            dict(triggers.rows.texts),
            rows.version.outputs,
            rows.version.labels,
            rows.outputs.values.tobytes(),
            dict(rows.outputs.errors),
            triggers.inputs,
            b"" if triggers.fresh is None else triggers.fresh.tobytes(),
            dict(triggers.tables),
            b"" if rows.marks is None else rows.marks.tobytes(),
        )
    )


def encode_described(described: Described) -> bytes:
    name = described.name
    return _encoder.encode(_Described(_FORMAT, name.tenant, name.model, described.version, described.source))


def decode(data: bytes) -> FedRows | Described:
    """Raises StateCorrupt for anything that is no such record."""
    try:
        found = _decoder.decode(data)
        if found.format != _FORMAT:
            raise ValueError(f"it is of format {found.format}, this node reads format {_FORMAT}")
        if isinstance(found, _Described):
            return Described(ModelName(found.tenant, found.model), found.version, found.source)
        return _rows(found)
    except (msgspec.MsgspecError, ValueError) as failure:
        raise StateCorrupt(f"a record of the rows topic, {len(data)} bytes, can't be read: {failure}") from failure


def _rows(found: _Rows) -> FedRows:
    name, count = ModelName(found.tenant, found.model), len(found.customers)
    numbers = _floats(found.numbers).reshape(count, len(found.features))
    triggers = Triggers(
        name,
        found.version,
        found.customers,
        _integers(found.topics),
        _integers(found.offsets),
        _integers(found.types),
        _integers(found.times_ms),
        FeatureRows(found.features, numbers, found.texts),
        found.kind,
        found.inputs,
        _integers(found.fresh) if found.inputs else None,
        found.tables,
        event_names=EventNames.of(found.topic_names, found.type_names),
    )
    version = ModelVersion(
        name, found.answered_by, "", (), found.features, found.outputs, "", 0, 0, labels=found.labels
    )
    outputs = ModelOutputs(_floats(found.values).reshape(count, len(found.outputs)), found.errors)
    marks = _floats(found.marks) if found.marks else None
    return FedRows(found.commit, triggers, version, outputs, marks)


def _named(codes: Ints, names: Mapping[int, str]) -> tuple[bytes, tuple[str, ...]]:
    """The codes as places among those names that occur: a reader need not have this node's config."""
    if not names:  # of no event
        return codes.tobytes(), ()
    present, places = np.unique(codes, return_inverse=True)
    return places.astype("<i8").tobytes(), tuple(names[code] for code in present.tolist())


def _integers(data: bytes) -> Ints:
    return np.frombuffer(data, dtype="<i8")


def _floats(data: bytes) -> Floats:
    return np.frombuffer(data, dtype="<f8")


def event_ids(rows: FedRows, partition: int) -> list[str]:
    """The id of each row's inference, as in the inferences topic."""
    triggers = rows.triggers
    if triggers.kind != "event":
        head, times = f"{triggers.name}/{triggers.kind}", triggers.moments.tolist()
        return [f"{head}/{time}/{one}" for time, one in zip(times, triggers.customers, strict=True)]
    return [
        f"{triggers.name}/{triggers.event_names.topics[topic]}/{partition}/{offset}"
        for topic, offset in zip(triggers.topics.tolist(), triggers.offsets.tolist(), strict=True)
    ]
