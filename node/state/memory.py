"""The state store in memory: the same contract as RocksDB's, for tests, the simulator and throw-away runs."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from node.kernel.backfills import BackfillState, encode_backfill
from node.kernel.chunks import decode_chunk, encode_chunk
from node.kernel.errors import StateCorrupt, StoreUnavailable
from node.kernel.interval_runs import encode_run
from node.kernel.types import Frame, IntervalRun, SequenceChunk
from node.state.codec import sequence_key, split


class MemoryStore:
    """Loses everything when the process ends; the changelog has it all."""

    def __init__(self) -> None:
        self._rows: dict[bytes, bytes] = {}
        self._keys: list[bytes] | None = []
        self._chunks: dict[bytes, bytes] = {}
        self._changelog_offset = 0
        self._progress: dict[str, int] = {}
        self._counters: dict[str, int] = {}
        self._runs: dict[str, IntervalRun] = {}
        self._event_time_ms = 0
        self._layout: bytes | None = None
        self._backfill = BackfillState()

    def load(self, customers: Sequence[bytes]) -> list[bytes | None]:
        return [self._rows.get(customer) for customer in customers]

    def apply(self, frame: Frame, changelog_offset: int) -> None:
        self._rows.update(zip(frame.customers, split(frame.rows), strict=True))
        self._keys = None
        for chunk in frame.appended:
            self._chunks[sequence_key(chunk.triggers.line_name, chunk.number)] = encode_chunk(chunk)
        for model, number in frame.cursors.items():
            first, end = sequence_key(model, 0), sequence_key(model, number)
            for key in [key for key in self._chunks if first <= key < end]:
                del self._chunks[key]
        self._changelog_offset = changelog_offset
        self._progress, self._counters = dict(frame.progress), dict(frame.counters)
        self._layout = frame.layout or self._layout
        held = {**self._runs, **frame.runs}
        self._runs = {model: run for model, run in held.items() if run is not None}
        self._event_time_ms = frame.event_time_ms
        self._backfill = frame.backfill or self._backfill

    def changelog_offset(self) -> int:
        return self._changelog_offset

    def progress(self) -> Mapping[str, int]:
        return self._progress

    def layout(self) -> bytes | None:
        return self._layout

    def counters(self) -> Mapping[str, int]:
        return self._counters

    def runs(self) -> Mapping[str, IntervalRun]:
        return dict(self._runs)

    def event_time_ms(self) -> int:
        return self._event_time_ms

    def chunks(self, limit: int, after: tuple[str, int] | None = None) -> list[SequenceChunk]:
        behind = b"" if after is None else sequence_key(*after)
        return [decode_chunk(self._chunks[key]) for key in sorted(key for key in self._chunks if key > behind)[:limit]]

    def chunk(self, model: str, number: int) -> SequenceChunk:
        encoded = self._chunks.get(sequence_key(model, number))
        if encoded is None:
            raise StateCorrupt(f"the sequence log has no chunk {number} of {model}; open the partition again")
        return decode_chunk(encoded)

    def scan(self, after: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        if self._keys is None:
            self._keys = sorted(self._rows)
        start = 0 if after is None else bisect.bisect_right(self._keys, after)
        return [(key, self._rows[key]) for key in self._keys[start : start + limit]]

    def backfill(self) -> BackfillState:
        return self._backfill

    def entries(self) -> Iterator[tuple[str, bytes, bytes]]:
        """(family, key, value) of all rows, chunks, runs and the backfill, in key order in each family; for digests."""
        yield from (("profiles", key, self._rows[key]) for key in sorted(self._rows))
        yield from (("sequence", key, self._chunks[key]) for key in sorted(self._chunks))
        runs = sorted((model.encode(), encode_run(run)) for model, run in self._runs.items())
        yield from (("runs", model, run) for model, run in runs)
        if self._backfill.fills:
            yield "backfill", b"", encode_backfill(self._backfill)

    def flush(self) -> None:
        """Nothing is kept on disk."""

    def flush_rows(self) -> None:
        """Nor ahead of it."""

    def checkpoint(self, folder: Path) -> int:
        raise StoreUnavailable(f"a store in memory is not copied to {folder}; its changelog has all of it")

    def close(self) -> None:
        """Nothing is open."""

    def statistics(self) -> Mapping[str, object]:
        return {"kind": "memory", "customers": len(self._rows), "chunks": len(self._chunks)}
