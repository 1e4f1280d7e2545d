"""Errors as problem documents (RFC 9457), application/problem+json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus

import msgspec

from node.kernel.errors import (
    BoundExceeded,
    ClusterUnavailable,
    HeadraceError,
    NotFound,
    PeerRefused,
    StateCorrupt,
    StoreUnavailable,
    TableUnavailable,
)

PROBLEM_TYPE = "application/problem+json"


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong, and what the caller does next."""

    type: str
    """Stable, for programs: urn:headrace:problem:<kind>."""
    title: str
    status: int
    detail: str
    instance: str
    """The path that was asked for."""
    reasons: list[str] = []


class Refusal(Exception):
    """A request that ends in a problem document; raised anywhere below the server."""

    def __init__(
        self,
        status: HTTPStatus,
        kind: str,
        detail: str,
        *,
        reasons: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.reasons = tuple(reasons)
        self.headers = dict(headers or {})
        self.close = close
        """Whether the connection can't be used any further."""

    def document(self, instance: str) -> bytes:
        problem = Problem(
            type=f"urn:headrace:problem:{self.kind}",
            title=self.status.phrase,
            status=self.status.value,
            detail=self.detail,
            instance=instance,
            reasons=list(self.reasons),
        )
        return msgspec.json.encode(problem)


def bad_request(detail: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, "bad-request", detail)


def not_found(kind: str, detail: str) -> Refusal:
    return Refusal(HTTPStatus.NOT_FOUND, kind, detail)


def unavailable(kind: str, detail: str, *, reasons: Sequence[str] = (), close: bool = False) -> Refusal:
    return Refusal(
        HTTPStatus.SERVICE_UNAVAILABLE, kind, detail, reasons=reasons, headers={"Retry-After": "1"}, close=close
    )


def refusal_of(failure: HeadraceError) -> Refusal | None:
    """What the caller is told of an error of ours; None for one that is a fault of the node.

    A store's own message may name a path of this machine, so it is for the log only.
    """
    if isinstance(failure, NotFound):
        return not_found("not-found", str(failure))
    if isinstance(failure, BoundExceeded | PeerRefused):
        return Refusal(HTTPStatus.CONFLICT, "refused", str(failure))
    if isinstance(failure, ClusterUnavailable):
        return unavailable("no-quorum", str(failure))
    if isinstance(failure, TableUnavailable):
        return unavailable("table-unavailable", str(failure))
    if isinstance(failure, StoreUnavailable | StateCorrupt):
        return unavailable("state-unavailable", "the customer's state can't be read now; /readyz says more")
    return None
