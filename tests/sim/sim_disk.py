"""What a node keeps over a crash: flushed stores, snapshots. And what it loses."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from node.state.memory import MemoryStore


def clone(store: MemoryStore) -> MemoryStore:
    """A checkpoint: equal now, independent from now on."""
    twin = MemoryStore()
    for name, value in vars(store).items():
        setattr(twin, name, copy.copy(value))
    return twin


@dataclass(slots=True)
class Snapshot:
    offset: int
    store: MemoryStore


@dataclass(slots=True)
class Disk:
    """Of one incarnation of a node."""

    incarnation: int = 1
    flushed: dict[int, MemoryStore] = field(default_factory=dict)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    """Partition -> the newest snapshot that was verified; an older one is dropped only then."""

    blobs: set[str] = field(default_factory=set)
    """Files of models and of tables."""

    def keep(self, partition: int, snapshot: Snapshot) -> None:
        """A node that has just come back may make one that is older than what it has; that is not kept."""
        held = self.snapshots.get(partition)
        if held is None or snapshot.offset > held.offset:
            self.snapshots[partition] = snapshot

    def restores_from(self, partition: int) -> int:
        """The furthest offset that this disk can go on from; -1: it has nothing, so it needs the whole changelog."""
        found = [self.flushed[partition].changelog_offset()] if partition in self.flushed else []
        found += [self.snapshots[partition].offset] if partition in self.snapshots else []
        return max(found, default=-1)
