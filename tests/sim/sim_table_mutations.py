"""Mistakes with tables, made on purpose as those of `sim_mutations` are: (name, what is wrong, what is replaced)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sim_node
import sim_tables
from msgspec.structs import replace
from sim_node import SimNode
from sim_tables import Pinned

from node.kernel.table_versions import Table, TableVersion
from replication import catalog as catalog_module
from replication import catalog_tables
from replication.catalog import Catalog
from replication.commands import FlipTable, ForgetTable

Mistakes = tuple[tuple[Any, Any, Any], ...]

HANDLERS = catalog_module._HANDLERS


# the catalog


def _flip_whoever_has_it(catalog: Catalog, command: FlipTable) -> Catalog | str:
    """Without a look at who has the file."""
    some = replace(catalog, holders=dict.fromkeys(catalog.holders, dict.fromkeys(command.holders, 0)))
    after = catalog_tables._flip(some, command)
    return after if isinstance(after, str) or after is some else replace(after, holders=catalog.holders)


def _flip_though_stale(catalog: Catalog, command: FlipTable) -> Catalog | str:
    """Also when another version was put since."""
    return catalog_tables._flip(catalog, replace(command, revision=catalog.revision))


def _forget_whatever(catalog: Catalog, command: ForgetTable) -> Catalog:
    """Also what is to go live again since."""
    table = catalog.tables.get(command.name)
    if table is None or command.version not in table.versions:
        return catalog
    left = table.without(command.version, catalog.revision + 1)
    return catalog_tables._without_blobs(catalog, {**catalog.tables, table.name: left})


def _holders_stay(catalog: Catalog, tables: dict[str, Table]) -> Catalog:
    """Who had a file counts as having it when it is put again, though it was deleted meanwhile."""
    return replace(_without_blobs(catalog, tables), holders=catalog.holders)


_without_blobs = catalog_tables._without_blobs


def _retired_too(catalog: Catalog, members: tuple[str, ...]) -> Iterator[Any]:
    """The leader makes live whatever all have."""
    for table in catalog.tables.values():
        for version in table.versions:
            if version != table.live and members and catalog.holders[version].keys() >= set(members):
                yield FlipTable(revision=catalog.revision, name=table.name, version=version, holders=members)
                break


def _without_offsets(encoded: bytes) -> Catalog:
    catalog = _decode_catalog(encoded)
    tables = {
        name: replace(table, versions={key: replace(one, offsets=()) for key, one in table.versions.items()})
        for name, table in catalog.tables.items()
    }
    return replace(catalog, tables=tables)


_decode_catalog = sim_node.decode_catalog


# how versions follow each other


def _put_beside(table: Table, version: TableVersion, revision: int) -> Table:
    """What waited to go live waits on."""
    after = _with_put(table, version, revision)
    kept = {name: one for name, one in table.versions.items() if one.state == "passed" and name != version.version}
    return replace(after, versions={**after.versions, **kept})


def _put_the_same(table: Table, version: TableVersion, revision: int) -> Table:
    """The rows that are live already: nothing has come."""
    return table if version.version == table.live else _with_put(table, version, revision)


_with_put = Table.with_put


def _put_by_any_offsets(table: Table, version: TableVersion) -> str:
    return _problem_of(table, replace(version, offsets=(2**62,) * 3) if version.feed else version)


def _put_by_any_feed(table: Table, version: TableVersion) -> str:
    known = table.feed.number if table.feed is not None else 0
    return _problem_of(table, replace(version, feed=known) if version.feed else version)


_problem_of = Table.problem_of


def _newest_of_any_feed(table: Table) -> TableVersion | None:
    """The next version is made on top of another topic's, or of a file."""
    return table.newest if table.feed is not None else None


def _all_retired(table: Table) -> list[str]:
    return [one.version for one in table.versions.values() if one.state == "retired"]


# what cycles read


def _read_what_came(node: SimNode) -> Pinned | None:
    """A node takes a version once it has the file, not once the catalog says so."""
    table, right = node.catalog.tables.get(sim_tables.READ), _pinned(node)
    waits = table.passed if table is not None else None
    if right is None or waits is None or waits.version not in node.disk.blobs:
        return right
    return Pinned(waits.version, right.revision)


_pinned = sim_tables.pinned


TABLE_MISTAKES: tuple[tuple[str, str, Mistakes], ...] = (
    (
        "flip without file",
        "the leader asks one node only, the catalog none",
        ((HANDLERS, FlipTable, _flip_whoever_has_it), (sim_tables, "living", lambda *_: frozenset("a"))),
    ),
    ("flip though replaced", "an older version goes live late", ((HANDLERS, FlipTable, _flip_though_stale),)),
    ("flip back", "the leader flips to retired versions", ((catalog_tables, "_commands", _retired_too),)),
    ("flip by itself", "a node reads a version that has just come", ((sim_tables, "pinned", _read_what_came),)),
    ("many tables wait", "what waited stays when a newer is put", ((Table, "with_put", _put_beside),)),
    ("same rows, old offsets", "a feed's live version put again", ((Table, "with_put", _put_the_same),)),
    ("feed goes back", "a deposed leader's version is taken", ((Table, "problem_of", _put_by_any_offsets),)),
    ("feed of before", "of a topic not followed any more", ((Table, "problem_of", _put_by_any_feed),)),
    ("on top of any", "another feed's version goes on", ((Table, "newest_fed", property(_newest_of_any_feed)),)),
    ("version before forgotten", "with all that is retired", ((Table, "surplus", property(_all_retired)),)),
    ("forget in use", "a version that is wished for again", ((HANDLERS, ForgetTable, _forget_whatever),)),
    ("holders stay", "of a file that was dropped", ((catalog_tables, "_without_blobs", _holders_stay),)),
    ("dropped comes back", "by a late command", ((catalog_tables, "addition_stale", lambda *_: ""),)),
    ("stale table commands", "decided on old facts", ((catalog_tables, "stale", lambda *_: ""),)),
    ("dump without offsets", "of a feed's versions", ((sim_node, "decode_catalog", _without_offsets),)),
)
