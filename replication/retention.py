"""(P) How far a changelog may be cut, and who may delete a copy: enough nodes must have what is behind the cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def cut_offset(verified: Mapping[str, int], needed: Iterable[int], holders_min: int) -> int:
    """The offset that a partition's changelog may be cut before; 0: not at all.

    `verified` is node -> changelog offset of the newest snapshot of the partition that it has and has verified, of
    replicas heard of lately only: a disk that was lost must not count, nor one that is no replica's any more and may
    be wiped. `needed` are the offsets that live replicas' stores go on from; one that is behind all snapshots already
    has to restore one anyway and is not to be given. Of a replica that is restoring a snapshot nothing is known: it has
    the time that a cut waits, and takes a newer snapshot, of which it has most files by then, if that was too short.

    Every record at or after the result stays, and `holders_min` nodes have a snapshot at or after it, so
    any holders_min - 1 disks may be lost before the next snapshot.
    """
    if len(verified) < holders_min:
        return 0
    covered = sorted(verified.values(), reverse=True)[holders_min - 1]
    return min(covered, *needed, covered)


def may_forget(verified: Mapping[str, int], start: int, holders_min: int) -> bool:
    """Whether a node that is no replica of a partition any more may delete what it has of it.

    `verified` is as for `cut_offset`, of the partition's present replicas as they say now, `start` where the changelog
    begins now. The copy may be one of those that the changelog was cut behind; until enough replicas have
    one of their own, one lost disk could be the last.
    """
    return start == 0 or sum(offset >= start for offset in verified.values()) >= holders_min
