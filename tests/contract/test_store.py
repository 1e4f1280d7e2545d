"""One contract for every state store, run over memory and RocksDB; then what only a disk can get wrong."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from frame_support import as_sent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.kernel.backfills import BackfillState, Fill
from node.kernel.digest import bucket_entries, differences, differing_buckets, differing_entries, digest_store
from node.kernel.errors import StateCorrupt, StoreUnavailable
from node.kernel.limits import MIB
from node.kernel.ports import StateStore
from node.kernel.types import FeatureRows, Frame, IntervalRun, ModelName, Schedule, SequenceChunk, Triggers
from node.state.memory import MemoryStore
from node.state.rocksdb import RocksEnvironment, RocksStore

ENVIRONMENT = RocksEnvironment.of(16 * MIB, 8 * MIB)


@pytest.fixture(params=["memory", "rocksdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StateStore]:
    made: StateStore = MemoryStore() if request.param == "memory" else RocksStore(tmp_path / "state", ENVIRONMENT)
    yield made
    made.close()


def frame(customers: list[bytes], value: float = 0.0, **rest: object) -> Frame:
    rows = np.full((len(customers), 3), value)
    return Frame(**({"progress": {}, "layout_id": 1, "customers": customers, "rows": rows} | rest))  # type: ignore[arg-type]


def row(value: float) -> bytes:
    return np.full(3, value).tobytes()


def chunk(model: str, number: int, rows: int = 2) -> SequenceChunk:
    numbers = np.arange(float(rows * 2)).reshape(rows, 2)
    numbers[0, 1] = np.nan
    names = tuple(f"c{n}" for n in range(rows))
    columns = np.arange(rows) + number
    features = FeatureRows(("amount", "channel"), numbers, {"channel": ["web", None][:rows]})
    name = ModelName(*model.split("/"))
    return SequenceChunk(number, Triggers(name, "ab" * 32, names, columns, columns + 1, columns, columns + 9, features))


def numbers(chunks: list[SequenceChunk]) -> list[tuple[str, int]]:
    return [(str(found.triggers.name), found.number) for found in chunks]


def test_an_empty_store_says_so(store: StateStore) -> None:
    assert store.load([b"a", b"b"]) == [None, None]
    assert store.load([]) == []
    assert (store.changelog_offset(), dict(store.progress()), dict(store.counters())) == (0, {}, {})
    assert store.layout() is None
    assert store.chunks(10) == []
    assert store.scan(None, 10) == []


def test_a_frame_is_applied_whole(store: StateStore) -> None:
    store.apply(
        frame(
            [b"a", b"b"], 1.5, progress={"events": 7}, counters={"late": 3}, layout=b"L1", appended=[chunk("t/m", 0)]
        ),
        12,
    )
    assert store.load([b"b", b"x", b"a"]) == [row(1.5), None, row(1.5)]
    assert store.changelog_offset() == 12
    assert dict(store.progress()) == {"events": 7}
    assert dict(store.counters()) == {"late": 3}
    assert store.layout() == b"L1"
    assert numbers(store.chunks(10)) == [("t/m", 0)]


def test_interval_runs_are_put_kept_and_forgotten_by_frames(store: StateStore) -> None:
    assert (dict(store.runs()), store.event_time_ms()) == ({}, 0)
    one = IntervalRun(Schedule(every_ms=60_000), 7, 420_000, "v", False, False, False, b"c\xff", 3)
    other = IntervalRun(Schedule(at_ms=5, zone="Europe/Berlin", whole=True), 1, 2)
    store.apply(replace(frame([]), runs={"t/m": one, "t/n": other}, event_time_ms=9), 1)
    assert (dict(store.runs()), store.event_time_ms()) == ({"t/m": one, "t/n": other}, 9)
    store.apply(replace(frame([b"a"], 1.0), runs={"t/n": None}, event_time_ms=12), 2)
    assert (dict(store.runs()), store.event_time_ms()) == ({"t/m": one}, 12)
    assert [family for family, _, _ in store.entries()] == ["profiles", "runs"]  # type: ignore[attr-defined]


def test_how_far_windows_are_filled_is_kept_until_a_frame_says_otherwise(store: StateStore) -> None:
    assert store.backfill() == BackfillState()
    fill = Fill((1, 2), 5, 6, {"t": 3}, {"t": 9}, 4, 1, ("x",), False)
    store.apply(replace(frame([]), backfill=BackfillState((fill,))), 1)
    store.apply(frame([b"a"], 1.0), 2)
    assert store.backfill() == BackfillState((fill,))
    assert [family for family, _, _ in store.entries()] == ["profiles", "backfill"]  # type: ignore[attr-defined]
    done = BackfillState((replace(fill, done=True),))
    store.apply(as_sent(replace(frame([]), backfill=done)), 3)
    assert store.backfill() == done


def test_a_later_frame_replaces_rows_and_keeps_the_layout(store: StateStore) -> None:
    store.apply(frame([b"a", b"b"], 1.0, layout=b"L1", counters={"late": 1}), 1)
    store.apply(frame([b"b"], 2.0, progress={"e": 1}), 2)
    assert store.load([b"a", b"b"]) == [row(1.0), row(2.0)]
    assert store.layout() == b"L1"
    assert (store.changelog_offset(), dict(store.counters())) == (2, {})


def test_applying_a_frame_twice_changes_nothing(store: StateStore) -> None:
    once = frame([b"a"], 1.0, appended=[chunk("t/m", 4), chunk("t/m", 5)], cursors={"t/m": 5})
    for _ in range(2):
        store.apply(once, 3)
        assert numbers(store.chunks(10)) == [("t/m", 5)]
        assert store.load([b"a"]) == [row(1.0)]


def test_a_chunk_comes_back_as_it_went(store: StateStore) -> None:
    store.apply(frame([], appended=[chunk("t/m", 3)]), 1)
    (found,) = store.chunks(1)
    sent = chunk("t/m", 3).triggers
    assert found.number == 3
    assert (found.triggers.name, found.triggers.version, found.triggers.customers) == (
        sent.name,
        sent.version,
        sent.customers,
    )
    for column in ("topics", "offsets", "types", "times_ms"):
        np.testing.assert_array_equal(getattr(found.triggers, column), getattr(sent, column))
    np.testing.assert_array_equal(found.triggers.rows.numbers, sent.rows.numbers)
    assert dict(found.triggers.rows.texts) == dict(sent.rows.texts)


def test_chunks_come_by_model_and_number(store: StateStore) -> None:
    sent = [chunk(model, number) for model in ("t/mm", "t/m", "s/m") for number in (255, 256, 2, 70_000)]
    store.apply(frame([], appended=sent), 1)
    in_order = [(model, number) for model in ("s/m", "t/m", "t/mm") for number in (2, 255, 256, 70_000)]
    assert numbers(store.chunks(100)) == in_order
    assert numbers(store.chunks(5)) == in_order[:5]
    assert numbers([store.chunk(*key) for key in in_order]) == in_order
    for absent in (("t/m", 3), ("t", 2)):
        with pytest.raises(StateCorrupt, match="no chunk"):
            store.chunk(*absent)
    paged: list[SequenceChunk] = []
    while page := store.chunks(3, after=(str(paged[-1].triggers.name), paged[-1].number) if paged else None):
        paged += page
    assert numbers(paged) == in_order


def test_a_cursor_removes_the_chunks_of_its_model_below_it(store: StateStore) -> None:
    store.apply(frame([], appended=[chunk(model, number) for model in ("t/m", "t/m2") for number in range(4)]), 1)
    store.apply(frame([], cursors={"t/m": 3}), 2)
    assert numbers(store.chunks(100)) == [("t/m", 3), *(("t/m2", number) for number in range(4))]


def test_scan_pages_in_key_order(store: StateStore) -> None:
    customers = [b"a", b"a\0", b"b", b"\xc3\xa9", b"z" * 300]
    store.apply(frame(customers[::-1], 1.0), 1)
    pages, after = [], None
    while page := store.scan(after, 2):
        pages.append([key for key, _ in page])
        after = page[-1][0]
    assert pages == [[b"a", b"a\0"], [b"b", b"z" * 300], [b"\xc3\xa9"]]
    assert store.scan(None, 1) == [(b"a", row(1.0))]


def test_what_holds_the_same_has_the_same_digest_and_what_differs_is_named(store: StateStore) -> None:
    other = MemoryStore()
    for number in range(3):
        sent = frame(
            [b"a", b"b%d" % number], float(number), progress={"e": number}, layout=b"L", counters={"late": 1},
            appended=[chunk("t/m", number)], cursors={"t/m": 1},
        )  # fmt: skip
        store.apply(sent, number)
        other.apply(as_sent(sent), number)
    assert digest_store(store) == digest_store(other)
    assert (digest_store(other).rows, digest_store(other).chunks) == (4, 2)
    store.apply(frame([b"a"], 7.0, progress={"e": 3}), 3)
    ours, theirs = digest_store(store), digest_store(other)
    (bucket,) = differing_buckets(ours, theirs)
    assert [line.split(":")[0] for line in differences(ours, theirs)][:3] == [
        "changelog_offset",
        "progress",
        "counters",
    ]
    assert differing_entries(bucket_entries(store, bucket), bucket_entries(other, bucket)) == ["customer a"]


operations = st.lists(
    st.tuples(
        st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), unique=True),
        st.lists(st.tuples(st.sampled_from(["t/m", "t/n"]), st.integers(0, 9)), max_size=3, unique=True),
        st.dictionaries(st.sampled_from(["t/m", "t/n"]), st.integers(0, 10), max_size=2),
        st.booleans(),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations)
def test_rocksdb_holds_what_memory_holds_also_after_opening_again(
    tmp_path: Path, steps: list[tuple[list[bytes], list[tuple[str, int]], dict[str, int], bool]]
) -> None:
    shutil.rmtree(tmp_path / "both", ignore_errors=True)
    memory, rocks = MemoryStore(), RocksStore(tmp_path / "both", ENVIRONMENT)
    for number, (customers, chunks, cursors, again) in enumerate(steps):
        sent = frame(
            customers, float(number), progress={"e": number}, appended=[chunk(*key) for key in chunks], cursors=cursors,
            counters={"late": number}, layout=b"L%d" % number if again else None,
        )  # fmt: skip
        memory.apply(sent, number)
        rocks.apply(sent, number)
        if again:
            rocks.close()
            rocks = RocksStore(tmp_path / "both", ENVIRONMENT)
        assert contents(rocks) == contents(memory)
    assert digest_store(rocks) == digest_store(memory)
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    assert rocks.checkpoint(tmp_path / "copy") == memory.changelog_offset()
    copy = RocksStore(tmp_path / "copy", ENVIRONMENT)
    assert contents(copy) == contents(memory)
    copy.close()
    rocks.close()


def contents(store: StateStore) -> tuple[object, ...]:
    return (
        store.scan(None, 100), numbers(store.chunks(100)), store.changelog_offset(), dict(store.progress()),
        dict(store.counters()), store.layout(),
    )  # fmt: skip


# --- what only a disk can get wrong ---------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from node.kernel.errors import StoreUnavailable
from node.kernel.limits import MIB
from node.kernel.types import Frame
from node.state.rocksdb import RocksEnvironment, RocksStore
mode, folder = sys.argv[1], Path(sys.argv[2])
environment = RocksEnvironment.of(4 * MIB, 1 * MIB)
store = RocksStore(folder, environment)
generator = np.random.default_rng(1)

def crash():
    for number in range(1, 10**9):
        rows = np.full((100, 128), float(number))
        customers = [b"%08d" % customer for customer in range(100)]
        store.apply(Frame({"e": number}, 1, customers, rows, counters={"n": number}), number)
        if number % 50 == 0:
            store.flush()
        print(number, flush=True)

def full():
    ballast = folder.parent / "ballast"
    ballast.write_bytes(bytes(4 * MIB))
    for action in (fill, store.flush):
        try:
            action()
        except StoreUnavailable as failure:
            print("StoreUnavailable", failure)
    store.close()
    ballast.unlink()
    again = RocksStore(folder, environment)
    applied = again.changelog_offset()
    held = len(again.scan(None, 10**6))
    again.apply(Frame({}, 1, [b"x"], generator.random((1, 128))), applied + 1)
    again.flush()
    again.close()
    print("applied", applied, "held", held)

def fill():
    for number in range(1, 10**6):
        customers = [b"%08d" % customer for customer in range(number * 100, number * 100 + 100)]
        store.apply(Frame({"e": number}, 1, customers, generator.random((100, 128))), number)

{"crash": crash, "full": full}[mode]()
"""


