"""(P) Frames as changelog records: encode, split into parts, put together again.

A record is `magic, part, parts` and a piece of the compressed body. All parts of a frame are adjacent
records of one partition, so a reader needs no index: part 0 starts a frame and drops an unfinished one
(left behind where a writer without transactions died between two parts).
"""

from __future__ import annotations

import struct

import cramjam
import msgspec
import numpy as np

from node.kernel.backfills import decode_backfill, encode_backfill
from node.kernel.chunks import decode_chunk, encode_chunk
from node.kernel.errors import BoundExceeded, FrameCorrupt, StateCorrupt
from node.kernel.interval_runs import decode_run, encode_run
from node.kernel.limits import FRAME_BYTES_MAX, FRAME_PARTS_MAX, RECORD_BYTES_MAX
from node.kernel.types import Frame

_MAGIC = b"HRF1"
_PART = struct.Struct("<4sIIQ")
"""magic, part, parts, bytes of the body before compression."""


class _Body(msgspec.Struct, array_like=True, frozen=True):
    progress: dict[str, int]
    layout_id: int
    layout: bytes | None
    slots: int
    customers: list[bytes]
    rows: bytes
    appended: list[bytes]
    cursors: dict[str, int]
    counters: dict[str, int]
    runs: dict[str, bytes | None] = {}
    event_time_ms: int = 0
    backfill: bytes | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Body)


def encode_frame(frame: Frame, record_bytes_max: int = RECORD_BYTES_MAX) -> list[bytes]:
    """The frame as changelog records, each at most `record_bytes_max` bytes, in order.

    Raises BoundExceeded when it needs more than FRAME_PARTS_MAX records or FRAME_BYTES_MAX bytes.
    """
    body = _encoder.encode(
        _Body(
            dict(frame.progress),
            frame.layout_id,
            frame.layout,
            frame.rows.shape[1] if frame.rows.ndim == 2 else 0,
            list(frame.customers),
            frame.rows.astype("<f8", copy=False).tobytes(),
            [encode_chunk(chunk) for chunk in frame.appended],
            dict(frame.cursors),
            dict(frame.counters),
            {model: None if run is None else encode_run(run) for model, run in frame.runs.items()},
            frame.event_time_ms,
            None if frame.backfill is None else encode_backfill(frame.backfill),
        )
    )
    if len(body) > FRAME_BYTES_MAX:
        raise BoundExceeded(f"a frame of {len(body)} bytes is over FRAME_BYTES_MAX; lower [cycle] events_max")
    packed = bytes(cramjam.lz4.compress_block(body, store_size=False))
    room = record_bytes_max - _PART.size
    parts = max(1, -(-len(packed) // room))
    if parts > FRAME_PARTS_MAX:
        raise BoundExceeded(f"a frame needs {parts} records, over FRAME_PARTS_MAX; lower [cycle] events_max")
    return [
        _PART.pack(_MAGIC, part, parts, len(body)) + packed[part * room : (part + 1) * room] for part in range(parts)
    ]


class FrameAssembler:
    """Puts records back together. Holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._expected = 0
        self._body_bytes = 0

    def add(self, record: bytes | None) -> Frame | None:
        """The frame that `record` completes, None while parts are missing.

        Raises FrameCorrupt when the record is not of this format or does not follow the one before it.
        """
        part, parts, body_bytes, piece = _split(record)
        if part == 0:
            self._parts = []
            self._expected, self._body_bytes = parts, body_bytes
        elif part != len(self._parts) or parts != self._expected or body_bytes != self._body_bytes:
            raise FrameCorrupt(f"changelog record is part {part} of {parts}, part {len(self._parts)} was due")
        self._parts.append(piece)
        if len(self._parts) < self._expected:
            return None
        packed, self._parts = b"".join(self._parts), []
        return _decode_body(packed, self._body_bytes)


def _split(record: bytes | None) -> tuple[int, int, int, bytes]:
    if record is None or len(record) < _PART.size:
        raise FrameCorrupt("changelog record is shorter than a frame's header")
    magic, part, parts, body_bytes = _PART.unpack_from(record)
    if magic != _MAGIC:
        raise FrameCorrupt(f"changelog record starts with {magic!r}, not with {_MAGIC!r}")
    if not 0 < parts <= FRAME_PARTS_MAX or part >= parts or body_bytes > FRAME_BYTES_MAX:
        raise FrameCorrupt(f"changelog record says part {part} of {parts}, {body_bytes} bytes")
    return part, parts, body_bytes, record[_PART.size :]


def _decode_body(packed: bytes, body_bytes: int) -> Frame:
    try:
        body = _decoder.decode(bytes(cramjam.lz4.decompress_block(packed, output_len=body_bytes)))
        rows = np.frombuffer(body.rows, dtype="<f8").reshape(len(body.customers), body.slots)
        appended = [decode_chunk(chunk) for chunk in body.appended]
        runs = {model: None if run is None else decode_run(run) for model, run in body.runs.items()}
        backfill = None if body.backfill is None else decode_backfill(body.backfill)
    except (cramjam.DecompressionError, msgspec.MsgspecError, ValueError, StateCorrupt) as failure:
        raise FrameCorrupt(f"a frame of {len(packed)} bytes can't be read: {failure}") from failure
    return Frame(
        body.progress,
        body.layout_id,
        body.customers,
        rows,
        body.layout,
        appended,
        body.cursors,
        body.counters,
        runs,
        body.event_time_ms,
        backfill,
    )
