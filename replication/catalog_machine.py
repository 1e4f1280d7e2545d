"""The catalog as the state machine that Raft replicates: changed on the Raft thread, read from any.

The lease builds on this alone: a `RenewLease` that has come back through the log is in `Agreed.catalog.leases`,
together with every change of owner that was agreed before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from node.kernel.clock import Clock
from replication.catalog import Catalog, apply, decode_catalog, encode_catalog, problem
from replication.commands import decode_command


@dataclass(frozen=True, slots=True)
class Agreed:
    """All that this node has applied up to one place of the log; replaced as a whole."""

    catalog: Catalog = field(default_factory=Catalog)
    renewed_s: Mapping[str, float] = field(default_factory=dict)
    """Node -> this node's monotonic clock when it applied the renewal that `catalog.leases` names; not earlier."""


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

    def _replace(self, catalog: Catalog) -> None:
        before = self.agreed
        renewed_s = before.renewed_s
        if catalog.leases != before.catalog.leases:
            now_s, numbers = self._clock.monotonic(), before.catalog.leases
            renewed_s = {
                name: renewed_s[name] if number == numbers.get(name) else now_s
                for name, number in catalog.leases.items()
            }
        self.agreed = Agreed(catalog, renewed_s)