def test_after_kill_9_the_families_agree(tmp_path: Path) -> None:
    """The offset that is found is that of the rows that are found, and nothing flushed is lost."""
    folder = tmp_path / "state"
    for kill_at in (130, 777):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "crash", str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= kill_at:
                process.kill()
                break
        process.stdout.close()
        process.wait()
        store = RocksStore(folder, ENVIRONMENT)
        offset = store.changelog_offset()
        assert offset >= kill_at // 50 * 50 > 0
        assert (dict(store.progress()), dict(store.counters())) == ({"e": offset}, {"n": offset})
        found = {
            value for stored in store.load([b"%08d" % c for c in range(100)]) for value in np.frombuffer(stored or b"")
        }
        assert found == {float(offset)}
        store.close()
        shutil.rmtree(folder)


def test_a_crash_between_the_families_of_a_flush_leaves_the_offset_behind(tmp_path: Path) -> None:
    store = RocksStore(tmp_path / "state", ENVIRONMENT)
    store.apply(frame([b"a"], 1.0, progress={"e": 1}), 1)
    store.flush()
    store.apply(frame([b"a"], 2.0, progress={"e": 2}), 2)
    store.flush_rows()
    shutil.copytree(tmp_path / "state", tmp_path / "crashed")
    store.close()
    crashed = RocksStore(tmp_path / "crashed", ENVIRONMENT)
    assert crashed.load([b"a"]) == [row(2.0)]
    assert crashed.changelog_offset() == 1
    crashed.close()


