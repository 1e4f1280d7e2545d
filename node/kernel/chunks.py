"""The one encoding of a sequence chunk, used in frames (changelog) and in the store's sequence log.

MessagePack header with the columns as raw little-endian bytes. Raises StateCorrupt for anything else.
"""

from __future__ import annotations

import msgspec
import numpy as np

from node.kernel.errors import StateCorrupt
from node.kernel.types import FeatureRows, Ints, ModelName, SequenceChunk, TriggerKind, Triggers


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


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Chunk)


def encode_chunk(chunk: SequenceChunk) -> bytes:
    triggers = chunk.triggers
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
        )
    )


def decode_chunk(data: bytes) -> SequenceChunk:
    try:
        chunk = _decoder.decode(data)
        numbers = np.frombuffer(chunk.numbers, dtype="<f8").reshape(len(chunk.customers), len(chunk.features))
        rows = FeatureRows(chunk.features, numbers, chunk.texts)
        triggers = Triggers(
            ModelName(chunk.tenant, chunk.model),
            chunk.version,
            chunk.customers,
            _integers(chunk.topics),
            _integers(chunk.offsets),
            _integers(chunk.types),
            _integers(chunk.times_ms),
            rows,
            chunk.kind,
            inputs=chunk.inputs,
            fresh=_integers(chunk.fresh) if chunk.inputs else None,
            tables=chunk.tables,
            line=chunk.line,
            warming=chunk.warming,
        )
    except (msgspec.MsgspecError, ValueError) as failure:
        raise StateCorrupt(f"a sequence chunk of {len(data)} bytes can't be read: {failure}") from failure
    return SequenceChunk(chunk.number, triggers, chunk.queued_ms)


def _integers(data: bytes) -> Ints:
    return np.frombuffer(data, dtype="<i8")
