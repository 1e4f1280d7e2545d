"""Batches compressed here are what the client's own reader reads back, record for record."""

from __future__ import annotations

import pytest
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given
from hypothesis import strategies as st

from node.batches import Compression, record_batches

records = st.lists(
    st.tuples(st.none() | st.binary(max_size=20), st.binary(max_size=400), st.just([("reason", b"why")])), max_size=40
)


@pytest.mark.parametrize("compression", ["none", "gzip", "snappy", "lz4", "zstd"])
@given(rows=records)
def test_what_was_appended_is_read_back(compression: Compression, rows: list[tuple[bytes, bytes, list]]) -> None:
    read = []
    for batch in record_batches(rows, compression, transactional=True):
        batch._set_producer_state(7, 1, 0)
        memory = MemoryRecords(bytes(batch._build()))
        while memory.has_next():
            part = memory.next_batch()
            assert part.validate_crc()
            assert part.is_transactional
            read += [(record.key, record.value, list(record.headers)) for record in part]
    assert read == rows


def test_records_that_do_not_fit_one_batch_go_on_in_the_next() -> None:
    value = b"x" * 500_000
    batches = record_batches([(b"k", value, [])] * 5, "lz4", transactional=False)
    assert [batch.record_count() for batch in batches] == [1, 1, 1, 1, 1]


def test_compression_makes_repetitive_batches_small() -> None:
    rows: list[tuple[bytes | None, bytes | None, list]] = [(b"key", b"the same value again " * 10, [])] * 100
    plain, packed = (len(record_batches(rows, name, False)[0]._build()) for name in ("none", "lz4"))
    assert packed * 5 < plain
