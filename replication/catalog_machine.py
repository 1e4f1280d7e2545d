"""The catalog as the state machine that Raft replicates: changed on the Raft thread, read from any.

The lease builds on this alone: a `RenewLease` that has come back through the log is in `Agreed.catalog.leases`,
together with every change of owner that was agreed before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from node.kernel.clock import Clock
from replication.catalog import Catalog, apply, decode_catalog, encode_catalog, problem
from replication.commands import decode_command


@dataclass(frozen=True, slots=True)
class Ending:
    """A process of a node has ended: the one of this incarnation whose numbers are next to this one."""

    incarnation: int
    number: int
    at_s: float
    """This node's monotonic clock when it saw that."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """All that this node has applied up to one place of the log; replaced as a whole."""

    catalog: Catalog = field(default_factory=Catalog)
    renewed_s: Mapping[str, float] = field(default_factory=dict)
    """Node -> this node's monotonic clock when it applied the renewal that `catalog.leases` names; not earlier."""
    endings: Mapping[str, Ending] = field(default_factory=dict)
    """Of nodes whose process was seen to end and that are not connected again."""


class CatalogMachine:
    """A `raft_types.StateMachine`. Raises CatalogCorrupt for a command or dump that this release can't read."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.agreed = Agreed()

    def apply(self, command: bytes) -> str:
        """Why the command was refused; '' when it was not."""
        decoded, before = decode_command(command), self.agreed
        after = apply(before.catalog, decoded)
        refused = problem(before.catalog, decoded) if after.revision == before.catalog.revision else ""
        self._replace(after)
        return refused

    def dump(self) -> bytes:
        return encode_catalog(self.agreed.catalog)

    def restore(self, data: bytes) -> None:
        self._replace(decode_catalog(data))

    def ended(self, member: str) -> None:
        """To be called before a renewal of the member's next process can be applied here."""
        agreed = self.agreed
        node, number = agreed.catalog.nodes.get(member), agreed.catalog.leases.get(member)
        if node is not None and number is not None:
            ending = Ending(node.incarnation, number, self._clock.monotonic())
            self.agreed = replace(agreed, endings={**agreed.endings, member: ending})

    def connected(self, member: str) -> None:
        agreed = self.agreed
        self.agreed = replace(agreed, endings={name: e for name, e in agreed.endings.items() if name != member})

    def _replace(self, catalog: Catalog) -> None:
        before = self.agreed
        renewed_s = before.renewed_s
        if catalog.leases != before.catalog.leases:
            now_s, numbers = self._clock.monotonic(), before.catalog.leases
            renewed_s = {
                name: renewed_s[name] if number == numbers.get(name) else now_s
                for name, number in catalog.leases.items()
            }
        self.agreed = Agreed(catalog, renewed_s, before.endings)
