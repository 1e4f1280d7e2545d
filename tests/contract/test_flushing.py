"""Flushing beside an open partition's cycles, on the store it is for."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from test_store import ENVIRONMENT, frame, row

from node.kernel.clock import ManualClock
from node.kernel.errors import StoreUnavailable
from node.state.flushing import Flushing, FlushTurns
from node.state.rocksdb import RocksStore

DUE_MS = 60_001
STEPS_MAX = 100_000


async def nothing() -> None:
    """There is no commit to wait for."""


async def ended(flushing: Flushing) -> None:
    for _ in range(STEPS_MAX):
        if await flushing.step(nothing):
            return
        await asyncio.sleep(0)
    raise AssertionError("the flush does not end")


async def test_frames_are_applied_while_rows_are_written_and_all_are_on_disk_when_it_ends(tmp_path: Path) -> None:
    store, clock = RocksStore(tmp_path / "state", ENVIRONMENT), ManualClock()
    flushing = Flushing(store, FlushTurns(60.0), clock)
    settled: list[int] = []

    async def settle() -> None:
        settled.append(store.changelog_offset())

    store.apply(frame([b"%05d" % number for number in range(20_000)], 1.0), 1)
    assert not await flushing.step(settle)
    clock.advance(DUE_MS)
    assert not await flushing.step(settle)
    for applied in range(2, STEPS_MAX):
        store.apply(frame([b"00000"], float(applied)), applied)
        if await flushing.step(settle):
            break
        await asyncio.sleep(0)
    assert settled == [applied], "frames were applied until then"
    assert applied > 2
    shutil.copytree(tmp_path / "state", tmp_path / "crashed")
    store.close()
    crashed = RocksStore(tmp_path / "crashed", ENVIRONMENT)
    assert crashed.changelog_offset() == applied
    assert crashed.load([b"00000", b"19999"]) == [row(float(applied)), row(1.0)]
    crashed.close()


async def test_a_flush_is_due_once_an_interval(tmp_path: Path) -> None:
    store, clock = RocksStore(tmp_path / "state", ENVIRONMENT), ManualClock()
    flushing = Flushing(store, FlushTurns(60.0), clock)
    for number in (1, 2):
        store.apply(frame([b"a"], float(number)), number)
        assert not await flushing.step(nothing)
        await asyncio.sleep(0)
        assert not await flushing.step(nothing), "nothing has begun"
        clock.advance(DUE_MS)
        await ended(flushing)
    store.close()


async def test_partitions_flush_one_after_another_also_when_one_is_closed_meanwhile(tmp_path: Path) -> None:
    turns, clock = FlushTurns(60.0), ManualClock()
    stores = [RocksStore(tmp_path / name, ENVIRONMENT) for name in ("one", "other")]
    one, other = [Flushing(store, turns, clock) for store in stores]
    clock.advance(DUE_MS)
    await one.step(nothing)
    assert not await other.step(nothing)
    await ended(one)
    assert not await other.step(nothing), "it begins now"
    clock.advance(DUE_MS)
    await other.close()
    await one.step(nothing)
    await ended(one)
    for store in stores:
        store.close()


async def test_a_store_is_closed_once_no_thread_writes_it_and_a_failure_is_told(tmp_path: Path) -> None:
    store, clock = RocksStore(tmp_path / "state", ENVIRONMENT), ManualClock()
    flushing = Flushing(store, FlushTurns(60.0), clock)
    store.apply(frame([b"a"], 1.0), 1)
    clock.advance(DUE_MS)
    await flushing.step(nothing)
    await flushing.close()
    store.close()
    clock.advance(DUE_MS)
    await flushing.step(nothing)
    with pytest.raises(StoreUnavailable):
        await ended(flushing)
