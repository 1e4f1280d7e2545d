"""The state store in RocksDB: one database for each partition. The only module that knows rocksdict.

The write-ahead log is off, because the changelog is the log: after a crash the store is as of some earlier frame,
and `changelog_offset` says which. A frame is one write batch over all column families, and full memtables are flushed
for all families at once (atomic flush), so the families never disagree on disk.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rocksdict import (
    BlockBasedOptions,
    Cache,
    Checkpoint,
    DBCompressionType,
    Env,
    Options,
    Rdict,
    WriteBatch,
    WriteBufferManager,
    WriteOptions,
)

from node.kernel.backfills import BackfillState, decode_backfill, encode_backfill
from node.kernel.chunks import decode_chunk, encode_chunk
from node.kernel.errors import HeadraceError, StateCorrupt, StoreUnavailable
from node.kernel.interval_runs import decode_run, encode_run
from node.kernel.limits import MIB, WRITE_STALL_MS_MAX
from node.kernel.types import Frame, IntervalRun, SequenceChunk
from node.state.codec import sequence_key, split

FAMILIES = ("profiles", "history", "inferences", "sequence", "identity", "meta")
"""`meta` comes last: see `RocksStore.flush`."""

_HEAD = b"head"
_LAYOUT = b"layout"
_BACKFILL = b"backfill"
_RUN = b"run "
"""And the text of the model's name: its interval run."""
_FILTER_BITS_PER_KEY = 10
_STALLED = "Write stall"
_STALL_PAUSE_MS = 10
_DAMAGE = ("Corruption", "checksum mismatch", "bad magic number", "No such file or directory")


class _Head(msgspec.Struct, array_like=True, frozen=True):
    """What the last applied frame left, in one value."""

    changelog_offset: int = 0
    progress: dict[str, int] = {}
    counters: dict[str, int] = {}
    event_time_ms: int = 0


@dataclass(frozen=True, slots=True)
class RocksEnvironment:
    """Memory that all partitions of a node share: one block cache, and one bound on memtables charged to it."""

    cache: Any
    write_buffers: Any
    compacting: bool = True

    @staticmethod
    def of(
        cache_bytes: int = 128 * MIB, write_buffer_bytes: int = 64 * MIB, compacting: bool = True
    ) -> RocksEnvironment:
        """Larger write buffers mean fewer flushes and a longer fold after a crash; a store that is opened only to be
        read need not compact. Raises ValueError when the buffers do not fit into the cache they are charged to."""
        if not 0 < write_buffer_bytes <= cache_bytes:
            raise ValueError(f"write buffers of {write_buffer_bytes} bytes do not fit a cache of {cache_bytes}")
        cache = Cache(cache_bytes)
        # Of all stores of the process. Compactions may lag; the loop beside them serves every tenant. Of two flushes,
        # one may be of a full memtable.
        threads = Env()
        threads.lower_thread_pool_cpu_priority()
        threads.set_high_priority_background_threads(2)
        manager = WriteBufferManager.new_write_buffer_manager_with_cache(write_buffer_bytes, False, cache)
        return RocksEnvironment(cache, manager, compacting)

    def options(self) -> Any:
        table = BlockBasedOptions()
        table.set_block_cache(self.cache)
        table.set_bloom_filter(_FILTER_BITS_PER_KEY, False)
        table.set_cache_index_and_filter_blocks(True)
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.create_missing_column_families(True)
        options.set_atomic_flush(True)
        options.set_write_buffer_manager(self.write_buffers)
        options.set_block_based_table_factory(table)
        options.set_compression_type(DBCompressionType.lz4())
        options.set_keep_log_file_num(4)
        options.set_max_open_files(256)
        options.set_max_file_opening_threads(1)  # RocksDB would start 16, which takes longer than the few files do
        options.set_disable_auto_compactions(not self.compacting)
        return options


