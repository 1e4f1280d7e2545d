"""Frames as the changelog gives them back."""

from __future__ import annotations

from node.kernel.types import Frame
from replication.frame import FrameAssembler, encode_frame


def as_sent(frame: Frame) -> Frame:
    """What a reader makes of it; one that takes a single record."""
    (decoded,) = [FrameAssembler().add(record) for record in encode_frame(frame)]
    assert decoded is not None
    return decoded
