"""(P) Running values within segments of events, in exactly the order in which a plain loop would add them.

Float addition is not associative, so a scan that adds in another order gives other bits. Segments are sorted by
length into classes, each class is laid out as a block of rounds, and a round adds one event to every segment of
its class. A padded place after a segment's end costs a little and disturbs nothing, because a scan never
looks ahead; padding is bounded, since lengths within a class differ at most by a factor of four.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from node.kernel.types import Floats, Ints

Words: TypeAlias = NDArray[np.uint64]

_CLASS_LENGTHS_MAX = np.array([1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 1 << 62])
_ROUNDS_LOOPED_MAX = 32
"""Up to here a loop over rounds beats `ufunc.accumulate`, which runs its inner loop over one segment at a time."""


class Block(NamedTuple):
    """Segments of one class at padded places `start + round * len(segments) + column`."""

    start: int
    rounds: int
    segments: Ints


_SORTED_BY_RADIX_MAX = 1 << 16
"""numpy's stable sort is a radix sort for 16-bit keys, five times as fast as for wider ones."""


class Segments:
    """Events cut into segments. `sequence` [n] gives the events, one segment after the other; `lengths` [s]
    (each at least 1) cut it.

    `events` [padded]: the event at each padded place. `places` [n]: the padded place of each entry of
    `sequence`. `numbers` [n]: its segment. `starts` [s]: where the segment starts in `sequence`.
    """

    def __init__(self, sequence: Ints, lengths: Ints) -> None:
        count = len(lengths)
        self.starts = np.cumsum(lengths) - lengths
        self.ends = self.starts + lengths
        self.numbers = np.repeat(np.arange(count), lengths)
        by_length = lengths.argsort(kind="stable") if count > 1 else np.zeros(count, np.int64)
        ascending = lengths[by_length]
        cuts = np.searchsorted(ascending, _CLASS_LENGTHS_MAX, "right").tolist()
        self.blocks: list[Block] = []
        stride, shift = np.empty(count, np.int64), np.empty(count, np.int64)
        positions, begin, start = [], 0, 0
        for end in cuts:
            if end == begin:
                continue
            members = by_length[begin:end]
            rounds, width = int(ascending[end - 1]), end - begin
            self.blocks.append(Block(start, rounds, members))
            firsts = self.starts[members]
            stride[members] = width
            shift[members] = np.arange(start, start + width) - firsts * width
            if rounds == 1:
                positions.append(firsts)
            else:
                grid = firsts + np.arange(rounds)[:, None]
                positions.append(np.minimum(grid, self.ends[members] - 1).ravel())
            begin, start = end, start + rounds * width
        self.padded = start
        self.events = sequence[np.concatenate(positions)] if positions else sequence[:0]
        self.places = np.arange(len(sequence)) * stride[self.numbers] + shift[self.numbers]

    def segments_at_places(self) -> Ints:
        """[padded]: the segment of each padded place."""
        return np.concatenate([np.tile(block.segments, block.rounds) for block in self.blocks])

    def last_places(self) -> Ints:
        """[s]: the padded place of each segment's last event."""
        places: Ints = self.places[self.ends - 1]
        return places

    def accumulate(self, operation: np.ufunc, values: Floats | Words, base: Floats | Words) -> None:
        """Turn contributions into running values, in place.

        `values` [planes, padded] holds each event's contribution at its padded place; `base` [planes, s] the
        value before the segment's first event.
        """
        planes = len(values)
        if not planes:
            return
        for start, rounds, segments in self.blocks:
            width = len(segments)
            block = values[:, start : start + rounds * width].reshape(planes, rounds, width)
            operation(base[:, segments], block[:, 0], out=block[:, 0])
            if rounds <= _ROUNDS_LOOPED_MAX:
                for number in range(1, rounds):
                    operation(block[:, number - 1], block[:, number], out=block[:, number])
            else:
                operation.accumulate(block, axis=1, out=block)


class ByCustomer(NamedTuple):
    """The events by customer, in order of arrival within each; customers without events are left out."""

    order: Ints
    """[n]: the events in that order."""
    customers: Ints
    """[c]: column of the customer in the rows."""
    segments: Segments
    """One for each of `customers`."""


def by_customer(rows: Ints, customers: int) -> ByCustomer:
    """`rows` [n]: the column, of so many, that each event's customer has."""
    order = (rows.astype(np.uint16) if customers <= _SORTED_BY_RADIX_MAX else rows).argsort(kind="stable")
    counts = np.bincount(rows, minlength=customers)
    present = np.flatnonzero(counts)
    return ByCustomer(order, present, Segments(order, counts[present]))
