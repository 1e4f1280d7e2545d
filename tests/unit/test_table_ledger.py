"""How a table's versions follow each other, in a node's own ledger and in the catalog; and when cycles see a flip."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from node.kernel.errors import StoreUnavailable, TableRefused
from node.kernel.supervise import Supervisor
from node.kernel.table_versions import Feed, Table, TableVersion
from node.kernel.tables import TableColumn, TableSchema
from node.tables.library import TableLibrary
from node.tables.local import LocalTables
from node.tables.version_file import MENDED, VersionFile
from replication.catalog import Catalog, apply, decode_catalog, encode_catalog, problem
from replication.catalog_tables import table_blobs, table_rollout, waiting_held
from replication.commands import (
    DropTable,
    FlipTable,
    FollowTopic,
    HoldBlob,
    JoinNode,
    PutTable,
    UnfollowTopic,
    decode_command,
    encode_command,
)
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


def test_a_version_whose_only_holder_lost_its_disk_is_known_to_be_gone() -> None:
    catalog = apply(cluster(), put(cluster(), 1))
    assert not waiting_held(catalog, "products")
    catalog = held(catalog, 1, "n1")
    assert waiting_held(catalog, "products")
    again = JoinNode(
        revision=catalog.revision, name="n1", raft_address="a:1", http_address="a:2", incarnation=2, at_ms=1
    )
    assert not waiting_held(apply(catalog, again), "products")
    assert waiting_held(led(held(catalog, 1, *NODES)), "products"), "none waits"
    assert waiting_held(catalog, "others")


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
    back = FlipTable(revision=second.revision, name="products", version=sha(1), holders=NODES)
    assert "does not wait to go live" in problem(second, back), "it is put again first"
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
    absent = library.current().absent["products"]
    assert absent == f"version {sha(1)[:12]} is not here yet; {MENDED}"
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


def followed(topic: str = "rows", revision: int = 0) -> FollowTopic:
    return FollowTopic(revision=revision, name="products", topic=topic, schema=SCHEMA.encode(), every_ms=1000)


def fed(catalog: Catalog, number: int, offsets: tuple[int, ...], feed: int | None = None) -> PutTable:
    agreed = catalog.tables["products"].feed
    known = agreed.number if feed is None and agreed is not None else feed or 0
    return msgspec.structs.replace(put(catalog, number), feed=known, offsets=offsets)


def test_a_followed_table_goes_forward_only_and_takes_no_files() -> None:
    catalog = apply(cluster(), followed(revision=cluster().revision))
    assert apply(catalog, followed(revision=catalog.revision)) is catalog
    assert table_rollout(catalog, NODES) == []
    assert "follows topic rows" in problem(catalog, put(catalog, 1))
    catalog = apply(catalog, fed(catalog, 1, (5, 7)))
    assert "as of (5, 7) already" in problem(catalog, fed(catalog, 2, (6, 6)))
    catalog = led(held(catalog, 1, *NODES))
    assert catalog.tables["products"].live == sha(1)
    assert "as of (5, 7) already" in problem(catalog, fed(catalog, 2, (4,)))
    late = fed(catalog, 2, (6, 7, 1))
    catalog = apply(catalog, late)
    assert catalog.tables["products"].newest_fed.offsets == (6, 7, 1)
    catalog = led(held(catalog, 2, *NODES))
    same = apply(catalog, fed(catalog, 2, (8, 8, 8)))
    assert (same.tables["products"].passed, same.tables["products"].newest_fed.offsets) == (None, (8, 8, 8))
    assert apply(same, fed(same, 2, (8, 8, 8))) is same
    other = apply(same, followed("others", same.revision))
    assert other.tables["products"].newest_fed is None, "another topic is read from its beginning"
    assert "does not follow that topic any more" in problem(other, msgspec.structs.replace(late, revision=99))
    assert problem(other, fed(other, 3, (1,))) == ""
    alone = apply(other, UnfollowTopic(revision=other.revision, name="products"))
    assert (alone.tables["products"].live, alone.tables["products"].feed) == (sha(2), None)
    assert problem(alone, put(alone, 3)) == ""
    assert "does not follow" in problem(alone, replace(fed(other, 3, (1,)), revision=alone.revision))
    assert decode_catalog(encode_catalog(other)) == other


def test_a_table_that_nothing_has_come_for_goes_when_it_follows_no_more() -> None:
    catalog = apply(cluster(), followed(revision=cluster().revision))
    assert apply(catalog, UnfollowTopic(revision=catalog.revision, name="products")).tables == {}
    wrong = msgspec.structs.replace(followed(revision=99), schema=TableSchema("id", "text", {}).encode())
    live = led(held(apply(cluster(), put(cluster(), 1)), 1, *NODES))
    assert "the key is id" in problem(live, wrong)


async def test_a_node_by_itself_follows_by_the_same_rules(tmp_path: Path) -> None:
    ledger = LocalTables(tmp_path / "tables.json", TableLibrary(lambda version: tmp_path / version, Supervisor()))
    feed = Feed("rows", SCHEMA.encode(), 1000)
    await ledger.follow("products", feed)
    number = ledger.tables()["products"].feed.number
    await ledger.follow("products", feed)
    assert ledger.tables()["products"].feed.number == number
    one = TableVersion(sha(1), SCHEMA.encode(), 1, 1, feed=number, offsets=(3,))
    await ledger.put("products", one)
    for refused in (replace(one, offsets=(2,)), replace(one, feed=0, version=sha(2)), replace(one, feed=number + 1)):
        with pytest.raises(TableRefused):
            await ledger.put("products", refused)
    kept = LocalTables(tmp_path / "tables.json", TableLibrary(lambda version: tmp_path / version, Supervisor()))
    assert kept.tables()["products"].newest_fed.offsets == (3,)
    await kept.unfollow("products")
    assert (kept.tables()["products"].live, kept.tables()["products"].feed) == (sha(1), None)
    await kept.follow("others", feed)
    await kept.unfollow("others")
    assert "others" not in kept.tables()


async def test_a_node_by_itself_opens_a_new_version_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are decoded when it is opened: up to a second for many columns, in which no event would be taken in."""
    opened: list[tuple[str, int]] = []

    def recorded(path: Path, version: str) -> VersionFile:
        opened.append((version, threading.get_ident()))
        return VersionFile(path, version)

    monkeypatch.setattr("node.tables.library.VersionFile", recorded)
    library = TableLibrary(lambda version: tmp_path / version, Supervisor())
    ledger = LocalTables(tmp_path / "tables.json", library)
    for number in (1, 2):
        built(tmp_path, f"sku,price\na,{number}\n")
        (tmp_path / "built").rename(tmp_path / sha(number))
        await ledger.put("products", TableVersion(sha(number), SCHEMA.encode(), 1, 1))
        assert library.current().versions(["products"]) == {"products": sha(number)[:12]}
    await ledger.put("products", TableVersion(sha(1), SCHEMA.encode(), 1, 1))
    assert [version for version, _ in opened] == [sha(1)[:12], sha(2)[:12]], "one to go back to stays open"
    assert threading.get_ident() not in {thread for _, thread in opened}


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


async def test_a_version_that_could_not_be_put_does_not_stay_open(tmp_path: Path) -> None:
    """Its file would take its place on the disk until the node ends, though it is deleted."""
    library = TableLibrary(lambda version: tmp_path / version, Supervisor())
    ledger = LocalTables(tmp_path / "gone" / "tables.json", library)
    built(tmp_path, "sku,price\na,1\n")
    (tmp_path / "built").rename(tmp_path / sha(1))
    with pytest.raises(StoreUnavailable, match=r"tables\.json can't be written"):
        await ledger.put("products", TableVersion(sha(1), SCHEMA.encode(), 1, 1))
    assert ledger.tables() == {}
    assert not is_mapped(tmp_path / sha(1))