class RocksStore:
    """See `node.kernel.ports.StateStore`. Opening raises StateCorrupt for a damaged folder, StoreUnavailable for a
    disk that refuses or a folder that another store has open.

    `apply`, `flush` and `checkpoint` exclude each other and may run in any thread; everything else belongs to the
    thread of the partition.
    """

    def __init__(self, path: Path, environment: RocksEnvironment) -> None:
        self._path = path
        self._writing = threading.Lock()
        self._open = threading.Lock()
        with self._failures("opened"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = Rdict(
                str(path), environment.options(), {family: environment.options() for family in FAMILIES}
            )
        try:
            with self._failures("opened"):
                self._families = {family: self._database.get_column_family(family) for family in FAMILIES}
                self._handles = {family: self._database.get_column_family_handle(family) for family in FAMILIES}
                self._unlogged = WriteOptions()
                self._unlogged.disable_wal = True  # type: ignore[method-assign, assignment]
                self._unlogged.no_slowdown = True
            self._head = self._read_head()
        except HeadraceError:
            self.close()
            raise

    @contextlib.contextmanager
    def _failures(self, action: str) -> Iterator[None]:
        """rocksdict raises bare Exceptions; what kind of failure it was is in the text only."""
        try:
            yield
        except HeadraceError:
            raise
        except Exception as failure:
            text = str(failure)
            if any(sign in text for sign in _DAMAGE):
                raise StateCorrupt(
                    f"the state in {self._path} could not be {action}, it is damaged: {text}; "
                    "delete that folder, it is rebuilt from the changelog"
                ) from failure
            raise StoreUnavailable(
                f"the state in {self._path} could not be {action}: {text}; free or mend the disk, "
                "the partition retries by itself"
            ) from failure

    def _read_head(self) -> _Head:
        with self._failures("read"):
            stored = self._families["meta"].get(_HEAD)
        if stored is None:
            return _Head()
        try:
            return msgspec.msgpack.decode(stored, type=_Head)
        except msgspec.MsgspecError as failure:
            raise StateCorrupt(
                f"the progress in {self._path} can't be read: {failure}; "
                "delete that folder, it is rebuilt from the changelog"
            ) from failure

    def load(self, customers: Sequence[bytes]) -> list[bytes | None]:
        if not customers:
            return []
        with self._failures("read"):
            rows: Any = self._families["profiles"].get(list(customers))
        return list(rows)

    def apply(self, frame: Frame, changelog_offset: int) -> None:
        head = _Head(changelog_offset, dict(frame.progress), dict(frame.counters), frame.event_time_ms)
        with self._failures("written"), self._writing:
            for attempt in range(WRITE_STALL_MS_MAX // _STALL_PAUSE_MS + 1):
                if attempt:
                    time.sleep(_STALL_PAUSE_MS / 1000)
                if self._written(frame, head):
                    break
            else:
                raise StoreUnavailable(
                    f"the state in {self._path} took no write for {WRITE_STALL_MS_MAX} ms (WRITE_STALL_MS_MAX): its "
                    "flushes lag or fail; free or mend the disk, the partition retries by itself"
                )
            self._head = head

    def _written(self, frame: Frame, head: _Head) -> bool:
        """False for a stall. RocksDB would wait it out, for ever on a full disk, and rocksdict with the GIL held."""
        try:
            self._database.write(self._batch(frame, head), self._unlogged)
        except Exception as failure:
            if _STALLED in str(failure):
                return False
            raise
        return True

    def _batch(self, frame: Frame, head: _Head) -> Any:
        batch, sequence, meta = WriteBatch(raw_mode=True), self._handles["sequence"], self._handles["meta"]
        put, profiles = batch.put, self._handles["profiles"]
        for customer, row in zip(frame.customers, split(frame.rows), strict=True):
            put(customer, row, profiles)
        for chunk in frame.appended:
            put(sequence_key(chunk.triggers.line_name, chunk.number), encode_chunk(chunk), sequence)
        for model, number in frame.cursors.items():
            batch.delete_range(sequence_key(model, 0), sequence_key(model, number), sequence)
        if frame.layout is not None:
            put(_LAYOUT, frame.layout, meta)
        for model, run in frame.runs.items():
            if run is None:
                batch.delete(_RUN + model.encode(), meta)
            else:
                put(_RUN + model.encode(), encode_run(run), meta)
        if frame.backfill is not None:
            put(_BACKFILL, encode_backfill(frame.backfill), meta)
        put(_HEAD, msgspec.msgpack.encode(head), meta)
        return batch

    def changelog_offset(self) -> int:
        return self._head.changelog_offset

    def progress(self) -> Mapping[str, int]:
        return self._head.progress

    def counters(self) -> Mapping[str, int]:
        return self._head.counters

    def runs(self) -> Mapping[str, IntervalRun]:
        found: dict[str, IntervalRun] = {}
        for key, value in self._entries("meta", _RUN):
            if not key.startswith(_RUN):
                break
            found[key.removeprefix(_RUN).decode()] = decode_run(value)
        return found

    def event_time_ms(self) -> int:
        return self._head.event_time_ms

    def layout(self) -> bytes | None:
        with self._failures("read"):
            encoded: bytes | None = self._families["meta"].get(_LAYOUT)
        return encoded

    def backfill(self) -> BackfillState:
        with self._failures("read"):
            encoded: bytes | None = self._families["meta"].get(_BACKFILL)
        return BackfillState() if encoded is None else decode_backfill(encoded)

    def chunks(self, limit: int, after: tuple[str, int] | None = None) -> list[SequenceChunk]:
        start = b"" if after is None else sequence_key(*after) + b"\0"
        found: list[SequenceChunk] = []
        for _, value in self._entries("sequence", start):
            if len(found) >= limit:
                break
            found.append(decode_chunk(value))
        return found

    def chunk(self, model: str, number: int) -> SequenceChunk:
        with self._failures("read"):
            encoded: bytes | None = self._families["sequence"].get(sequence_key(model, number))
        if encoded is None:
            raise StateCorrupt(
                f"the state in {self._path} has no chunk {number} of {model} in its sequence log; "
                "delete that folder, it is rebuilt from the changelog"
            )
        return decode_chunk(encoded)

    def scan(self, after: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        start = b"" if after is None else after + b"\0"
        for entry in self._entries("profiles", start):
            if len(found) >= limit:
                break
            found.append(entry)
        return found

    def _entries(self, family: str, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Entries in key order from `start` on. A bad block ends an iteration like the end of the family does,
        so the iterator's status is asked for; no upper bound is set, since rocksdict does not keep its bytes alive."""
        with self._failures("read"):
            entries = self._families[family].iter()
            entries.seek(start)
            while entries.valid():
                yield entries.key(), entries.value()
                entries.next()
            entries.status()

    def flush(self) -> None:
        """Put everything applied on disk. May run in another thread; the GIL is released meanwhile.

        A flush by hand is of one family only, atomic flush or not. So `meta` goes last: after a crash in between, the
        stored offset is too old rather than too new, and folding the same frames again gives the same rows.
        """
        with self._failures("flushed"), self._writing:
            self._flush()

    def _flush(self) -> None:
        for family in FAMILIES:
            self._families[family].flush()

    def flush_rows(self) -> None:
        """See `StateStore`; `meta` is left to `flush`, as its offset must not reach the disk before the rows do."""
        with self._failures("flushed"):
            for family in FAMILIES[:-1]:
                self._families[family].flush()

    def checkpoint(self, folder: Path) -> int:
        """A copy of the store as of one frame, in a new `folder` beside its own; the changelog offset it goes on from.

        Tables are linked, not copied. May run in another thread: what is in memtables is first flushed with the GIL
        released and frames let through, since the checkpoint itself, which flushes the rest of all families
        together, holds both.
        Raises StoreUnavailable; nothing is left of the folder then.
        """
        with self._failures("copied"), self._open:
            if not self._families:
                raise StoreUnavailable(
                    f"the state in {self._path} was closed before it was copied; copy it once it is open"
                )
            self.flush_rows()
            with self._writing:
                folder.parent.mkdir(parents=True, exist_ok=True)
                if folder.exists():
                    raise StoreUnavailable(
                        f"the state in {self._path} can't be copied to {folder}: that is there already"
                    )
                try:
                    Checkpoint(self._database).create_checkpoint(str(folder))
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                return self._head.changelog_offset

    def entries(self) -> Iterator[tuple[str, bytes, bytes]]:
        """(family, key, value) of all rows, chunks, runs and the backfill, in key order in each family; for digests."""
        for family in ("profiles", "sequence"):
            for key, value in self._entries(family, b""):
                yield family, key, value
        for model, run in sorted((model.encode(), encode_run(run)) for model, run in self.runs().items()):
            yield "runs", model, run
        if (state := self.backfill()).fills:
            yield "backfill", b"", encode_backfill(state)

    def close(self) -> None:
        """May run in another thread. What is in memory is flushed first: RocksDB does it by itself, with the GIL held.

        The lock on the folder outlives the database while a handle to a family lives, so those go before it.
        """
        with self._open, self._writing:
            with contextlib.suppress(Exception):
                self._flush()
            self._families, self._handles = {}, {}
            with contextlib.suppress(Exception):
                self._database.close()

    def statistics(self) -> Mapping[str, object]:
        with self._failures("read"):
            profiles = self._families["profiles"]
            return {
                "kind": "rocksdb",
                "customers": profiles.property_int_value("rocksdb.estimate-num-keys"),
                "chunks": self._families["sequence"].property_int_value("rocksdb.estimate-num-keys"),
                "disk_bytes": sum(self._sizes("rocksdb.total-sst-files-size")),
                "memtable_bytes": sum(self._sizes("rocksdb.cur-size-all-mem-tables")),
            }

    def _sizes(self, name: str) -> list[int]:
        return [family.property_int_value(name) or 0 for family in self._families.values()]
