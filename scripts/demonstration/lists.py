"""Whom the lists of an interval model leave out, by the events alone and not by what the node says of itself."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from demonstration.data import Array, Events


def left_out(listed: Collection[tuple[int, int]], events: Events, partitions: Array, every_ms: int) -> int:
    """How many times a household is on no list though it had events before one's end and since the end before it.

    `listed` are (end of the interval, ms, household); `partitions` int64 [events] tell which run by themselves, and the
    events of each are in order of time. A customer's row is read as it is by then: what a household did after the end
    before may be in the run of that end already, or in the one before that where it outlasted its interval. A run still
    earlier had finished by then, or the intervals in between would have been skipped. One of the three must list it,
    and the newest interval must have a list. A partition without any list is passed by: a model begins with the end
    after the first that it sees, and a short stream may have no other.
    """
    found = 0
    keys = np.array(sorted(listed), np.int64).reshape(-1, 2)
    for number in np.unique(partitions).tolist():
        here = partitions == number
        households, times_ms = events.households[here], events.times_ms[here]
        mine = keys[np.isin(keys[:, 1], households)]
        if not len(mine):
            continue
        newest_ms = int(times_ms.max()) // every_ms * every_ms
        before = earlier = np.zeros(0, np.int64)
        start_ms = int(times_ms.min())
        for end_ms in np.union1d(mine[:, 0], [newest_ms]).tolist():
            came = np.unique(households[(times_ms >= start_ms) & (times_ms < end_ms)])
            now = mine[mine[:, 0] == end_ms, 1]
            found += len(np.setdiff1d(came, np.concatenate([earlier, before, now])))
            earlier, before, start_ms = before, now, end_ms
    return found
