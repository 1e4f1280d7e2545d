"""How a table's versions follow each other, in a node's own ledger and in the catalog; and when cycles see a flip."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from node.kernel.supervise import Supervisor
from node.kernel.table_versions import Table, TableVersion
from node.kernel.tables import TableColumn, TableSchema
from node.tables.library import TableLibrary
from replication.catalog import Catalog, apply, decode_catalog, encode_catalog, problem
from replication.catalog_tables import table_blobs, table_rollout
from replication.commands import DropTable, FlipTable, HoldBlob, JoinNode, PutTable, decode_command, encode_command
from tests.unit.table_support import built

SCHEMA = TableSchema("sku", "text", {"price": TableColumn("number")})
NODES = ("n1", "n2", "n3")


def sha(number: int) -> str:
    return f"{number:064x}"


def put(catalog: Catalog, number: int, schema: TableSchema = SCHEMA, revision: int | None = None) -> PutTable:
    at = catalog.revision if revision is None else revision
    return PutTable(revision=at, name="products", version=sha(number), schema=schema.encode(), rows=1, bytes=1)


def cluster() -> Catalog:
    catalog = Catalog()
    for name in NODES:
        joined = JoinNode(revision=catalog.revision, name=name, raft_address="a:1", http_address="a:2")
        catalog = apply(catalog, joined)
    return catalog


def held(catalog: Catalog, number: int, *names: str) -> Catalog:
    for name in names:
        command = HoldBlob(revision=catalog.revision, node=name, incarnation=1, blob=sha(number), held=True)
        catalog = apply(catalog, command)
    return catalog


def led(catalog: Catalog, members: tuple[str, ...] = NODES) -> Catalog:
    """All that the leader proposes, until there is nothing more."""
    while commands := table_rollout(catalog, members):
        for command in commands:
            assert problem(catalog, command) == ""
            catalog = apply(catalog, decode_command(encode_command(command)))
    return catalog


def test_a_version_goes_live_once_all_have_it_and_the_one_before_can_come_back() -> None:
    catalog = apply(cluster(), put(cluster(), 1))
    assert led(held(catalog, 1, "n1", "n2")).tables["products"].live == ""
    assert led(held(catalog, 1, "n1", "n2"), ()).tables["products"].live == ""
    catalog = led(held(catalog, 1, *NODES))
    assert catalog.tables["products"].live == sha(1)
    for number in (2, 3):
        catalog = led(held(apply(catalog, put(catalog, number)), number, *NODES))
    table = catalog.tables["products"]
    assert (table.live, set(table.versions)) == (sha(3), {sha(2), sha(3)})
    assert table_blobs(catalog) == catalog.holders.keys() == {sha(2), sha(3)}
    back = led(apply(catalog, put(catalog, 2)))
    assert back.tables["products"].live == sha(2)
    assert back.tables["products"].fallback.version == sha(3)
    assert decode_catalog(encode_catalog(back)) == back
    dropped = apply(back, DropTable(revision=back.revision, name="products"))
    assert (dropped.tables, dropped.holders) == ({}, {})


def test_late_and_repeated_commands_change_nothing() -> None:
    catalog = apply(cluster(), put(cluster(), 1))
    first = put(catalog, 1)
    assert apply(catalog, first) is catalog
    flip = FlipTable(revision=catalog.revision, name="products", version=sha(1), holders=NODES)
    assert "lack version" in problem(catalog, flip)
    live = led(held(catalog, 1, *NODES))
    second = led(held(apply(live, put(live, 2)), 2, *NODES))
    assert "changed at revision" in problem(second, put(second, 1, revision=live.revision))
    other = TableSchema("sku", "text", {"cost": TableColumn("number")})
    assert "column price is missing" in problem(second, put(second, 4, other))


@given(st.lists(st.integers(1, 4), max_size=12))
def test_at_most_one_version_is_live_and_one_waits(numbers: list[int]) -> None:
    table = Table("products", {})
    for revision, number in enumerate(numbers, 1):
        table = table.with_put(TableVersion(sha(number), SCHEMA.encode(), 1, 1), revision)
        assert sum(one.state == "passed" for one in table.versions.values()) == (table.live != sha(number))
        if number % 2 and table.passed is not None:
            before = table.live
            table = table.with_live(sha(number), revision)
            assert not before or table.fallback.version == before
        for surplus in table.surplus:
            assert surplus != table.live
            table = table.without(surplus, revision)
        live = [one.version for one in table.versions.values() if one.state == "live"]
        assert live == ([table.live] if table.live else [])
        assert len(table.versions) <= 3


async def test_cycles_see_one_version_or_are_told_that_it_is_not_here(tmp_path: Path) -> None:
    files, changes = tmp_path / "files", []
    files.mkdir()
    library = TableLibrary(lambda version: files / version, Supervisor())
    library.changed = lambda: changes.append(dict(library.schemas))
    first = TableVersion(sha(1), SCHEMA.encode(), 1, 1)
    library.agreed({"products": Table("products", {}).with_put(first, 1)})
    assert library.current().versions(["products"]) == {}
    assert changes == [{"products": SCHEMA}]
    live = Table("products", {}).with_put(first, 1).with_live(sha(1), 2)
    library.agreed({"products": live})
    assert "not here yet" in library.current().absent["products"]
    built(tmp_path, "sku,price\na,1\n")
    (tmp_path / "built").rename(files / sha(1))
    library.agreed({"products": live})
    pinned = library.current()
    assert (pinned.absent, pinned.versions(["products"])) == ({}, {"products": sha(1)[:12]})
    built(tmp_path, "sku,price\na,2\n")
    (tmp_path / "built").rename(files / sha(2))
    waiting = live.with_put(TableVersion(sha(2), SCHEMA.encode(), 1, 1), 3)
    library.agreed({"products": waiting})
    await asyncio.sleep(0)
    assert library.current().versions(["products"]) == {"products": sha(1)[:12]}
    library.agreed({"products": waiting.with_live(sha(2), 4)})
    assert library.current().versions(["products"]) == {"products": sha(2)[:12]}
    assert pinned.versions(["products"]) == {"products": sha(1)[:12]}
    library.agreed({})
    assert library.current().table("products") is None
    assert library.schemas == {}
