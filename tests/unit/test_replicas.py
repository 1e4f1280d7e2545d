"""What a node does with a partition, by the catalog and its lease; and the folder of its state."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from node.kernel.types import Frame
from node.replicas import NO_DUTY, STAND_BY, Duty, Held, duty_of
from node.state.folder import StateFolders
from node.state.memory import MemoryStore


def lease(partition: int, epoch: int) -> bool:
    return (partition, epoch) == (3, 7)


@pytest.mark.parametrize(
    ("held", "duty"),
    [
        (None, NO_DUTY),
        (Held(3, owner=False, epoch=7, revision=9), STAND_BY),
        (Held(3, owner=True, epoch=7, revision=9), Duty("own", 7)),
        (Held(3, owner=True, epoch=8, revision=9), STAND_BY),
        (Held(4, owner=True, epoch=7, revision=9), STAND_BY),
        (Held(3, owner=True, epoch=7, revision=9, moving_to="b"), Duty("release", 7, 9, "b")),
        (Held(3, owner=True, epoch=8, revision=9, moving_to="b"), Duty("release", 8, 9, "b")),
    ],
)
def test_a_duty_follows_from_the_assignment_and_the_lease(held: Held | None, duty: Duty) -> None:
    assert duty_of(held, lease) == duty


def test_an_owner_is_not_disturbed_by_what_does_not_concern_it() -> None:
    """Its standbys change: another revision of the same assignment."""
    before, after = (duty_of(Held(3, owner=True, epoch=7, revision=revision), lease) for revision in (1, 2))
    assert before == after


class Stores:
    """Opens stores that keep nothing but how far they are, and notes what was done."""

    def __init__(self, snapshot: bool) -> None:
        self.snapshot = snapshot
        self.offset = 0
        self.done: list[str] = []

    def open(self, path: Path) -> MemoryStore:
        path.mkdir(parents=True, exist_ok=True)
        self.done.append("open")
        store = MemoryStore()
        store.apply(Frame({}, 0, [], np.empty((0, 1))), self.offset)
        return store

    async def restore(self, partition: int, path: Path) -> bool:
        self.done.append(f"restore {partition}")
        self.offset = 7 if self.snapshot else 0
        return self.snapshot


async def test_a_snapshot_is_asked_for_where_there_is_no_state_yet(tmp_path: Path) -> None:
    stores = Stores(snapshot=True)
    folders = StateFolders(tmp_path, stores.open, stores.restore)
    state = folders.of(5)
    first = await state.open()
    assert await state.open() is first
    assert stores.done == ["restore 5", "open"]
    await state.close()
    await state.open()
    assert stores.done == ["restore 5", "open", "open"], "there is state now"
    assert await state.restore()
    assert state.store is None
    assert stores.done[3:] == ["restore 5"]
    assert folders.found() == [5]


async def test_damaged_state_is_kept_for_inspection_and_unused_state_is_not(tmp_path: Path) -> None:
    stores = Stores(snapshot=False)
    folders = StateFolders(tmp_path, stores.open, stores.restore)
    state = folders.of(5)
    await state.open()
    await state.set_aside()
    assert state.store is None
    assert (tmp_path / "5.damaged").is_dir()
    assert folders.found() == []
    await state.open()
    assert stores.done == ["restore 5", "open", "restore 5", "open"]
    await state.close()
    await state.open()
    assert stores.done[4:] == ["open", "restore 5", "open"], "there is a store, but nothing in it"
    await state.delete()
    assert folders.found() == []


async def test_damaged_state_that_can_not_be_set_aside_waits_for_the_operator(tmp_path: Path) -> None:
    """The node and its other partitions go on: what opens it next finds the damage again, and says what to do."""
    stores = Stores(snapshot=False)
    folders = StateFolders(tmp_path, stores.open, stores.restore)
    (tmp_path / "5.damaged").write_text("in the way")
    state = folders.of(5)
    await state.open()
    await state.set_aside()
    assert state.store is None
    assert folders.found() == [5]


async def test_the_loop_goes_on_while_a_store_is_closed(tmp_path: Path) -> None:
    """A store that was in use writes what it has in memory first, 145 ms for 50 MB, and waits for a copy being made."""
    went_on, waited = threading.Event(), []

    class Closing(MemoryStore):
        def close(self) -> None:
            waited.append(went_on.wait(10.0))

    state = StateFolders(tmp_path, lambda _: Closing()).of(0)
    await state.open()
    closing = asyncio.create_task(state.close())
    await asyncio.sleep(0)
    assert state.store is None
    went_on.set()
    await closing
    assert waited == [True]


async def test_without_snapshots_nothing_is_asked_for(tmp_path: Path) -> None:
    stores = Stores(snapshot=False)
    state = StateFolders(tmp_path, stores.open).of(0)
    await state.open()
    assert not await state.restore()
    assert stores.done == ["open"]
    assert state.store is not None, "what is there stays open"
