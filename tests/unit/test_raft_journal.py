"""The journal of a Raft node on a disk that fills up."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.kernel.errors import StoreUnavailable
from replication.raft_journal import Journal

COMMAND = bytes(100)


@contextlib.contextmanager
def file_bytes_max(count: int) -> Iterator[None]:
    """The kernel takes the part of a write that fits, as on a full disk, and refuses the next one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def indexes(journal: Journal) -> list[int]:
    return [entry.log_index for entry in journal[:]]


def test_an_entry_that_does_not_fit_whole_is_not_in_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.setCurrentTerm(1, None)
    journal.add(COMMAND, 2, 1)
    with file_bytes_max(journal.bytes + 40), pytest.raises(StoreUnavailable):
        journal.add(COMMAND, 3, 1)
    assert indexes(journal) == [2]
    journal.sync()
    assert indexes(Journal(tmp_path)) == [2]

    journal.add(COMMAND, 3, 1)
    journal.sync()
    assert indexes(Journal(tmp_path)) == [2, 3]
