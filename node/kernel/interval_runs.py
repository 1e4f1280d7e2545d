"""The one encoding of an interval run, used in frames and in the store. Raises StateCorrupt for anything else."""

from __future__ import annotations

import msgspec

from node.kernel.errors import StateCorrupt
from node.kernel.types import IntervalRun

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(IntervalRun)


def encode_run(run: IntervalRun) -> bytes:
    return _encoder.encode(run)


def decode_run(data: bytes) -> IntervalRun:
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as failure:
        raise StateCorrupt(f"an interval run of {len(data)} bytes can't be read: {failure}") from failure
