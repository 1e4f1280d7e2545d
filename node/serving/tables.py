"""Tables over HTTP: what there is, and putting, rolling back and dropping them."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import msgspec
import structlog
from msgspec import Meta

from node.kernel.clock import Clock
from node.kernel.errors import BoundExceeded, ClusterUnavailable, PeerRefused, StoreUnavailable, TableRefused
from node.kernel.limits import TABLE_FEED_EVERY_MS_MIN, TABLE_STALL_MS_MAX
from node.kernel.table_versions import Feed, Table, TableVersion
from node.kernel.types import FieldType
from node.serving.problems import Refusal, bad_request, unavailable
from node.serving.routes import Call, Reply, Route
from node.serving.view import Body
from node.tables.declaration import declared
from node.tables.feeds import TableFeeds
from node.tables.service import FileWish, TableService

log = structlog.get_logger(__name__)

_NAME = re.compile("[a-z][a-z0-9_]{0,62}")
_KINDS: Mapping[str, FieldType] = {"number": "number", "text": "text", "boolean": "boolean"}


class PutQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["parquet", "csv", "ndjson"]
    key: Annotated[str, Meta(description="The key column; needed of a new table.")] = ""
    columns: Annotated[str, Meta(description="Only these columns, separated by commas.")] = ""
    types: Annotated[str, Meta(description="name=number|text|boolean, separated by commas; else inferred.")] = ""
    defaults: Annotated[str, Meta(description="name=value, separated by commas: what a missing value gives.")] = ""
    sha256: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$", description="Of the file, to be compared.")] = ""


class FollowQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    topic: Annotated[str, Meta(pattern="^[A-Za-z0-9._-]{1,249}$", description="A compacted topic of rows.")]
    key: Annotated[str, Meta(description="The key column; needed of a new table.")] = ""
    types: Annotated[str, Meta(description="name=number|text|boolean of each column; needed of a new table.")] = ""
    defaults: Annotated[str, Meta(description="name=value, separated by commas: what a missing value gives.")] = ""
    every_ms: Annotated[str, Meta(pattern="^[0-9]{1,9}$", description="The shortest time between two versions.")] = (
        "10000"
    )


class FeedInfo(Body, frozen=True):
    topic: str
    every_ms: int
    offsets: list[int]
    """By partition: the newest version holds all that the topic had before them."""
    by: str = ""
    """The node that feeds the table, if it is this one: only that one knows what follows."""
    behind: int = 0
    """Offsets of the topic that it has not come to yet."""
    behind_s: float = 0.0
    """For how long it has not been whole."""
    refused: int = 0
    """Records that are no rows, since this node feeds the table; `problems` names the last ones."""
    problems: tuple[str, ...] = ()
    reason: str = ""
    """Why it is not fed now."""


class TableVersionInfo(Body, frozen=True):
    version: str
    """Its first 12 hex digits, as inferences name it."""
    sha256: str
    state: str
    rows: int
    bytes: int
    put_by: str
    put_ms: int


class TableInfo(Body, frozen=True):
    name: str
    key: str
    key_type: str
    columns: dict[str, str]
    live: str
    """Version that is live; '' while the first one waits."""
    versions: list[TableVersionInfo]
    waits_for: list[str]
    """Nodes that lack the version that waits to go live."""
    absent: str = ""
    """Why the live version can't be read on this node now."""
    feed: FeedInfo | None = None
    """The topic that it follows."""


class Tables(Body, frozen=True):
    tables: list[TableInfo]
    building: dict[str, int]
    """Tables whose file this node checks now -> rows read so far."""


class TablePut(Body, frozen=True):
    table: str
    version: str
    rows: int
    live: bool
    """Whether it is live already; in a cluster it is once all nodes have it."""


class TableDropped(Body, frozen=True):
    table: str


class TableFollowed(Body, frozen=True):
    table: str
    topic: str


