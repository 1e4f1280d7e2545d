"""What a feed does with the offsets of a topic that has grown or was made again, and with tables beyond the bound."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.kernel.clock import ManualClock
from node.kernel.errors import BoundExceeded, StoreUnavailable, TableRefused
from node.kernel.supervise import Supervisor
from node.kernel.table_versions import Feed, Table, TableVersion
from node.kernel.tables import TableSchema
from node.tables import service as service_module
from node.tables.changes import Changes
from node.tables.feeds import Fed, since
from node.tables.library import TableLibrary
from node.tables.local import LocalTables
from node.tables.service import Files, FileWish, TableService
from node.tables.version_file import MENDED

FEED = Feed("rows", TableSchema("sku", "text", {}).encode(), 1000)


def test_reading_goes_on_in_as_many_partitions_as_there_are() -> None:
    assert since((5, 7), (1, 2)) == (5, 7)
    assert since((5,), (1, 2)) == (5, 2), "a partition more is read from its beginning"
    assert since((5, 0), (1,)) == (5,), "made again with fewer, of which nothing had been read"
    assert since((), (1, 2)) == (1, 2)


def service_in(folder: Path) -> TableService:
    library = TableLibrary(lambda version: folder / version, Supervisor())
    ledger = LocalTables(folder / "tables.json", library)
    files = Files(lambda path: "", lambda sha256: folder / sha256, lambda: (), lambda sha256: None)
    return TableService("n", folder, files, library, ledger, lambda name: [], 0, 1000, ManualClock())


async def test_a_version_that_a_topic_made_can_come_back_once_the_table_follows_no_more(tmp_path: Path) -> None:
    service = service_in(tmp_path)
    ledger = service.ledger
    await service.follow("one", FEED)
    number = ledger.tables()["one"].feed.number
    for sha256, offsets in (("a" * 64, (1,)), ("b" * 64, (2,))):
        await ledger.put("one", TableVersion(sha256, FEED.schema, 1, 1, feed=number, offsets=offsets))
    with pytest.raises(TableRefused, match="follows topic rows"):
        await service.rollback("one")
    await service.unfollow("one")
    await service.rollback("one")
    assert ledger.tables()["one"].live == "a" * 64
    await service.follow("one", FEED)
    assert ledger.tables()["one"].newest_fed is None, "what was rolled back to is no place to go on from"


async def test_no_more_tables_follow_topics_than_there_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_in(tmp_path)
    monkeypatch.setattr(service_module, "TABLES_MAX", 2)
    await service.follow("one", FEED)
    await service.follow("two", FEED)
    with pytest.raises(BoundExceeded, match="there are 2 tables"):
        await service.follow("three", FEED)
    await service.follow("two", Feed("others", FEED.schema, 1000))
    assert sorted(service.ledger.tables()) == ["one", "two"]


async def test_changes_to_a_version_whose_file_is_not_here_say_so(tmp_path: Path) -> None:
    service = service_in(tmp_path)
    await service.follow("one", FEED)
    feed = service.ledger.tables()["one"].feed
    base = TableVersion("a" * 64, FEED.schema, 1, 1, feed=feed.number, offsets=(1,))
    async with service.upload("one") as folder:
        (folder / "file").write_bytes(Changes(TableSchema.decode(FEED.schema)).line(b"a", b"{}"))
        with pytest.raises(TableRefused, match=f"a table's file {'a' * 64} can't be read: .*; {MENDED}"):
            await service.put_changes("one", folder / "file", feed, base, (2,))


async def test_a_disk_that_is_full_while_a_table_is_built_is_told_as_that(tmp_path: Path) -> None:
    service = service_in(tmp_path)
    async with service.upload("one") as folder:
        (folder / "file").write_text("sku,price\na,1\n")
        (folder / "built").symlink_to("/dev/full")
        with pytest.raises(
            StoreUnavailable, match=r"table one can't be built: .*No space left on device; free or repair"
        ):
            await service.put("one", folder / "file", FileWish("csv", "sku"))
    assert (service.ledger.tables(), service.building) == ({}, {})


def fed_table(passed: bool) -> Table:
    """Live as of offset 1; if so, a version as of 2 waits to go live."""
    table = Table("one", {}).with_feed(FEED, 1)
    for number in range(1, 3 if passed else 2):
        table = table.with_put(TableVersion(f"{number:064x}", FEED.schema, 1, 1, feed=1, offsets=(number,)), number + 1)
        if number == 1:
            table = table.with_live(f"{1:064x}", 3)
    return table


def test_a_table_whose_next_version_went_with_a_disk_is_fed_again_from_the_live_one() -> None:
    table, fed = fed_table(passed=True), Fed(offsets=(2,), caught_up=5.0)
    assert fed.waits(table, held=True, now=1000.0)
    assert fed.waits(table, held=False, now=1001.0), "it may be told only now who has it"
    assert fed.waits(table, held=True, now=1002.0)
    assert fed.waits(table, held=False, now=1050.0)
    assert fed.waits(table, held=False, now=1109.9)
    assert fed.offsets == (2,)
    assert not fed.waits(table, held=False, now=1110.0)
    assert (fed.offsets, fed.caught_up) == ((), None), "deletions since the live version may be gone by now"
    assert fed.waits(table, held=False, now=1111.0), "the version made instead has no holder at first either"
    assert table.live_fed is not None
    assert table.live_fed.offsets == (1,)


def test_a_table_that_waits_for_nothing_is_fed() -> None:
    fed = Fed(offsets=(1,))
    assert not fed.waits(fed_table(passed=False), held=True, now=1000.0)
    assert fed.offsets == (1,)
