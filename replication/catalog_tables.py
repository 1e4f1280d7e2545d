"""(P) How commands change what the catalog says of tables. Who has a version's file is in `holders`, as for models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, TypeAlias

import msgspec
from msgspec.structs import replace

from node.kernel import limits
from node.kernel.table_versions import Feed, Table, TableVersion
from node.kernel.tables import TableSchema
from replication.catalog_values import Catalog, Outcome, addition_stale, advanced, stale
from replication.commands import DropTable, FlipTable, FollowTopic, ForgetTable, PutTable, UnfollowTopic

TableCommand: TypeAlias = FlipTable | ForgetTable


def table_blobs(catalog: Catalog) -> frozenset[str]:
    """The sha256 of every file that a table needs."""
    return frozenset(version for table in catalog.tables.values() for version in table.versions)


def waiting_held(catalog: Catalog, name: str) -> bool:
    """Whether a node has the file of the version of that table that waits to go live; True without one."""
    table = catalog.tables.get(name)
    return table is None or table.passed is None or bool(catalog.holders.get(table.passed.version))


def table_rollout(catalog: Catalog, members: tuple[str, ...]) -> list[TableCommand]:
    """The leader's next commands for tables, all valid together: a version that all members have goes live, and what
    nothing needs is dropped. Without members nothing goes live."""
    return list(islice(_commands(catalog, members), limits.ROLLOUT_COMMANDS_MAX))


def _commands(catalog: Catalog, members: tuple[str, ...]) -> Iterator[TableCommand]:
    for table in catalog.tables.values():
        passed = table.passed
        if passed is not None and members and catalog.holders.get(passed.version, {}).keys() >= set(members):
            yield FlipTable(revision=catalog.revision, name=table.name, version=passed.version, holders=members)
        elif table.surplus:
            yield ForgetTable(revision=catalog.revision, name=table.name, version=table.surplus[0])


def _put(catalog: Catalog, command: PutTable) -> Outcome:
    before = catalog.tables.get(command.name)
    newest = None if before is None else before.newest
    wish = (command.version, command.feed, command.offsets)
    if newest is not None and (newest.version, newest.feed, newest.offsets) == wish:
        return catalog
    reason = _problem(catalog, before, command)
    if reason:
        return reason
    version = TableVersion(
        command.version,
        command.schema,
        command.rows,
        command.bytes,
        who=command.who,
        at_ms=command.at_ms,
        feed=command.feed,
        offsets=command.offsets,
    )
    table = before or Table(command.name, {})
    reason = table.problem_of(version)
    if reason:
        return reason
    table = table.with_put(version, catalog.revision + 1)
    holders = catalog.holders if command.version in catalog.holders else {**catalog.holders, command.version: {}}
    return advanced(catalog, tables={**catalog.tables, table.name: table}, holders=holders)


def _follow(catalog: Catalog, command: FollowTopic) -> Outcome:
    before = catalog.tables.get(command.name)
    feed = Feed(command.topic, command.schema, command.every_ms, command.who, command.at_ms)
    if before is not None and feed.same_wish(before.feed):
        return catalog
    reason = _problem(catalog, before, command)
    if reason:
        return reason
    table = (before or Table(command.name, {})).with_feed(feed, catalog.revision + 1)
    return advanced(catalog, tables={**catalog.tables, table.name: table})


def _unfollow(catalog: Catalog, command: UnfollowTopic) -> Outcome:
    table = catalog.tables.get(command.name)
    if table is None or table.feed is None:
        return catalog
    reason = stale(f"table {command.name}", table.revision, command)
    if reason:
        return reason
    if not table.versions:
        return _without_blobs(catalog, {name: one for name, one in catalog.tables.items() if name != table.name})
    return advanced(catalog, tables={**catalog.tables, table.name: table.with_feed(None, catalog.revision + 1)})


def _problem(catalog: Catalog, before: Table | None, command: PutTable | FollowTopic) -> str:
    """Why the table can't be added or changed; '' when it can."""
    if before is not None:
        reason = stale(f"table {command.name}", before.revision, command)
    elif len(catalog.tables) >= limits.TABLES_MAX:
        reason = f"there are {len(catalog.tables)} tables, the most there may be; drop one first"
    else:
        reason = addition_stale(catalog, command)
    return reason or _schema_problem(before, command)


def _schema_problem(before: Table | None, command: PutTable | FollowTopic) -> str:
    """Two nodes may build versions at once. One that was live before may be again: who rolls back has seen to it."""
    try:
        schema = TableSchema.decode(command.schema)
    except msgspec.MsgspecError as failure:
        return f"the schema of table {command.name} can't be read: {failure}"
    if before is None or not before.versions:
        return ""
    if isinstance(command, PutTable) and command.version in before.versions:
        return ""
    return "; ".join(schema.problems_after(before.schema))


def _flip(catalog: Catalog, command: FlipTable) -> Outcome:
    table = catalog.tables.get(command.name)
    if table is None or command.version not in table.versions:
        return f"there is no version {command.version[:12]} of table {command.name}; put it first"
    if table.live == command.version:
        return catalog
    if table.versions[command.version].state != "passed":
        return f"version {command.version[:12]} of table {command.name} does not wait to go live; put it again"
    lacking = sorted(set(command.holders) - catalog.holders.get(command.version, {}).keys())
    if lacking:
        return f"nodes {', '.join(lacking)} lack version {command.version[:12]} of table {command.name}"
    reason = stale(f"table {command.name}", table.revision, command)
    flipped = table.with_live(command.version, catalog.revision + 1)
    return reason or advanced(catalog, tables={**catalog.tables, table.name: flipped})


def _forget(catalog: Catalog, command: ForgetTable) -> Outcome:
    table = catalog.tables.get(command.name)
    if table is None or command.version not in table.versions:
        return catalog
    if table.versions[command.version].state != "retired":
        return f"version {command.version[:12]} of table {command.name} is in use"
    reason = stale(f"table {command.name}", table.revision, command)
    if reason:
        return reason
    left = table.without(command.version, catalog.revision + 1)
    return _without_blobs(catalog, {**catalog.tables, table.name: left})


def _drop(catalog: Catalog, command: DropTable) -> Outcome:
    table = catalog.tables.get(command.name)
    if table is None:
        return catalog
    reason = stale(f"table {command.name}", table.revision, command)
    return reason or _without_blobs(catalog, {name: one for name, one in catalog.tables.items() if name != table.name})


def _without_blobs(catalog: Catalog, tables: dict[str, Table]) -> Catalog:
    """With those tables, and without the holders of files that none needs any more."""
    after = replace(catalog, tables=tables)
    gone = table_blobs(catalog) - table_blobs(after)
    holders = {blob: held for blob, held in catalog.holders.items() if blob not in gone}
    return advanced(after, holders=holders, removed_revision=catalog.revision + 1)


HANDLERS: Final[Mapping[type, Callable[[Catalog, Any], Outcome]]] = {
    PutTable: _put,
    FollowTopic: _follow,
    UnfollowTopic: _unfollow,
    FlipTable: _flip,
    ForgetTable: _forget,
    DropTable: _drop,
}
