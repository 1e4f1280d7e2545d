"""The one encoding of a sequence chunk, used in frames (changelog) and in the store's sequence log.

MessagePack header with the columns as raw little-endian bytes. Raises StateCorrupt for anything else.

A chunk names the topics and types that it uses, as the config may change while it waits. The numbers in its columns are
those of the config it was written under: a release that wrote no names takes them for places in its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import msgspec
import numpy as np

from node.kernel.errors import StateCorrupt, TopicMissing
from node.kernel.limits import EVENT_TYPES_MAX
from node.kernel.types import NO_NAMES, EventNames, FeatureRows, Ints, ModelName, SequenceChunk, TriggerKind, Triggers


class _Chunk(msgspec.Struct, array_like=True, frozen=True):
    number: int
    tenant: str
    model: str
    version: str
    customers: tuple[str, ...]
    topics: bytes
    offsets: bytes
    types: bytes
    times_ms: bytes
    features: tuple[str, ...]
    numbers: bytes
    texts: dict[str, list[str | None]]
    queued_ms: int = 0
    inputs: tuple[str, ...] = ()
    fresh: bytes = b""
    tables: dict[str, str] = {}
    line: str = ""
    warming: bool = False
    kind: TriggerKind = "event"
    topic_names: dict[int, str] = {}
    type_names: dict[int, str] = {}


_FEW: Final = 200
"""Below so many, a set is quicker than three calls of numpy."""
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Chunk)


def encode_chunk(chunk: SequenceChunk) -> bytes:
    triggers, names = chunk.triggers, chunk.triggers.event_names
    return _encoder.encode(
        _Chunk(
            chunk.number,
            triggers.name.tenant,
            triggers.name.model,
            triggers.version,
            triggers.customers,
            triggers.topics.tobytes(),
            triggers.offsets.tobytes(),
            triggers.types.tobytes(),
            triggers.times_ms.tobytes(),
            triggers.rows.names,
            triggers.rows.numbers.tobytes(),
            dict(triggers.rows.texts),
            chunk.queued_ms,
            triggers.inputs,
            b"" if triggers.fresh is None else triggers.fresh.tobytes(),
            dict(triggers.tables),
            triggers.line,
            triggers.warming,
            triggers.kind,
            _used(triggers.topics, names.topics),
            _used(triggers.types, names.types),
        )
    )


def decode_chunk(data: bytes) -> SequenceChunk:
    try:
        chunk = _decoder.decode(data)
        topics, types = _integers(chunk.topics), _integers(chunk.types)
        names = EventNames(chunk.topic_names, chunk.type_names)
        if names != NO_NAMES:
            _check(topics, types, names)
        numbers = np.frombuffer(chunk.numbers, dtype="<f8").reshape(len(chunk.customers), len(chunk.features))
        rows = FeatureRows(chunk.features, numbers, chunk.texts)
        triggers = Triggers(
            ModelName(chunk.tenant, chunk.model),
            chunk.version,
            chunk.customers,
            topics,
            _integers(chunk.offsets),
            types,
            _integers(chunk.times_ms),
            rows,
            chunk.kind,
            inputs=chunk.inputs,
            fresh=_integers(chunk.fresh) if chunk.inputs else None,
            tables=chunk.tables,
            line=chunk.line,
            warming=chunk.warming,
            event_names=names,
        )
    except (msgspec.MsgspecError, ValueError) as failure:
        raise StateCorrupt(f"a sequence chunk of {len(data)} bytes can't be read: {failure}") from failure
    return SequenceChunk(chunk.number, triggers, chunk.queued_ms)


def with_names(triggers: Triggers, configured: EventNames) -> Triggers:
    """Those of a chunk from before chunks had names have the config's. Raises TopicMissing if it has too few."""
    if triggers.kind != "event" or triggers.event_names != NO_NAMES:
        return triggers
    try:
        _check(triggers.topics, triggers.types, configured)
    except ValueError as failure:
        raise TopicMissing(
            f"triggers of {triggers.name} wait in the sequence log since a release that kept no names with them, and "
            f"{failure}: put [kafka] topics and [events] types back as they were until the log is empty"
        ) from failure
    return replace(triggers, event_names=configured)


def _used(numbers: Ints, names: Mapping[int, str]) -> dict[int, str]:
    return {number: names[number] for number in _distinct(numbers)} if names else {}


def _check(topics: Ints, types: Ints, names: EventNames) -> None:
    """Raises ValueError for a number without a name."""
    for what, numbers, known in (("topic", topics, names.topics), ("type", types, names.types)):
        unknown = [number for number in _distinct(numbers) if number not in known]
        if unknown:
            raise ValueError(f"event {what} {unknown[0]} has no name")


def _distinct(numbers: Ints) -> list[int]:
    """In order. Raises ValueError for what is far from any topic's or type's number."""
    if len(numbers) < _FEW:
        return sorted(set(numbers.tolist()))
    lowest, highest = int(numbers.min()), int(numbers.max())
    if lowest == highest:
        return [lowest]
    if lowest < 0 or highest >= EVENT_TYPES_MAX:
        raise ValueError(f"numbers from {lowest} to {highest} are none of topics or types")
    distinct: list[int] = np.flatnonzero(np.bincount(numbers)).tolist()
    return distinct


def _integers(data: bytes) -> Ints:
    return np.frombuffer(data, dtype="<i8")