def test_a_copy_taken_while_frames_come_in_is_as_of_one_frame(tmp_path: Path) -> None:
    store = RocksStore(tmp_path / "state", ENVIRONMENT)
    done, applied = threading.Event(), threading.Event()

    def write() -> None:
        for number in itertools.count(1):
            store.apply(frame([b"%03d" % c for c in range(200)], float(number), progress={"e": number}), number)
            applied.set()
            if done.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    offsets = []
    for number in range(5):
        applied.clear()
        offsets.append(store.checkpoint(tmp_path / f"copy-{number}"))
        assert applied.wait(60)
    done.set()
    writer.join()
    store.close()
    assert offsets == sorted(offsets)
    assert offsets[-1] > offsets[0]
    for number, offset in enumerate(offsets):
        copy = RocksStore(tmp_path / f"copy-{number}", ENVIRONMENT)
        assert (copy.changelog_offset(), dict(copy.progress())) == (offset, {"e": offset} if offset else {})
        assert {value for _, value in copy.scan(None, 1000)} == ({row(float(offset))} if offset else set())
        copy.close()


def test_a_copy_of_a_closed_store_and_one_into_a_folder_that_is_there_are_refused(tmp_path: Path) -> None:
    store = RocksStore(tmp_path / "state", ENVIRONMENT)
    store.apply(frame([b"a"], 1.0), 1)
    store.checkpoint(tmp_path / "copy")
    with pytest.raises(StoreUnavailable):
        store.checkpoint(tmp_path / "copy")
    assert (tmp_path / "copy" / "CURRENT").exists()
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.checkpoint(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def filled(folder: Path) -> None:
    store = RocksStore(folder, ENVIRONMENT)
    generator = np.random.default_rng(1)
    for number in range(1, 9):
        customers = [b"%08d" % c for c in range(number * 500, number * 500 + 500)]
        rows = generator.random((500, 64))
        store.apply(Frame({"e": number}, 1, customers, rows, b"L", [chunk("t/m", number, 400)]), number)
    store.flush()
    store.close()


def everything(folder: Path) -> None:
    """Read it all, with a block cache of its own: one that is shared still holds good copies of damaged blocks."""
    store = RocksStore(folder, RocksEnvironment.of(16 * MIB, 8 * MIB))
    try:
        assert len(store.scan(None, 10_000)) == 4000
        assert len(store.chunks(100)) == 8
        assert len(store.load([b"%08d" % c for c in range(500, 4500)])) == 4000
        store.layout()
    finally:
        store.close()


def largest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size)


