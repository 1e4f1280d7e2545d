"""Waiting in tests: for a condition, never for a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")
WAIT_S_MAX = 60.0
POLL_S = 0.005


async def until(condition: Callable[[], Found], what: str = "", seconds_max: float = WAIT_S_MAX) -> Found:
    """What `condition` gives once that is true; fails after `seconds_max`, saying what it gave last."""
    found = condition()
    try:
        async with asyncio.timeout(seconds_max):
            while not found:
                await asyncio.sleep(POLL_S)  # between two looks, as nothing tells
                found = condition()
    except TimeoutError:
        raise AssertionError(f"{what or condition} did not come about in {seconds_max} s: {found!r}") from None
    return found
