"""Which incarnation of a node this disk belongs to, and which numbers its processes have used.

The file lies beside the node's data: when the disk is lost so is the file, and the node joins as a new incarnation.
What the old one said of its replicas and model files then counts no more.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from node.kernel.errors import CatalogCorrupt
from replication.catalog import Catalog
from replication.lease import NUMBERS_A_PROCESS
from replication.raft_journal import disk_errors, replace_file


class Incarnation(msgspec.Struct, frozen=True):
    incarnation: int
    next_number: int
    """Where the next process on this disk starts to number its renewals and reports."""


def begin_process(path: Path, name: str, catalog: Catalog, now_ms: int) -> tuple[int, int]:
    """(incarnation, first number) of a process of this node that has just started, durably never given again.

    `catalog` must be as agreed now. A disk that another has replaced in the meantime becomes a new incarnation too.
    Raises CatalogCorrupt, StoreUnavailable.
    """
    kept = _read(path)
    member = catalog.nodes.get(name)
    known = 0 if member is None else member.incarnation
    # The clock's part tells a node that left, and so is known no more, from the one that comes back with a new disk.
    incarnation = max(known + 1, now_ms // 1000) if kept is None or kept.incarnation < known else kept.incarnation
    first = max(catalog.leases.get(name, 0) + 1, 0 if kept is None else kept.next_number)
    replace_file(path, msgspec.json.encode(Incarnation(incarnation, first + NUMBERS_A_PROCESS)))
    return incarnation, first


def _read(path: Path) -> Incarnation | None:
    if not path.exists():
        return None
    with disk_errors(path, "read"):
        content = path.read_bytes()
    try:
        return msgspec.json.decode(content, type=Incarnation)
    except msgspec.MsgspecError as failure:
        raise CatalogCorrupt(
            f"{path} can't be read ({failure}); delete it: the node then joins as with a new disk, and keeps its data"
        ) from None
