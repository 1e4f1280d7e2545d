"""(P) What the node and a worker say to each other: frames of two lengths, a msgpack header and raw bytes.

A frame is `<header bytes: u32><body bytes: u32><header><body>`. The header is one of the structs below; the body
is a model file, or float64 columns in C order. Neither side unpickles anything that arrives here, and the node
takes an answer only inside the bound it stated for it: a worker may be in an attacker's hands.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np

from node.kernel.errors import BoundExceeded, HeadraceError
from node.kernel.limits import (
    LABEL_BYTES_MAX,
    LABELS_BYTES_MAX,
    OUTPUTS_PER_MODEL_MAX,
    ROWS_QUEUED_PER_MODEL_MAX,
    WORKER_MESSAGE_BYTES_MAX,
)
from node.kernel.types import FeatureRows, Floats
from tenants.wording import shown

PREFIX = struct.Struct("<II")
HEADER_BYTES_MAX = 64 * 1024 * 1024
"""Text columns travel in the header."""
REASON_CHARACTERS_MAX = 500
ROW_REASON_CHARACTERS_MAX = 120
CLASS_NAME_CHARACTERS_MAX = 200
NOTES_MAX = 8
FLOAT_BYTES = 8

Buffer: TypeAlias = bytes | bytearray | memoryview


class MessageCorrupt(HeadraceError):
    """The other side sent what is not a message of this protocol; a worker that does so is killed."""


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Unpickle the body and try it. `features` and `outputs` are the manifest's names, in order."""

    version: str
    method: str
    features: tuple[str, ...]
    outputs: tuple[str, ...]
    text_features: tuple[str, ...] = ()


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    version: str


class Call(msgspec.Struct, frozen=True, tag="call"):
    """Run a loaded model; the body is float64 [rows, columns]."""

    version: str
    rows: int
    columns: int
    texts: dict[str, list[str | None]] = {}


Request: TypeAlias = Load | Unload | Call


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The first message of a worker: which layers of the sandbox are in force, and what the others lack."""

    layers: tuple[str, ...]
    missing: dict[str, str]


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    feature_names: tuple[str, ...] | None
    feature_count: int | None
    outputs: int
    labels: tuple[str, ...]
    seconds_per_row: float
    seconds_per_call: float
    memory_bytes: int
    class_name: str
    notes: tuple[str, ...] = ()


class Unloaded(msgspec.Struct, frozen=True, tag="unloaded"):
    pass


class Called(msgspec.Struct, frozen=True, tag="called"):
    """The body is float64 [rows, outputs]; `errors` maps a row without a usable output to the reason."""

    rows: int
    outputs: int
    cpu_seconds: float
    errors: dict[int, str] = {}


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A request that this model, or this sandbox, can't serve; the reason is meant for people."""

    reason: str


Answer: TypeAlias = Ready | Loaded | Unloaded | Called | Refused


@dataclass(frozen=True, slots=True)
class Lengths:
    header_bytes: int
    body_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.header_bytes + self.body_bytes


_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)

_Message = TypeVar("_Message", Request, Answer)


def encode(message: Request | Answer, body: Buffer = b"") -> list[Buffer]:
    """The buffers of one frame, to be written in order; the body is not copied.

    Raises BoundExceeded when the frame is over its bound.
    """
    header = _encoder.encode(message)
    body_bytes = memoryview(body).nbytes
    if len(header) > HEADER_BYTES_MAX or len(header) + body_bytes > WORKER_MESSAGE_BYTES_MAX:
        raise BoundExceeded(
            f"a message of {len(header)} + {body_bytes} bytes is over the bound WORKER_MESSAGE_BYTES_MAX; send less"
        )
    return (
        [PREFIX.pack(len(header), body_bytes) + header, body] if body_bytes else [PREFIX.pack(len(header), 0) + header]
    )


def lengths(prefix: Buffer, total_bytes_max: int = WORKER_MESSAGE_BYTES_MAX) -> Lengths:
    """What a frame's first PREFIX.size bytes announce. Raises MessageCorrupt when that is over the bound."""
    header_bytes, body_bytes = PREFIX.unpack(prefix)
    if not 0 < header_bytes <= HEADER_BYTES_MAX or header_bytes + body_bytes > total_bytes_max:
        raise MessageCorrupt(
            f"a message announces {header_bytes} + {body_bytes} bytes; at most {total_bytes_max} were expected"
        )
    return Lengths(header_bytes, body_bytes)


