"""Rows of the customers seen lately, as one matrix: a hit costs a dictionary look-up and a share of one gather."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np

from node.kernel.limits import KIB
from node.kernel.ports import StateStore
from node.kernel.types import Bools, Floats, Ints, Statistics
from node.state.codec import converted, unpack_images
from node.state.layout import Layout

_ABSENT = -1
_ROWS_FIRST = KIB
"""Rows that the matrix starts with; it doubles until it is full."""


class RowCache:
    """Holds the newest rows of one session; a session whose commit failed ends, and its cache with it.

    Rows given to `store` may not be in the state store before `applied` is called; until then they are kept apart
    as well, so that a row evicted meanwhile is not read from the state store as it was before.

    Bounded by `cache_bytes`; of the rows not used since the clock hand last passed, the next ones under the hand are
    evicted (the clock algorithm, Corbató 1968). One customer's row is one line of the matrix, so a hit touches
    neighbouring memory only; `load` turns the lines it gathered into the columns that the fold wants.
    """

    def __init__(self, store: StateStore, layout: Layout, cache_bytes: int) -> None:
        self._store = store
        self._cache_bytes = cache_bytes
        self._hits = self._misses = self._evictions = 0
        self._layout = layout
        self.clear()

    def clear(self) -> None:
        """Forget every row; the statistics stay."""
        self._rows_max = max(1, self._cache_bytes // (self._layout.slots * 8))
        self._matrix: Floats = np.empty((min(_ROWS_FIRST, self._rows_max), self._layout.slots))
        self._used: Bools = np.zeros(len(self._matrix), np.bool_)
        self._places: dict[str, int] = {}
        self._owners: list[str] = []
        self._hand = 0
        self._unapplied: tuple[Sequence[str], Floats] | None = None

    def applied(self) -> None:
        """The state store has all rows given to `store`."""
        self._unapplied = None

    def grow(self, layout: Layout) -> None:
        """Go on under a layout that the present one became; cached rows are converted."""
        before, self._layout = self._layout, layout
        rows_max = max(1, self._cache_bytes // (layout.slots * 8))
        held = len(self._owners)
        if self._unapplied is not None:
            customers, rows = self._unapplied
            self._unapplied = (customers, converted(layout, before.id, rows.T).T)
        if held > rows_max:
            unapplied = self._unapplied
            self.clear()
            self._unapplied = unapplied
            return
        matrix = np.empty((max(held, min(len(self._matrix), rows_max)), layout.slots))
        for first in range(0, held, _ROWS_FIRST):  # a few at a time: the matrix may be most of the node's memory
            part = slice(first, min(held, first + _ROWS_FIRST))
            matrix[part] = converted(layout, before.id, self._matrix[part])
        self._matrix, self._rows_max = matrix, rows_max
        used = np.zeros(len(matrix), np.bool_)
        used[:held] = self._used[:held]
        self._used = used

    def load(self, customers: Sequence[str]) -> Floats:
        """float64 [slots, customers], C order, the caller's own; each customer named once.

        Raises StoreUnavailable and StateCorrupt.
        """
        places = self._look_up(customers)
        missing = np.flatnonzero(places == _ABSENT)
        self._hits += len(places) - len(missing)
        self._misses += len(missing)
        lines = self._matrix.take(places, axis=0, mode="clip")
        hits = places[places != _ABSENT] if len(missing) else places
        self._used[hits] = True
        if len(missing):
            stored = self._store.load([customers[place].encode() for place in missing.tolist()])
            lines[missing] = unpack_images(self._layout, stored)
            self._overlay(lines, missing, customers)
        return np.ascontiguousarray(lines.T)

    def _overlay(self, lines: Floats, missing: Ints, customers: Sequence[str]) -> None:
        """Rows that were evicted before the state store had them."""
        if self._unapplied is None:
            return
        names, rows = self._unapplied
        columns = dict(zip(names, range(len(names)), strict=True))
        for place in missing.tolist():
            column = columns.get(customers[place])
            if column is not None:
                lines[place] = rows[:, column]

    def store(self, customers: Sequence[str], rows: Floats, lasting: int | None = None) -> None:
        """Take the rows of a commit that begins, float64 [slots, customers], under the present layout; the caller
        changes them no more. Those after the first `lasting` (None: all) are kept only where they are held already:
        a run over all customers must not drive out those with events."""
        count = len(customers) if lasting is None else lasting
        self._keep(customers[:count], rows[:, :count])
        if count < len(customers):
            places = self._look_up(customers[count:])
            held = np.flatnonzero(places != _ABSENT)
            self._matrix[places[held]] = rows[:, count + held].T
        self._unapplied = (customers, rows)

    def _keep(self, customers: Sequence[str], rows: Floats) -> None:
        if len(customers) > self._rows_max:
            self.clear()
            customers, rows = customers[: self._rows_max], rows[:, : self._rows_max]
        places = self._look_up(customers)
        missing = np.flatnonzero(places == _ABSENT)
        if len(missing):
            new = self._places_for(len(missing), places)
            for place, number in zip(new.tolist(), missing.tolist(), strict=True):
                self._places[customers[number]] = place
                self._owners[place] = customers[number]
            places[missing] = new
        self._matrix[places] = rows.T
        self._used[places] = True

    def _look_up(self, customers: Sequence[str]) -> Ints:
        return np.fromiter(map(self._places.get, customers, repeat(_ABSENT)), np.int64, len(customers))

    def _places_for(self, count: int, pinned: Ints) -> Ints:
        """`count` lines to fill: unused ones first, then evicted ones, but none of `pinned`."""
        held = len(self._owners)
        unused = min(count, self._rows_max - held)
        if held + unused > len(self._matrix):
            self._enlarge(held + unused)
        self._owners.extend(repeat("", unused))
        fresh = np.arange(held, held + unused)
        return fresh if unused == count else np.concatenate([fresh, self._evict(count - unused, pinned, fresh)])

    def _enlarge(self, rows: int) -> None:
        lines = min(self._rows_max, max(rows, 2 * len(self._matrix)))
        matrix = np.empty((lines, self._matrix.shape[1]))
        matrix[: len(self._owners)] = self._matrix[: len(self._owners)]
        used = np.zeros(lines, np.bool_)
        used[: len(self._used)] = self._used
        self._matrix, self._used = matrix, used

    def _evict(self, count: int, pinned: Ints, fresh: Ints) -> Ints:
        self._used[pinned[pinned != _ABSENT]] = True
        self._used[fresh] = True
        order = np.roll(np.arange(len(self._owners)), -self._hand)
        idle = order[~self._used[order]]
        if len(idle) >= count:
            victims = idle[:count]
            passed = order[: (int(victims[-1]) - self._hand) % len(order)]
            self._used[passed] = False
        else:
            self._used[:] = False
            spared = np.zeros(len(order), np.bool_)
            spared[pinned[pinned != _ABSENT]] = True
            spared[fresh] = True
            victims = order[~spared[order]][:count]
        self._hand = (int(victims[-1]) + 1) % len(order)
        for victim in victims.tolist():
            del self._places[self._owners[victim]]
        self._evictions += count
        return victims

    def statistics(self) -> Statistics:
        return {
            "rows": len(self._owners),
            "rows_max": self._rows_max,
            "bytes": self._matrix.nbytes,
            "bytes_max": self._cache_bytes,
            "hits": self._hits,
            "misses": self._misses,
            "evictions": self._evictions,
        }
