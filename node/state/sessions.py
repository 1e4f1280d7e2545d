"""(P) Which session each event belongs to.

A customer's session is of events, of whatever type, that are at most the gap apart. A row holds the newest one only. An
event after its newest event by more than the gap begins another. One that comes out of order still belongs to it if it
is no further before the event that began it than the gap; older ones are late, and counted so. So the session that an
event belongs to never depends on how far late events have stretched it, which makes this a matter of two running
maxima instead of a loop. In particular a late event does not join two sessions: the older one is gone by then.

A session's number is the time of the event that began it, in ms: numbers rise with sessions, and the fold takes them as
it takes the numbers of tiles.
"""

from __future__ import annotations

import numpy as np

from node.kernel.types import Bools, Floats, Ints
from node.state.layout import NO_TILE, Group
from node.state.segments import Segments

_ALL = slice(None)


def session_tiles(group: Group, rows: Floats, customers: Ints, segments: Segments, times_ms: Ints) -> Ints:
    """[n]: the number of each event's session, by the order of `segments`, one for each of `customers` [c]: columns of
    `rows` [slots, customers] as they are before the events. `times_ms` [n]: by order of arrival. A late event has a
    number below its customer's session's."""
    own, begins = _begins(group, rows, customers, segments, times_ms)
    begun = np.full((1, segments.padded), -np.inf)
    begun[0, segments.places] = np.where(begins, own, -np.inf)
    segments.accumulate(np.maximum, begun, rows[group.head_slot][customers][None])
    numbers = begun[0, segments.places]
    tiles: Ints = np.where(own < numbers - group.width_ms, numbers - 1, numbers).astype(np.int64)
    return tiles


def session_begins(group: Group, rows: Floats, customers: Ints, segments: Segments, times_ms: Ints) -> Bools:
    """bool [n]: whether each event begins a session, all as in `session_tiles`."""
    return _begins(group, rows, customers, segments, times_ms)[1]


def _begins(group: Group, rows: Floats, customers: Ints, segments: Segments, times_ms: Ints) -> tuple[Floats, Bools]:
    """The events' times, float64 [n] by the order of `segments`, and which of them begin a session."""
    places = segments.places
    times = times_ms.astype(np.float64)[segments.events]
    held = newest_ms(group, rows, customers)
    newest = times[None].copy()
    segments.accumulate(np.maximum, newest, held[None])
    before = np.empty(len(places))
    before[1:] = newest[0, places[:-1]]
    before[segments.starts] = held
    own = times[places]
    begins: Bools = own > before + group.width_ms
    return own, begins


def going_on(group: Group, rows: Floats, times_ms: Ints) -> Bools:
    """bool [customers]: whether an event of each of `times_ms` would belong to the session that the row holds."""
    begun = rows[group.head_slot]
    reaches = (times_ms >= begun - group.width_ms) & (times_ms <= newest_ms(group, rows) + group.width_ms)
    there: Bools = reaches & (begun != NO_TILE)
    return there


def newest_ms(group: Group, rows: Floats, at: Ints | slice = _ALL) -> Floats:
    """Of columns `at` of `rows` [slots, customers]: time of the session's newest event, -inf where there is none."""
    times_ms: Floats = np.rint(rows[group.newest_slot, at] * 1000.0)
    return times_ms