def decode_request(frame: memoryview, header_bytes: int) -> tuple[Request, memoryview]:
    """The header and the body of a frame without its prefix. Raises MessageCorrupt."""
    try:
        return _requests.decode(frame[:header_bytes]), frame[header_bytes:]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageCorrupt(f"a request to a worker can't be read: {error}") from error


def decode_answer(frame: memoryview, header_bytes: int) -> tuple[Answer, memoryview]:
    """The header and the body of a frame without its prefix. Raises MessageCorrupt."""
    try:
        return _answers.decode(frame[:header_bytes]), frame[header_bytes:]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageCorrupt(f"an answer of a worker can't be read: {error}") from error


def encode_call(version: str, rows: FeatureRows) -> list[Buffer]:
    """The frame of a call. Raises BoundExceeded when the rows are more, or their texts other, than it may hold."""
    _check_call(rows)
    numbers = np.ascontiguousarray(rows.numbers, dtype=np.float64)
    call = Call(
        version, numbers.shape[0], numbers.shape[1], {name: list(column) for name, column in rows.texts.items()}
    )
    return encode(call, numbers.reshape(-1).view(np.uint8).data)


def _check_call(rows: FeatureRows) -> None:
    if len(rows) > ROWS_QUEUED_PER_MODEL_MAX:
        raise BoundExceeded(f"a call of {len(rows)} rows is over ROWS_QUEUED_PER_MODEL_MAX; send smaller batches")
    for name, column in rows.texts.items():
        if len(column) != len(rows):
            raise BoundExceeded(f"text column {name!r} has {len(column)} values for {len(rows)} rows")


def call_answer_bytes_max(rows: int) -> int:
    """The largest honest answer to a call with that many rows."""
    row_bytes = OUTPUTS_PER_MODEL_MAX * FLOAT_BYTES + 4 * ROW_REASON_CHARACTERS_MAX + 16
    return 4 * REASON_CHARACTERS_MAX + 1024 + rows * row_bytes


def matrix(body: memoryview, rows: int, columns: int) -> Floats:
    """The body as float64 [rows, columns], sharing its memory. Raises MessageCorrupt when the sizes disagree."""
    if rows < 0 or columns < 0 or body.nbytes != rows * columns * FLOAT_BYTES:
        raise MessageCorrupt(f"a message of {rows} rows and {columns} columns came with {body.nbytes} bytes")
    return np.frombuffer(body, dtype=np.float64).reshape(rows, columns)


def shorten(text: str, characters_max: int = REASON_CHARACTERS_MAX) -> str:
    """One bounded line of printable text, whatever a library or a tenant put into an error."""
    line = "".join(character if character.isprintable() else " " for character in text[: 4 * characters_max])
    line = " ".join(line.split())
    return line if len(line) <= characters_max else line[: characters_max - 1] + "…"


def labels_problem(labels: Sequence[str]) -> str:
    """Why a model can't have these text classes, for its tenant; '' when it can."""
    for label in labels:
        if len(label) > LABEL_BYTES_MAX or len(msgspec.json.encode(label)) > LABEL_BYTES_MAX:
            return (
                f"its text class {shown(label)} takes more than {LABEL_BYTES_MAX} bytes as JSON, and is in each "
                "inference; train it on shorter class names, or on class numbers"
            )
    if len(msgspec.json.encode(labels)) > LABELS_BYTES_MAX:
        return (
            f"its {len(labels)} text classes take more than {LABELS_BYTES_MAX} bytes as JSON; train it on class numbers"
        )
    return ""


def row_errors(values: Floats, names: Sequence[str], known: Mapping[int, str]) -> dict[int, str]:
    """`known` plus a reason for each row of `values` that holds a number that is not finite."""
    errors = dict(known)
    finite = np.isfinite(values)
    for row in np.flatnonzero(~finite.all(axis=1)).tolist():
        name = names[int(np.flatnonzero(~finite[row])[0])]
        errors.setdefault(row, shorten(f"output {name!r} is not a finite number", ROW_REASON_CHARACTERS_MAX))
    return errors
