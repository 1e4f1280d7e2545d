"""The bounds of what a tenant's models print."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.kernel.limits import (
    TENANT_LOG_BURST_BYTES,
    TENANT_LOG_BYTES_MAX,
    TENANT_LOG_BYTES_PER_SECOND,
    TENANT_LOG_LINE_BYTES_MAX,
    TENANTS_MAX,
)
from tenants.memory import MemoryUse, parse_rollup
from tenants.tenant_log import LINE_OVERHEAD_BYTES, READ_BYTES, Lines, TenantLog, TenantLogs


@given(st.lists(st.binary(max_size=40)))
def test_lines_do_not_depend_on_how_the_stream_is_cut(pieces: list[bytes]) -> None:
    lines = Lines()
    found = [line for piece in pieces for line in lines.cut(piece)] + lines.end()
    whole = b"".join(pieces).split(b"\n")
    assert found == (whole if whole[-1] else whole[:-1])


@given(st.lists(st.sampled_from([b"x" * 10_000, b"\n", b"y\n"]), max_size=20))
def test_no_line_is_longer_than_its_bound_and_no_byte_is_lost(pieces: list[bytes]) -> None:
    lines = Lines()
    found = [line for piece in pieces for line in lines.cut(piece)] + lines.end()
    assert all(len(line) <= TENANT_LOG_LINE_BYTES_MAX for line in found)
    assert b"".join(found) == b"".join(pieces).replace(b"\n", b"")


@given(st.lists(st.lists(st.binary(max_size=2000), max_size=300), max_size=6))
def test_the_newest_lines_stay_within_the_bound(batches: list[list[bytes]]) -> None:
    log = TenantLog()
    for batch in batches:
        log.add(batch, 5, 7)
    given_lines = [text.decode("utf-8", "replace") for batch in batches for text in batch]
    kept = log.lines()
    assert [line.text for line in kept] == given_lines[len(given_lines) - len(kept) :]
    assert log.dropped == len(given_lines) - len(kept)
    assert sum(len(line.text.encode()) for line in kept) <= TENANT_LOG_BYTES_MAX
    assert len(kept) <= TENANT_LOG_BYTES_MAX // LINE_OVERHEAD_BYTES
    assert kept == [] or log.lines(after=kept[0].number) == kept[1:]


def test_lines_that_are_no_utf_8_stay_within_the_bound_however_many_come() -> None:
    log = TenantLog()
    for _ in range(200):  # each byte is decoded to a character of three
        log.add([b"\xff" * TENANT_LOG_LINE_BYTES_MAX], 5, 7)
    kept = sum(len(line.text.encode()) + LINE_OVERHEAD_BYTES for line in log.lines())
    assert kept <= TENANT_LOG_BYTES_MAX < kept + 4 * TENANT_LOG_LINE_BYTES_MAX


def test_a_flood_is_taken_at_the_bounded_rate() -> None:
    log, now, taken = TenantLog(), 1000.0, 0
    while now < 1060:
        log.add([b""] * READ_BYTES, 0, 1)  # the worst: nothing but line ends
        taken += READ_BYTES * LINE_OVERHEAD_BYTES
        now += max(log.wait_seconds(now), 1e-6)
    spare = TENANT_LOG_BURST_BYTES + 2 * READ_BYTES * LINE_OVERHEAD_BYTES
    assert taken <= (now - 1000) * TENANT_LOG_BYTES_PER_SECOND + spare


def test_a_few_lines_are_taken_at_once() -> None:
    log = TenantLog()
    log.add([b"hello"] * 100, 0, 1)
    assert log.wait_seconds(5.0) == 0


def test_logs_of_many_tenants_are_bounded() -> None:
    logs = TenantLogs()
    for number in range(TENANTS_MAX + 5):
        logs.of(f"t{number}")
    assert logs.find("t0") is None
    assert logs.find("t5") is not None
    assert logs.of("t5") is logs.find("t5")


ROLLUP = """560000000000-7fff00000000 ---p 00000000 00:00 0                          [rollup]
Rss:              100 kB
Pss:               40 kB
Shared_Clean:      50 kB
Shared_Dirty:      20 kB
Private_Clean:      5 kB
Private_Dirty:     25 kB
"""


def test_memory_is_own_and_shared() -> None:
    assert parse_rollup(ROLLUP) == MemoryUse(30 * 1024, 70 * 1024, 40 * 1024)
    assert parse_rollup("") is None
