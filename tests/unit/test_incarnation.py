"""Which incarnation a process is of, and that no number is given twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.kernel.clock import ManualClock
from node.kernel.errors import CatalogCorrupt
from replication.catalog import Catalog, Node, apply, encode_catalog
from replication.catalog_machine import CatalogMachine, Ending
from replication.commands import DrainNode, JoinNode, RenewLease, encode_command
from replication.incarnation import begin_process
from replication.lease import NUMBERS_A_PROCESS


def member(incarnation: int, lease: int = 0) -> Catalog:
    return Catalog(nodes={"a": Node("a", "a:1", "a:2", "", 1.0, incarnation, 0)}, leases={"a": lease})


def test_a_disk_keeps_its_incarnation_and_its_processes_never_share_numbers(tmp_path: Path) -> None:
    path = tmp_path / "incarnation"
    assert begin_process(path, "a", Catalog(), 5_000) == (5, 1)
    assert begin_process(path, "a", member(5, 3), 9_000) == (5, 1 + NUMBERS_A_PROCESS)
    assert begin_process(path, "a", member(5, 3 * NUMBERS_A_PROCESS), 1) == (5, 1 + 3 * NUMBERS_A_PROCESS)
    path.unlink()
    assert begin_process(path, "a", member(5, 70), 4_000) == (6, 71)
    assert begin_process(path, "a", member(9, 70), 4_000)[0] == 10
    path.unlink()
    assert begin_process(path, "a", Catalog(), 30_000)[0] == 30
    path.write_text("{")
    with pytest.raises(CatalogCorrupt, match="delete it"):
        begin_process(path, "a", Catalog(), 1)


def test_the_machine_answers_refusals_and_dates_renewals_when_it_applies_them() -> None:
    clock = ManualClock()
    machine = CatalogMachine(clock)
    join = JoinNode(revision=0, name="a", raft_address="a:1", http_address="a:2", incarnation=2)
    assert machine.apply(encode_command(join)) == ""
    assert machine.apply(encode_command(join)) == ""
    assert "no node b" in machine.apply(encode_command(DrainNode(revision=1, name="b", draining=True)))
    for number, wait_ms in ((4, 1000), (4, 500), (3, 500), (5, 1000)):
        clock.advance(wait_ms)
        assert machine.apply(encode_command(RenewLease(revision=1, name="a", incarnation=2, number=number))) == ""
    assert machine.agreed.renewed_s == {"a": 3.0}
    assert "join first" in machine.apply(encode_command(RenewLease(revision=1, name="a", incarnation=1, number=9)))

    clock.advance(1000)
    machine.restore(machine.dump())
    assert machine.agreed.renewed_s == {"a": 3.0}
    ahead = apply(machine.agreed.catalog, RenewLease(revision=1, name="a", incarnation=2, number=9))
    machine.restore(encode_catalog(ahead))
    assert machine.agreed.renewed_s == {"a": 4.0}
    with pytest.raises(CatalogCorrupt):
        machine.apply(b"\xc1")


def test_the_machine_notes_which_process_has_ended_until_the_member_is_there_again() -> None:
    clock = ManualClock()
    machine = CatalogMachine(clock)
    for command in (
        JoinNode(revision=0, name="a", raft_address="a:1", http_address="a:2", incarnation=2),
        JoinNode(revision=1, name="b", raft_address="b:1", http_address="b:2", incarnation=2),
        RenewLease(revision=1, name="a", incarnation=2, number=4),
    ):
        machine.apply(encode_command(command))
    clock.advance(1500)
    for name in ("a", "b", "stranger"):
        machine.ended(name)
    assert machine.agreed.endings == {"a": Ending(2, 4, 1.5)}, "the others have no lease to end"
    machine.apply(encode_command(RenewLease(revision=1, name="a", incarnation=2, number=5)))
    assert machine.agreed.endings == {"a": Ending(2, 4, 1.5)}
    machine.connected("a")
    assert machine.agreed.endings == {}
    assert machine.agreed.catalog.leases == {"a": 5}
