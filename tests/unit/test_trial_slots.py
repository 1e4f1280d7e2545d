"""Trials share their slots: a tenant has one at most, and what loads for ever keeps nobody waiting for long."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from node.kernel.clock import SystemClock
from tenants.trial_slots import TrialSlots

pytestmark = pytest.mark.asyncio
TURN_SECONDS = 0.02


class Trials:
    def __init__(self) -> None:
        self.slots = TrialSlots(2, TURN_SECONDS, SystemClock())
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.begun: Counter[str] = Counter()

    def start(self, tenant: str, work: Callable[[], Awaitable[object]]) -> asyncio.Task[str]:
        async def trial() -> str:
            self.begun[tenant] += 1
            self.running[tenant] += 1
            self.most[tenant] = max(self.most[tenant], self.running[tenant])
            self.most["all"] = max(self.most["all"], self.running.total())
            try:
                await work()
            finally:
                self.running[tenant] -= 1
            return tenant

        return asyncio.ensure_future(self.slots.run(tenant, trial))


async def soon() -> None:
    await asyncio.sleep(0)


async def test_a_tenant_has_one_slot_and_there_are_two() -> None:
    trials = Trials()
    started = [trials.start(tenant, soon) for tenant in "aaabbcaad"]
    async with asyncio.timeout(10):
        assert await asyncio.gather(*started) == list("aaabbcaad")
    assert trials.most == {"a": 1, "b": 1, "c": 1, "d": 1, "all": 2}


async def test_models_that_load_for_ever_give_way_and_are_tried_to_the_end_once_nobody_waits() -> None:
    trials, end = Trials(), asyncio.Event()
    async with asyncio.timeout(10):
        endless = [trials.start(tenant, end.wait) for tenant in ("x", "y")]
        while trials.running.total() < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for tenant in "abcabc":
            assert await trials.start(tenant, soon) == tenant
        again = [trials.start(tenant, end.wait) for tenant in ("x", "y", "z")]
        assert await trials.start("d", soon) == "d"
        end.set()
        assert await asyncio.gather(*endless, *again) == ["x", "y", "x", "y", "z"]
    assert trials.begun["x"] + trials.begun["y"] > 2, "one gave way at least"
    assert trials.most["all"] == 2


async def test_one_that_is_slow_gets_longer_turns_while_others_keep_coming() -> None:
    trials, done = Trials(), False

    async def slow() -> None:
        await asyncio.sleep(TURN_SECONDS * 3)

    async def come(tenant: str) -> None:
        while not done:
            await trials.start(tenant, lambda: asyncio.sleep(TURN_SECONDS / 4))

    async with asyncio.timeout(10):
        others = [asyncio.ensure_future(come(tenant)) for tenant in "abc"]
        assert await trials.start("slow", slow) == "slow"
        done = True
        await asyncio.gather(*others)


async def test_one_that_is_called_off_leaves_its_slot_or_place_and_an_error_is_passed_on() -> None:
    trials, end = Trials(), asyncio.Event()

    async def broken() -> None:
        raise ValueError("broken")

    async with asyncio.timeout(10):
        waiting = [trials.start(tenant, end.wait) for tenant in "abc"]
        while trials.running.total() < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        assert await trials.start("d", soon) == "d"
        with pytest.raises(ValueError, match="broken"):
            await trials.start("e", broken)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.gather(*waiting)
    assert not trials.running.total()


async def test_the_slot_comes_back_from_a_trial_that_is_replaced_while_it_ends() -> None:
    """Such as one whose turn is over, when a newer pair comes while its worker is being ended."""
    trials, ended = Trials(), asyncio.Event()

    async def ends_slowly() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await ended.wait()

    async with asyncio.timeout(10):
        first = trials.start("a", ends_slowly)
        for _ in range(2):
            while not trials.running["a"]:  # noqa: ASYNC110
                await asyncio.sleep(0)
            first.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await first
        ended.set()
        assert await trials.start("a", soon) == "a"