class TableEndpoints:
    def __init__(self, service: TableService, feeds: TableFeeds, clock: Clock) -> None:
        self._service = service
        self._feeds = feeds
        self._clock = clock

    def routes(self) -> tuple[Route, ...]:
        refused = (HTTPStatus.UNAUTHORIZED, HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.NOT_FOUND)
        path = "/v1/tables/{table}"
        return (
            Route("/v1/tables", "Tables, their versions and schemas", self._list, Tables),
            Route(
                path,
                "Put a file as a table's next version",
                self._put,
                TablePut,
                PutQuery,
                refused,
                method="PUT",
                takes="application/octet-stream",
            ),
            Route(path, "Drop a table", self._drop, TableDropped, statuses=refused, method="DELETE"),
            Route(
                f"{path}/rollback",
                "Go back to the version before the live one",
                self._rollback,
                TablePut,
                statuses=refused,
                method="POST",
            ),
            Route(
                f"{path}/feed",
                "Have a table follow a topic",
                self._follow,
                TableFollowed,
                FollowQuery,
                refused,
                method="POST",
            ),
            Route(
                f"{path}/feed", "Leave it as it is", self._unfollow, TableFollowed, statuses=refused, method="DELETE"
            ),
        )

    async def _list(self, call: Call) -> Reply:
        service = self._service
        tables = [self._info(table) for _, table in sorted(service.ledger.tables().items())]
        return _reply(Tables(tables=tables, building=dict(service.building)))

    def _info(self, table: Table) -> TableInfo:
        schema = table.schema
        return TableInfo(
            name=table.name,
            key=schema.key,
            key_type=schema.key_type,
            columns={name: column.type for name, column in schema.columns.items()},
            live=table.live[:12],
            versions=[_version(one) for one in sorted(table.versions.values(), key=lambda one: -one.at_ms)],
            waits_for=self._service.ledger.waits_for(table.name),
            absent=self._service.library.current().absent.get(table.name, ""),
            feed=None if table.feed is None else self._feed(table, table.feed),
        )

    def _feed(self, table: Table, feed: Feed) -> FeedInfo:
        fed, newest = self._feeds.of(table), table.newest_fed
        info = FeedInfo(feed.topic, feed.every_ms, list(newest.offsets) if newest is not None else [])
        if fed is None:
            return info
        behind_s = 0.0 if fed.caught_up is None or not fed.behind else self._clock.monotonic() - fed.caught_up
        return msgspec.structs.replace(
            info,
            by=self._service.node,
            behind=fed.behind,
            behind_s=round(behind_s, 3),
            refused=fed.refused,
            problems=tuple(fed.problems),
            reason=fed.reason,
        )

    async def _put(self, call: Call) -> Reply:
        name, query = _name(call), call.query
        assert call.body is not None
        types = {column: _kind(kind) for column, kind in _pairs(query.types).items()}
        columns = tuple(part for part in query.columns.split(",") if part)
        wish = FileWish(query.format, query.key, columns, types, _pairs(query.defaults))
        try:
            async with self._service.upload(name) as folder:
                await _receive(call.body, folder / "file", self._service.upload_bytes_max, query.sha256)
                version = await self._service.put(name, folder / "file", wish)
        except BoundExceeded as full:
            raise unavailable("busy", str(full), close=True) from None
        except StoreUnavailable as failure:
            log.warning("table not put", table=name, reason=str(failure))
            raise unavailable("disk", "the node's disk refuses; its log has the reason", close=True) from None
        except (TableRefused, PeerRefused, ClusterUnavailable) as failure:
            raise _refusal(failure) from None
        return self._told(name, version)

    async def _rollback(self, call: Call) -> Reply:
        name = _name(call)
        try:
            return self._told(name, await self._service.rollback(name))
        except (TableRefused, PeerRefused, ClusterUnavailable) as failure:
            raise _refusal(failure) from None

    async def _drop(self, call: Call) -> Reply:
        name = _name(call)
        try:
            await self._service.drop(name)
        except (TableRefused, PeerRefused, ClusterUnavailable) as failure:
            raise _refusal(failure) from None
        return _reply(TableDropped(table=name))

    async def _follow(self, call: Call) -> Reply:
        name, query = _name(call), call.query
        table = self._service.ledger.tables().get(name)
        types = {column: _kind(kind) for column, kind in _pairs(query.types).items()}
        every_ms = int(query.every_ms)
        if every_ms < TABLE_FEED_EVERY_MS_MIN:
            raise bad_request(f"every_ms is at least {TABLE_FEED_EVERY_MS_MIN}")
        try:
            schema = declared(query.key, types, _pairs(query.defaults), None if table is None else table.schema)
            await self._service.follow(name, Feed(query.topic, schema.encode(), every_ms))
        except BoundExceeded as full:
            raise unavailable("busy", str(full)) from None
        except StoreUnavailable as failure:
            raise unavailable("disk", str(failure)) from None
        except (TableRefused, PeerRefused, ClusterUnavailable) as failure:
            raise _refusal(failure) from None
        return _reply(TableFollowed(name, query.topic))

    async def _unfollow(self, call: Call) -> Reply:
        name = _name(call)
        try:
            await self._service.unfollow(name)
        except (TableRefused, PeerRefused, ClusterUnavailable) as failure:
            raise _refusal(failure) from None
        return _reply(TableFollowed(name, ""))

    def _told(self, name: str, version: TableVersion) -> Reply:
        table = self._service.ledger.tables().get(name)
        live = table is not None and table.live == version.version
        return _reply(TablePut(table=name, version=version.short_version, rows=version.rows, live=live))


