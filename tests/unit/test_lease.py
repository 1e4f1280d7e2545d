"""The lease by the numbers of its renewals, and what the leader keeps of reports."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.kernel.errors import PeerRefused
from node.kernel.limits import CLUSTER_RENEWALS_MAX, CLUSTER_REPORT_BYTES_MAX, STANDBY_UNKNOWN_FRAMES
from replication.catalog import Catalog, Node
from replication.catalog_machine import Agreed, Ending
from replication.lease import NUMBERS_A_PROCESS, Lease, same_process
from replication.ownership import PlanSettings, Progress
from replication.report import REPORT_QUIET_S, PeerReport, ReportBook, decode_report, encode_report, has_ended

LEASE_MS = 1000


@given(st.lists(st.tuples(st.floats(0, 2), st.booleans()), min_size=1, max_size=60), st.floats(0, 3))
def test_a_lease_counts_from_the_proposal_of_the_renewal_that_came_back(
    steps: list[tuple[float, bool]], after_s: float
) -> None:
    lease, now_s, proposed_s, returned = Lease(10), 0.0, {}, None
    for wait_s, comes_back in steps:
        now_s += wait_s
        number = lease.renew(now_s)
        assert number > max(proposed_s, default=9)
        proposed_s[number] = now_s
        if comes_back:
            returned = number
            lease.came_back(number)
    now_s += after_s
    left_ms = lease.left_ms(returned, now_s, LEASE_MS)
    if returned is None or now_s * 1000 - proposed_s[returned] * 1000 >= LEASE_MS:
        assert left_ms == 0
    elif len(proposed_s) < CLUSTER_RENEWALS_MAX:
        assert left_ms == pytest.approx(LEASE_MS - (now_s - proposed_s[returned]) * 1000)
    else:
        assert left_ms <= LEASE_MS - (now_s - proposed_s[returned]) * 1000 + 1e-6


def test_renewals_of_an_earlier_process_give_no_lease_and_old_ones_are_forgotten() -> None:
    lease = Lease(100)
    assert lease.left_ms(None, 0.0, LEASE_MS) == 0
    assert lease.left_ms(99, 0.0, LEASE_MS) == 0
    first = lease.renew(0.0)
    assert lease.left_ms(first, 0.5, LEASE_MS) == 500
    for _ in range(CLUSTER_RENEWALS_MAX):
        lease.renew(0.6)
    assert lease.left_ms(first, 0.7, LEASE_MS) == 0
    assert same_process(first, first + 1000)
    assert not same_process(first, first + NUMBERS_A_PROCESS)


def agreed(incarnation: int = 1, lease: int = 0, renewed_s: float | None = None) -> Agreed:
    node = Node("a", "a:1", "a:2", "", 1.0, incarnation, 0)
    return Agreed(Catalog(nodes={"a": node}, leases={"a": lease}), {} if renewed_s is None else {"a": renewed_s})


def report(
    number: int, offset: int = 1, incarnation: int = 1, serving: bool = False, frames_behind: int = 0
) -> PeerReport:
    return PeerReport("a", incarnation, number, {3: Progress(offset, frames_behind, 0, serving)}, {3: 9})


def test_the_newest_report_of_the_right_incarnation_counts() -> None:
    book = ReportBook(PlanSettings())
    book.begin(5.0)
    assert book.take(report(1), agreed(), 6.0)
    changes = book.changes
    assert not book.take(report(2), agreed(), 6.5)
    assert book.changes == changes
    assert not book.take(report(3, offset=2), agreed(), 7.0)
    assert book.changes == changes + 1
    assert not book.take(report(3, offset=3), agreed(), 8.0)
    assert not book.take(report(9, incarnation=2), agreed(), 8.0)
    assert book.take(report(4, offset=2, serving=True), agreed(), 9.0)
    assert (book.taken, book.dropped) == (4, 2)
    assert book.verified(["a"], agreed()) == {"a": {3: 9}}
    assert book.verified([], agreed()) == {}

    found = book.reports(agreed(), 1_000_000.0)
    assert found.since_ms == 1_005_000
    assert (found.nodes["a"].heard_ms, found.nodes["a"].reported_ms) == (1_009_000, 1_009_000)
    assert found.nodes["a"].partitions[3].offset == 2
    book.begin(10.0)
    assert book.reports(agreed(), 0.0).nodes == {}


@pytest.mark.parametrize("behind", [STANDBY_UNKNOWN_FRAMES, PlanSettings().caught_up_frames + 1])
def test_a_plan_may_have_waited_for_a_standby_that_has_caught_up(behind: int) -> None:
    book = ReportBook(PlanSettings())
    book.take(report(1, frames_behind=behind), agreed(), 1.0)
    assert book.take(report(2, frames_behind=PlanSettings().caught_up_frames), agreed(), 2.0)
    assert not book.take(report(3, frames_behind=0), agreed(), 3.0)


def test_a_plan_may_have_waited_for_a_node_that_has_tried_its_models() -> None:
    book = ReportBook(PlanSettings())
    trying = msgspec.structs.replace(report(1), tries_models=True)
    book.take(trying, agreed(), 1.0)
    assert book.reports(agreed(), 0.0).nodes["a"].tries_models
    changes = book.changes
    assert book.take(report(2), agreed(), 2.0)
    assert book.changes == changes + 1
    assert not book.reports(agreed(), 0.0).nodes["a"].tries_models


def test_renewals_say_that_a_quiet_node_is_there_until_it_is_another_process() -> None:
    book = ReportBook(PlanSettings())
    book.take(report(1), agreed(), 1.0)
    quiet = book.reports(agreed(lease=2, renewed_s=2.0), 0.0).nodes["a"]
    assert (quiet.heard_ms, quiet.reported_ms) == (2000, 2000)
    long = book.reports(agreed(lease=2, renewed_s=60.0), 0.0).nodes["a"]
    assert (long.heard_ms, long.reported_ms) == (60_000, int(1000 + REPORT_QUIET_S * 1000))
    for other in (agreed(lease=NUMBERS_A_PROCESS, renewed_s=2.0), agreed(incarnation=2, lease=2, renewed_s=2.0)):
        found = book.reports(other, 0.0).nodes["a"]
        assert (found.heard_ms, found.reported_ms, found.partitions) == (2000, None, {})
        assert book.verified(["a"], other) == {}, "the changelog is not cut behind what may be gone"
    changes = book.changes
    assert book.take(report(NUMBERS_A_PROCESS), agreed(lease=NUMBERS_A_PROCESS), 3.0)
    assert book.take(report(NUMBERS_A_PROCESS + 1, incarnation=2), agreed(incarnation=2), 3.0)
    assert book.changes == changes + 2


@pytest.mark.parametrize(
    ("ending", "renewed", "told_s", "ended"),
    [
        (None, 3, 1.0, False),
        (Ending(1, 3, 5.0), 3, 1.0, True),
        (Ending(1, 3, 5.0), 4, 5.0, True),  # a renewal that was under way came back since
        (Ending(1, 3, 5.0), 3, 5.1, False),  # it said something since
        (Ending(1, 3, 5.0), NUMBERS_A_PROCESS + 1, 1.0, False),  # another process has renewed since
        (Ending(2, 3, 5.0), 3, 1.0, False),  # of a disk that was lost
    ],
)
def test_an_ending_counts_of_the_process_that_has_the_lease(
    ending: Ending | None, renewed: int, told_s: float, ended: bool
) -> None:
    catalog = agreed(lease=renewed).catalog
    assert has_ended(ending, "a", catalog, told_s) == ended
    assert not has_ended(ending, "b", catalog, told_s)
    book = ReportBook(PlanSettings())
    book.take(report(1), agreed(), told_s)
    endings = {} if ending is None else {"a": ending}
    assert book.reports(Agreed(catalog, {"a": 1.0}, endings), 0.0).nodes["a"].ended == ended


def test_reports_are_bounded_and_read_strictly() -> None:
    assert decode_report(encode_report(report(7))) == report(7)
    for bad in (b"", b"\x93abc", encode_report(report(1))[:-1], bytes(CLUSTER_REPORT_BYTES_MAX + 1)):
        with pytest.raises(PeerRefused):
            decode_report(bad)
