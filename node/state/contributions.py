"""(P) What each event of a micro-batch contributes to each kind of accumulator, as columns in arrival order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from node.kernel.types import ANY_EVENT, EVENT_TIME, Bools, Column, EventColumns, Floats, Ints
from node.kernel.windows import SKETCH_WORDS, Accumulator, Input
from node.state.layout import Layout
from node.state.planes import PlaneSet
from node.state.segments import Segments, Words

_NO_RANK = -1.0
_SKETCH_BITS_MASK = np.uint64(64 * SKETCH_WORDS - 1)


class Contributions:
    """Columns by input, each made once however many accumulators take it in.

    An event contributes to an input when its type is the input's, its mask `where` holds and its field is present.
    A filter whose fields are not declared any more has no mask, and a number can't be had from a text: then nothing
    contributes.
    Pivots that the customers lack are set in `rows` [slots, customers] to the first value that arrived.
    """

    def __init__(
        self, layout: Layout, types: Sequence[str], rows: Floats, events: EventColumns, masks: Mapping[str, Bools]
    ) -> None:
        self._layout = layout
        self._types = types
        self._rows = rows
        self._events = events
        self._masks = masks
        self._contributing: dict[Input, Bools] = {}
        self._values: dict[Accumulator, Floats] = {}
        self._pivoted: dict[Input, Floats] = {}

    def contributing(self, source: Input) -> Bools:
        """bool [n]"""
        found = self._contributing.get(source)
        if found is None:
            found = self._contributing[source] = self._contributing_events(source)
        return found

    def _contributing_events(self, source: Input) -> Bools:
        events = self._events
        if source.event == ANY_EVENT:
            matching = np.ones(len(events), np.bool_)
        elif source.event in self._types:
            matching = events.types == self._types.index(source.event)
        else:
            return np.zeros(len(events), np.bool_)
        if source.where:
            mask = self._masks.get(source.where)
            if mask is None:
                return np.zeros(len(events), np.bool_)
            matching &= mask
        if source.field and source.field != EVENT_TIME:
            column = events.fields.get(source.field)
            if column is None:
                return np.zeros(len(events), np.bool_)
            matching &= present(column)
        return matching

    @cached_property
    def seconds(self) -> Floats:
        return self._events.times_ms / 1000.0

    def _numbers(self, source: Input) -> Floats | None:
        """The input's field as float64 [n], NaN where missing; None for a text. -0.0 becomes 0.0, so that the
        lowest and highest of equal values have the same bits in whichever order they came."""
        if source.field == EVENT_TIME:
            return self.seconds
        column = self._events.fields.get(source.field)
        return None if column is None or column.dtype == np.object_ else column + 0.0

    def values(self, accumulator: Accumulator) -> Floats:
        """float64 [n]: what each event adds to, or puts up against, the accumulator's value."""
        found = self._values.get(accumulator)
        if found is None:
            found = self._values[accumulator] = self._accumulator_values(accumulator)
        return found

    def _accumulator_values(self, accumulator: Accumulator) -> Floats:
        source = accumulator.source
        contributing = self.contributing(source)
        if accumulator.kind == "count":
            return contributing.astype(np.float64)
        nothing = {"min": np.inf, "max": -np.inf}.get(accumulator.kind, 0.0)
        numbers = self._numbers(source)
        if numbers is None:
            return np.full(len(contributing), nothing)
        if accumulator.kind in ("shifted", "squared"):
            numbers = numbers - self._pivots(source, contributing, numbers)
            if accumulator.kind == "squared":
                numbers *= numbers
        return np.where(contributing, numbers, nothing)

    def _pivots(self, source: Input, contributing: Bools, numbers: Floats) -> Floats:
        """The pivot of each event's customer; a customer's first value ever is the pivot from then on."""
        found = self._pivoted.get(source)
        if found is None:
            rows = self._events.rows
            pivots = self._rows[self._layout.pivots[source]]
            new = np.flatnonzero(contributing & np.isnan(pivots[rows]))[::-1]
            pivots[rows[new]] = numbers[new]
            found = self._pivoted[source] = pivots[rows]
        return found

    def _sketch_columns(self, accumulator: Accumulator) -> Words:
        """uint64 [words, n]: the one bit that each event's value sets."""
        source = accumulator.source
        contributing = self.contributing(source)
        bits = self._hashed(source.field) & _SKETCH_BITS_MASK
        word, bit = bits >> np.uint64(6), np.uint64(1) << (bits & np.uint64(63))
        numbers = np.arange(SKETCH_WORDS, dtype=np.uint64)[:, None]
        columns: Words = np.where((word == numbers) & contributing, bit, np.uint64(0))
        return columns

    def _hashed(self, field: str) -> Words:
        column = self.seconds if field == EVENT_TIME else self._events.fields.get(field)
        if column is None:
            return np.zeros(len(self._events), np.uint64)
        return _text_hashes(column) if column.dtype == np.object_ else number_hashes(column + 0.0)

    @cached_property
    def _by_time(self) -> Ints:
        """Events by time; events of one time in order of arrival."""
        return self._events.times_ms.argsort(kind="stable")

    def running(self, planes: PlaneSet, base: Floats, segments: Segments, dead: Bools | None = None) -> Floats:
        """float64 [planes, padded]: the planes' values after each event, at the event's padded place.

        `base` [planes, segments] is the value before the first event of each segment. Events whose `dead` [n]
        is true contribute nothing.
        """
        running = np.empty((len(planes), segments.padded))
        at = segments.events
        dead_at = None if dead is None else dead[at]
        scans = (
            (np.add, planes.summed, ("count", "sum", "shifted", "squared")),
            (np.minimum, planes.lowest, ("min",)),
            (np.maximum, planes.highest, ("max",)),
        )
        for operation, part, kinds in scans:
            block = running[part]
            for plane, accumulator in enumerate(planes.sources(*kinds)):
                np.take(self.values(accumulator), at, out=block[plane], mode="clip")
            if dead_at is not None:
                block[:, dead_at] = planes.initial[part, None]
            segments.accumulate(operation, block, base[part])
        self._run_sketches(planes, running, base, segments, dead_at)
        self._run_firsts_and_lasts(planes, running, base, segments, dead_at)
        return running

    def _run_sketches(
        self, planes: PlaneSet, running: Floats, base: Floats, segments: Segments, dead_at: Bools | None
    ) -> None:
        words = running.view(np.uint64)[planes.sketched]
        for number, accumulator in enumerate(planes.sources("sketch")):
            columns = self._sketch_columns(accumulator)
            words[number * SKETCH_WORDS : (number + 1) * SKETCH_WORDS] = columns[:, segments.events]
        if dead_at is not None:
            words[:, dead_at] = 0
        segments.accumulate(np.bitwise_or, words, base.view(np.uint64)[planes.sketched])

    def _run_firsts_and_lasts(
        self, planes: PlaneSet, running: Floats, base: Floats, segments: Segments, dead_at: Bools | None
    ) -> None:
        for kind, part in (("first", planes.first), ("last", planes.last)):
            for number, accumulator in enumerate(planes.sources(kind)):  # type: ignore[arg-type]
                pair = slice(part.start + 2 * number, part.start + 2 * number + 2)
                running[pair] = self._run_pair(accumulator, base[pair], segments, dead_at)

    def _run_pair(self, accumulator: Accumulator, base: Floats, segments: Segments, dead_at: Bools | None) -> Floats:
        """[2, padded]: time and value of the first or last event so far; ranks by (time, arrival) are scanned."""
        by_time, at = self._by_time, segments.events
        ranks = np.empty(len(by_time))
        ranks[by_time] = np.arange(len(by_time))
        numbers = self._numbers(accumulator.source)
        contributing = self.contributing(accumulator.source)[at]
        if numbers is None:
            numbers, contributing = self.seconds, np.zeros(len(at), np.bool_)
        if dead_at is not None:
            contributing &= ~dead_at
        held = base[:, segments.segments_at_places()]
        times = self._events.times_ms[at]
        earlier = accumulator.kind == "first"
        contributing &= times < held[0] if earlier else times >= held[0]
        nothing = float(len(by_time)) if earlier else _NO_RANK
        keys = np.where(contributing, ranks[at], nothing)[None]
        start = np.full((1, base.shape[1]), nothing)
        segments.accumulate(np.minimum if earlier else np.maximum, keys, start)
        kept = keys[0] == nothing
        chosen = by_time[np.where(kept, 0, keys[0]).astype(np.int64)]
        return np.where(kept, held, np.stack([self._events.times_ms[chosen], numbers[chosen]]))


def present(column: Column) -> Bools:
    """bool [n]: where the event has the field."""
    there: Bools = column != np.array(None) if column.dtype == np.object_ else column == column
    return there


def _text_hashes(column: Column) -> Words:
    """uint64 [n]: BLAKE2b of the text, cut to 64 bits; each distinct text is hashed once, by a loop, because
    hashing is C code on one text at a time. 0 where missing."""
    known: dict[str | None, int] = {None: 0}
    for text in set(column.tolist()) - {None}:
        known[text] = int.from_bytes(
            hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little"
        )
    return np.array([known[text] for text in column.tolist()], np.uint64)


def number_hashes(numbers: Floats) -> Words:
    """uint64 [n]: the finaliser of SplitMix64 (Steele, Lea, Flood 2014) over the number's bits."""
    mixed = numbers.view(np.uint64).copy()
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
