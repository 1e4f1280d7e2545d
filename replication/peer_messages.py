"""What peers say to each other over HTTP, beside its signatures: routes, headers, problem documents."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec

CALL_HEADER: Final = "Headrace-Call"
PROOF_HEADER: Final = "Headrace-Proof"
NODE_HEADER: Final = "Headrace-Node"
PROBLEM_TYPE: Final = "application/problem+json"
PROBLEM_PREFIX: Final = "urn:headrace:problem:"


@dataclass(frozen=True)
class PeerCall:
    variables: Mapping[str, str]
    """Of the route's template, percent-decoded; without "/", and never "." or ".."."""
    query: Mapping[str, str]
    body: bytes
    peer: str
    """The node that calls, as it says: who has the secret may give any name."""


@dataclass(frozen=True)
class PeerReply:
    body: bytes = b""
    file: Path | None = None
    """Sent instead of `body`, or from the offset that the caller has; never a link."""


@dataclass(frozen=True)
class PeerRoute:
    method: str
    template: str
    """`{name}` stands for one segment of the path."""
    handler: Callable[[PeerCall], Awaitable[PeerReply]]


class Problem(msgspec.Struct, frozen=True):
    """RFC 9457; `type` is urn:headrace:problem:<kind>."""

    type: str
    title: str
    status: int
    detail: str


def file_content(size: int) -> bytes:
    """What the proof of a reply with a file is about; its bytes are checked by their sha256."""
    return b"file of %d bytes" % size


Result = TypeVar("Result")


async def settled(work: asyncio.Future[Result], abort: Callable[[], None]) -> Result:
    """The result of a thread's work. When cancelled, the thread is told, and done before this raises."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        abort()
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()
        raise
