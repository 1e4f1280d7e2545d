"""(P) How far windows are filled from history, as frames and the store hold it, and the one encoding of that.

Windows that are filled are groups of the row layout of their own, which events pass by until they are `done`: see
`node.backfilling`. A group goes by its number, which no other group of the layout ever has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from node.kernel.errors import StateCorrupt


@dataclass(frozen=True, slots=True)
class Fill:
    """The history of some groups of windows, read from the source topics.

    `progress`: topic -> next offset to take; empty until the first are looked up. `starts`: where it began.
    """

    groups: tuple[int, ...]
    since_ms: int
    """Kafka time of the history wanted; 0: all there is."""
    floor_ms: int = 0
    """Kafka time of the oldest record kept, where that was later than wanted; else 0."""
    starts: Mapping[str, int] = field(default_factory=dict)
    progress: Mapping[str, int] = field(default_factory=dict)
    events: int = 0
    lost: int = 0
    """Offsets that retention took away before they were read."""
    lapsed: tuple[str, ...] = ()
    """Filters whose fields were not declared for a while, sorted: events have passed by their windows."""
    done: bool = False


@dataclass(frozen=True, slots=True)
class BackfillState:
    fills: tuple[Fill, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(BackfillState)


def encode_backfill(state: BackfillState) -> bytes:
    return _encoder.encode(state)


def decode_backfill(data: bytes) -> BackfillState:
    """Raises StateCorrupt for anything else."""
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as failure:
        raise StateCorrupt(f"the state of a backfill, {len(data)} bytes, can't be read: {failure}") from failure
