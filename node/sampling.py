"""(P) A share of the customers, sticky: the same on every node, and one that grows keeps those it has.

A customer's place is the crc32 of its id, started with that of what it is asked for and mixed (the finalizer of
MurmurHash3, Appleby 2011), as a share of 2^32.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np

from node.kernel.types import Bools

_FIRST: Final = np.uint32(0x85EBCA6B)
_SECOND: Final = np.uint32(0xC2B2AE35)


def sampled(customers: Sequence[str], purpose: str, share: float) -> Bools:
    """bool[len(customers)]: whether each is among the share; shares for other purposes are independent of it."""
    seed = zlib.crc32(purpose.encode())
    places = np.fromiter((zlib.crc32(one.encode(), seed) for one in customers), np.uint32, len(customers))
    places ^= places >> np.uint32(16)
    places *= _FIRST
    places ^= places >> np.uint32(13)
    places *= _SECOND
    places ^= places >> np.uint32(16)
    return places < share * 2.0**32