def overwrite(path: Path, share: float, data: bytes = b"\xa5" * 64) -> None:
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * share))
        file.write(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a table's block": lambda folder: overwrite(largest(folder, "*.sst"), 0.4),
    "a table's end": lambda folder: os.truncate(
        largest(folder, "*.sst"), largest(folder, "*.sst").stat().st_size - 100
    ),
    "a table gone": lambda folder: largest(folder, "*.sst").unlink(),
    "the manifest": lambda folder: overwrite(largest(folder, "MANIFEST-*"), 0.3),
    "the manifest gone": lambda folder: largest(folder, "MANIFEST-*").unlink(),
    "CURRENT": lambda folder: (folder / "CURRENT").write_bytes(b"garbage\n"),
    "CURRENT empty": lambda folder: (folder / "CURRENT").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_as_such(tmp_path: Path, damage: str) -> None:
    filled(tmp_path / "state")
    everything(tmp_path / "state")
    DAMAGES[damage](tmp_path / "state")
    with pytest.raises(StateCorrupt, match="delete that folder"):
        everything(tmp_path / "state")


def test_a_folder_that_is_open_elsewhere_is_unavailable_and_free_after_close(tmp_path: Path) -> None:
    store = RocksStore(tmp_path / "state", ENVIRONMENT)
    store.apply(frame([b"a"]), 1)
    store.scan(None, 1)
    with pytest.raises(StoreUnavailable, match="lock"):
        RocksStore(tmp_path / "state", ENVIRONMENT)
    store.close()
    store.close()
    RocksStore(tmp_path / "state", ENVIRONMENT).close()


def test_a_full_disk_is_unavailable_until_it_has_room(tmp_path: Path, small_disk: Callable[[Path, int], None]) -> None:
    small_disk(tmp_path / "disk", 8)
    command = [sys.executable, "-c", PROGRAM, "full", str(tmp_path / "disk/state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    *failures, last = done.stdout.splitlines()
    assert len(failures) == 2, done.stdout + done.stderr
    assert all(line.startswith("StoreUnavailable") for line in failures)
    assert "No space left on device" in failures[0]
    _, applied, _, held = last.split()
    assert int(held) == int(applied) * 100 > 0