async def _receive(body: AsyncIterator[bytes], path: Path, bytes_max: int, sha256: str) -> None:
    """Write the upload to a file. Raises Refusal when it is too large, stalls, or is another than was announced."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        while True:
            try:
                async with asyncio.timeout(TABLE_STALL_MS_MAX / 1000):
                    chunk = await anext(body, b"")
            except TimeoutError:
                detail = f"nothing came for {TABLE_STALL_MS_MAX // 1000} s (TABLE_STALL_MS_MAX); try again"
                raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "stalled", detail, close=True) from None
            if not chunk:
                break
            size += len(chunk)
            if size > bytes_max:
                detail = f"the file is over {bytes_max} bytes ([tables] upload_mb_max)"
                raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body-too-large", detail, close=True)
            await asyncio.to_thread(_write, file, digest, chunk)
    if sha256 and digest.hexdigest() != sha256:
        raise bad_request("what came is not the file that was announced: its sha256 differs; send it again")


def _write(file: BinaryIO, digest: hashlib._Hash, chunk: bytes) -> None:
    digest.update(chunk)
    file.write(chunk)


def _refusal(failure: TableRefused | PeerRefused | ClusterUnavailable) -> Refusal:
    if isinstance(failure, ClusterUnavailable):
        return unavailable("cluster-unavailable", str(failure))
    problems = failure.problems if isinstance(failure, TableRefused) else (str(failure),)
    detail = "the table was left as it is: " + problems[0]
    return Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, "table-refused", detail, reasons=problems)


def _name(call: Call) -> str:
    name = call.variables["table"]
    if not _NAME.fullmatch(name):
        raise bad_request("a table's name is 1 to 63 of a-z, 0-9 and '_', first a letter")
    return name


def _kind(kind: str) -> FieldType:
    if kind not in _KINDS:
        raise bad_request(f"a column's type is one of {', '.join(_KINDS)}")
    return _KINDS[kind]


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    if not all(name and equals for name, equals, _ in pairs):
        raise bad_request("types and defaults are name=value, separated by commas")
    return {name: value for name, _, value in pairs}


def _version(version: TableVersion) -> TableVersionInfo:
    return TableVersionInfo(
        version=version.short_version,
        sha256=version.version,
        state=version.state,
        rows=version.rows,
        bytes=version.bytes,
        put_by=version.who,
        put_ms=version.at_ms,
    )


def _reply(body: Body) -> Reply:
    return Reply(msgspec.json.encode(body))
