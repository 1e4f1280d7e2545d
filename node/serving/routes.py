"""What can be asked for: one table that requests are matched against and the OpenAPI document is made from."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, TypeAlias
from urllib.parse import unquote_to_bytes

import msgspec
from msgspec import Meta

from node.kernel.limits import CUSTOMER_BYTES_MAX, HTTP_PATH_BYTES_MAX, HTTP_QUERY_BYTES_MAX
from node.serving.problems import Refusal, bad_request, not_found

JSON_TYPE = "application/json"
CHANGE_METHOD = "PATCH"

_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
NAME = "[a-z0-9][a-z0-9_-]{0,62}"


At: TypeAlias = Annotated[
    str,
    Meta(
        pattern=r"^([0-9]{1,13}|last)$",
        description="As of this time, ms since the Unix epoch, or `last`: of the customer's latest event. Else now.",
    ),
]


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Takes no query."""


class AtQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    at: At = ""


class ModelsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant: Annotated[str, Meta(pattern=f"^{NAME}$", description="Of this tenant only.")] = ""
    after: Annotated[
        str, Meta(pattern=f"^{NAME}/{NAME}/[0-9a-f]{{0,64}}$", description="`next` of the answer before.")
    ] = ""


class LogQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    after: Annotated[
        str, Meta(pattern="^[0-9]{1,18}$", description="Number of the last line that is known already.")
    ] = "0"


class FeaturesQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: Annotated[str, Meta(pattern=f"^{NAME}/{NAME}$", description="`tenant/model`; a live one.")]
    at: At = ""


@dataclass(frozen=True, slots=True)
class Call:
    """A request once matched: names of the path's variables -> texts, and the query as the route's struct."""

    variables: Mapping[str, str]
    query: Any
    body: Any = None
    """Of a change: the route's struct. Of a route with another method than GET: an async iterator of bytes."""


@dataclass(frozen=True, slots=True)
class Reply:
    body: bytes
    content_type: str = JSON_TYPE


@dataclass(frozen=True, slots=True)
class Change:
    """What PATCH does at a path (RFC 7396: what the body leaves out stays, null takes away). Answers as GET does."""

    summary: str
    handler: Callable[[Call], Awaitable[Reply]]
    body: type[msgspec.Struct]
    statuses: tuple[HTTPStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    template: str
    """`{name}` stands for one segment of the path."""
    summary: str
    handler: Callable[[Call], Awaitable[Reply]]
    answer: type[msgspec.Struct] | None
    """The body; None for one that no struct describes."""
    query: type[msgspec.Struct] = NoQuery
    statuses: tuple[HTTPStatus, ...] = ()
    """Of problems that only this route gives."""
    change: Change | None = None
    method: str = "GET"
    """Another needs the node's token, and has the body as it comes."""
    content_type: str = JSON_TYPE
    """Of the answer."""
    takes: str = ""
    """Content type of a body that must be sent; '': none. Not of a `change`, whose body is JSON."""

    @property
    def methods(self) -> tuple[str, ...]:
        if self.method != "GET":
            return (self.method,)
        return ("GET", "HEAD") if self.change is None else ("GET", "HEAD", CHANGE_METHOD)

    @property
    def segments(self) -> tuple[str, ...]:
        return tuple(self.template.split("/")[1:])


class Router:
    """Finds the route of a request. Raises Refusal with the problem to answer."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)

    def find(self, raw_path: str, method: str = "GET") -> tuple[Route, dict[str, str]]:
        """The route and its variables, of a path as it was sent (percent-encoded). Where the path has none for the
        method: the one it has."""
        if len(raw_path.encode("utf-8", "surrogateescape")) > HTTP_PATH_BYTES_MAX:
            raise Refusal(
                HTTPStatus.REQUEST_URI_TOO_LONG,
                "path-too-long",
                f"the path is over {HTTP_PATH_BYTES_MAX} bytes (HTTP_PATH_BYTES_MAX)",
            )
        segments = raw_path.split("/")[1:]
        for route in sorted(self.routes, key=lambda one: method not in one.methods):
            variables = _match(route.segments, segments)
            if variables is not None:
                return route, {name: _decode(text, f"the {name}") for name, text in variables.items()}
        raise not_found("unknown-path", "there is nothing at this path; /v1/openapi.json lists what there is")

    def methods(self, template: str) -> tuple[str, ...]:
        """All that a path takes."""
        return tuple(method for route in self.routes if route.template == template for method in route.methods)

    def change(self, change: Change, variables: dict[str, str], body: bytes) -> Call:
        try:
            return Call(variables, None, msgspec.json.decode(body, type=change.body))
        except (msgspec.MsgspecError, UnicodeDecodeError) as mistake:
            allowed = ", ".join(change.body.__struct_fields__)
            raise bad_request(f"the body can't be taken: {mistake}. It is a JSON object of: {allowed}") from None

    def call(self, route: Route, variables: dict[str, str], raw_query: str) -> Call:
        customer = variables.get("customer")
        if customer is not None:
            _check_customer(customer)
        return Call(variables, _parse_query(raw_query, route.query))


def _match(template: Sequence[str], segments: Sequence[str]) -> dict[str, str] | None:
    if len(template) != len(segments):
        return None
    variables = {}
    for expected, given in zip(template, segments, strict=True):
        if expected.startswith("{"):
            if not given:
                return None
            variables[expected[1:-1]] = given
        elif expected != given:
            return None
    return variables


def _decode(text: str, what: str) -> str:
    """Percent-decoded; strict, so that no two texts are taken for the same one."""
    if _PERCENT.search(text):
        raise bad_request(f"{what} has a % that no two hexadecimal digits follow; write %25 for a plain %")
    try:
        return unquote_to_bytes(text.encode("utf-8", "surrogateescape")).decode()
    except UnicodeDecodeError:
        raise bad_request(f"{what} is not UTF-8 once percent-decoded") from None


def _check_customer(customer: str) -> None:
    size = len(customer.encode())
    if size > CUSTOMER_BYTES_MAX:
        raise Refusal(
            HTTPStatus.REQUEST_URI_TOO_LONG,
            "customer-too-long",
            f"the customer has {size} bytes, over {CUSTOMER_BYTES_MAX} (CUSTOMER_BYTES_MAX); none is so long",
        )
    if _CONTROL_CHARACTERS.search(customer):
        raise bad_request("the customer has control characters; no event's customer may have them")


def _parse_query(raw: str, kind: type[msgspec.Struct]) -> Any:
    if len(raw.encode("utf-8", "surrogateescape")) > HTTP_QUERY_BYTES_MAX:
        raise Refusal(
            HTTPStatus.REQUEST_URI_TOO_LONG,
            "query-too-long",
            f"the query is over {HTTP_QUERY_BYTES_MAX} bytes (HTTP_QUERY_BYTES_MAX)",
        )
    values: dict[str, str] = {}
    for pair in filter(None, raw.split("&")):
        name, _, value = (_decode(part.replace("+", " "), "the query") for part in pair.partition("="))
        if name in values:
            raise bad_request("the query names a parameter twice; give each once")
        values[name] = value
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as mistake:
        allowed = ", ".join(kind.__struct_fields__) or "none"
        raise bad_request(f"the query can't be taken: {mistake}. Parameters here: {allowed}") from None
