"""Commands about tables for the catalog's properties, and what each may do: by other rules than the catalog's own."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from node.kernel.table_versions import Table
from node.kernel.tables import TableColumn, TableSchema
from replication.catalog import Catalog
from replication.commands import (
    Command,
    DropTable,
    FlipTable,
    FollowTopic,
    ForgetTable,
    HoldBlob,
    PutTable,
    UnfollowTopic,
)

TABLE_SHAS = ("d" * 64, "e" * 64, "f" * 64)
SCHEMAS = tuple(
    TableSchema("id", "number", {name: TableColumn("number") for name in names}).encode() for names in ("p", "pq")
)
TABLE_COMMANDS = (PutTable, FollowTopic, UnfollowTopic, FlipTable, ForgetTable, DropTable)
KINDS = (*TABLE_COMMANDS, FollowTopic, *(PutTable, FlipTable, HoldBlob) * 3)
NODES = ("n", "m")
OFFSETS = st.lists(st.integers(0, 3), max_size=2).map(tuple)


def table_commands(draw: st.DrawFn, catalog: Catalog) -> list[Command]:
    """One that mostly may count, ahead of a flip who has the file, after a follow what is fed: drawn blindly, hardly a
    flip had a version that waits with its holders, and hardly a feed was put twice."""
    command = _command(draw, catalog)
    if isinstance(command, FlipTable) and draw(st.booleans()):
        at = {"revision": catalog.revision, "incarnation": 1, "blob": command.version, "held": True}
        return [*(HoldBlob(node=node, **at) for node in command.holders), command]
    if isinstance(command, FollowTopic) and draw(st.booleans()):
        number, named = catalog.revision + 1, {"name": command.name, "schema": command.schema, "rows": 1, "bytes": 1}
        versions = draw(st.lists(st.tuples(st.sampled_from(TABLE_SHAS), OFFSETS), min_size=1, max_size=3))
        fed = [{"version": version, "offsets": offsets} for version, offsets in versions]
        return [command, *(PutTable(revision=number + at, feed=number, **named, **one) for at, one in enumerate(fed))]
    return [command]


def _command(draw: st.DrawFn, catalog: Catalog) -> Command:

    def one_of(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    kind, name = one_of(*KINDS), one_of("prices", "prices", "shops")
    table, revision = catalog.tables.get(name), max(0, catalog.revision - one_of(0, 0, 0, 1, 3))
    waiting = table.passed.version if table is not None and table.passed is not None else TABLE_SHAS[0]
    if kind is HoldBlob:
        blob, held = one_of(waiting, waiting, waiting, *TABLE_SHAS), one_of(True, True, True, False)
        return HoldBlob(revision=revision, node=one_of(*NODES), incarnation=1, blob=blob, held=held)
    if kind is PutTable:
        feed = table.feed.number if table is not None and table.feed is not None else 0
        feed = one_of(feed, feed, feed, feed, 0, 1)
        offsets = draw(OFFSETS) if feed else ()
        which = {"version": one_of(*TABLE_SHAS), "schema": one_of(*SCHEMAS), "feed": feed, "offsets": offsets}
        return PutTable(revision=revision, name=name, rows=1, bytes=1, **which)
    if kind is FollowTopic:
        wish = {"topic": one_of("rows", "others"), "schema": one_of(*SCHEMAS), "every_ms": 1000}
        return FollowTopic(revision=revision, name=name, **wish)
    if kind is FlipTable:
        version = one_of(waiting, waiting, waiting, *TABLE_SHAS)
        having = tuple(catalog.holders.get(version, ())) or NODES
        return FlipTable(revision=revision, name=name, version=version, holders=one_of(having, having, NODES))
    if kind is ForgetTable:
        return ForgetTable(revision=revision, name=name, version=one_of(*TABLE_SHAS))
    return kind(revision=revision, name=name)


def check_tables(before: Catalog, command: Command, after: Catalog) -> None:
    """What may have become of tables by that one command."""
    for name in before.tables.keys() | after.tables.keys():
        was, now = before.tables.get(name), after.tables.get(name)
        if was == now:
            continue
        assert isinstance(command, TABLE_COMMANDS), "only a command about tables changes any"
        assert command.name == name
        assert command.revision >= (before.removed_revision if was is None else was.revision), "decided on what was so"
        if now is None:
            assert isinstance(command, DropTable | UnfollowTopic)
            assert isinstance(command, DropTable) or (was is not None and not was.versions)
            continue
        assert now.revision == after.revision
        _check_states(was, now, command)
        _check_flip(before, was, now, command)
        _check_feed(was, now, command, after.revision)


def _check_states(was: Table | None, now: Table, command: Command) -> None:
    states = [one.state for one in now.versions.values()]
    assert states.count("live") == bool(now.live)
    assert states.count("passed") <= 1
    assert not now.live or now.versions[now.live].state == "live"
    gone = was.versions.keys() - now.versions.keys() if was is not None else set()
    assert all(isinstance(command, ForgetTable) and was.versions[one].state == "retired" for one in gone)
    if isinstance(command, PutTable):
        assert now.versions[command.version].state == ("live" if now.live == command.version else "passed")


def _check_flip(before: Catalog, was: Table | None, now: Table, command: Command) -> None:
    """Only by a flip, only where its holders have the file; and what was live can come back."""
    live = was.live if was is not None else ""
    if now.live == live:
        return
    assert isinstance(command, FlipTable)
    assert now.live == command.version
    assert was is not None
    assert was.versions[now.live].state == "passed", "the newest wish"
    assert set(command.holders) <= before.holders[command.version].keys()
    assert not live or now.versions[live].state == "retired"
    served = {one.version: one.served_revision for one in now.versions.values()}
    assert max(served, key=lambda version: served[version]) == now.live
    assert not live or sorted(served, key=lambda version: served[version])[-2] == live


def _check_feed(was: Table | None, now: Table, command: Command, revision: int) -> None:
    """It has another number each time, and its offsets never go back."""
    number, before = (table.feed.number if table is not None and table.feed is not None else 0 for table in (now, was))
    if number != before:
        assert number == (revision if isinstance(command, FollowTopic) else 0)
        assert isinstance(command, FollowTopic | UnfollowTopic)
        return
    if isinstance(command, PutTable):
        assert command.feed == number
        assert now.versions[command.version].offsets == command.offsets
    if number and was is not None:
        old, new = fed_offsets(was, number), fed_offsets(now, number)
        assert len(new) >= len(old) or not any(old[len(new) :])
        assert all(one <= other for one, other in zip(old, new, strict=False))


def fed_offsets(table: Table, number: int) -> tuple[int, ...]:
    """Up to where that feed has brought the table: the version that waits, or else the live one."""
    waiting = [one for one in table.versions.values() if one.state == "passed"]
    newest = waiting[0] if waiting else table.versions.get(table.live)
    return newest.offsets if newest is not None and newest.feed == number else ()


def before_the_live(table: Table) -> str:
    """The version that was live before the live one, '' where none was."""
    served = [one for one in table.versions.values() if one.served_revision and one.version != table.live]
    return max(served, key=lambda one: one.served_revision).version if served else ""
