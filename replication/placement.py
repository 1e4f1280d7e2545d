"""(P) Where partitions should be: sticky, balanced, rack-aware targets, whatever the way there.

Owners: each node's share is its weight's part of all partitions, rounded by largest remainder; among equal
remainders the nodes that own more now keep more, so that a balanced cluster stays as it is.
Standbys: other racks than the owner's first, then even counts, then as few changes as possible. Evenness is reached by
shifting standbys along shortest paths of nodes (augmenting paths, as in flow algorithms) until no path from a node
with more to a node with fewer is left.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    rack: str
    weight: float


def target_owners(
    members: Sequence[Member],
    owners: Sequence[str],
    standbys: Sequence[Sequence[str]],
    ready: Callable[[int], Collection[str]],
    balance: bool = True,
) -> list[str]:
    """The owner each partition should have, by partition; all of `members` may own.

    `owners` are today's ('' or a name outside `members`: to be given away), `ready` gives a partition's standbys that
    have caught up. Without `balance` all others stay where they are and counts
    do not matter. Without members, today's.
    """
    if not members:
        return list(owners)
    shares = _shares(members, owners)
    targets = list(owners)
    owned = Counter(owners)
    room = {name: share - owned[name] for name, share in shares.items()}
    homeless = [partition for partition, owner in enumerate(owners) if owner not in shares]
    _fill(homeless, targets, room, standbys, ready, balance)
    if balance:
        _shed(targets, room, standbys, ready)
    return targets


def _shares(members: Sequence[Member], owners: Sequence[str]) -> dict[str, int]:
    total = sum(member.weight for member in members)
    exact = {member.name: len(owners) * member.weight / total for member in members}
    shares = {name: int(share + 1e-9) for name, share in exact.items()}
    owned = Counter(owners)
    rest = sorted(exact, key=lambda name: (-round(exact[name] - shares[name], 6), -owned[name], name))
    for name in rest[: len(owners) - sum(shares.values())]:
        shares[name] += 1
    return shares


def _fill(
    partitions: list[int],
    targets: list[str],
    room: dict[str, int],
    standbys: Sequence[Sequence[str]],
    ready: Callable[[int], Collection[str]],
    balance: bool,
) -> None:
    """Give homeless partitions to nodes with room, those with one's state first; without `balance` to those anyway."""
    for wanted in (ready, standbys.__getitem__, lambda _: room):
        for partition in list(partitions):
            free = [name for name in wanted(partition) if room.get(name, 0) > 0]
            free = free or [name for name in wanted(partition) if name in room and not balance]
            if free:
                targets[partition] = max(free, key=lambda name: (room[name], name))
                room[targets[partition]] -= 1
                partitions.remove(partition)


def _shed(
    targets: list[str], room: dict[str, int], standbys: Sequence[Sequence[str]], ready: Callable[[int], Collection[str]]
) -> None:
    """Move partitions from nodes over their share to nodes under it, those that have one's state first."""
    for wanted in (ready, standbys.__getitem__, lambda _: room):
        if min(room.values()) >= 0:
            return
        for partition, owner in enumerate(targets):
            if room[owner] >= 0:
                continue
            free = [name for name in wanted(partition) if room.get(name, 0) > 0]
            if free:
                targets[partition] = max(free, key=lambda name: (room[name], name))
                room[targets[partition]] -= 1
                room[owner] += 1


def target_standbys(
    members: Sequence[Member],
    fresh: frozenset[str],
    owners: Sequence[str],
    standbys: Sequence[Sequence[str]],
    count: int,
    balance: bool = True,
) -> list[tuple[str, ...]]:
    """The standbys each partition should have, today's first, given its target owner.

    All of `members` may keep a standby, those in `fresh` may also get one. Without `balance` only what is missing is
    given out: neither racks nor counts are made better.
    """
    racks = {member.name: member.rack for member in members}
    loads = {member.name: 0 for member in members}
    chosen: list[list[str]] = [[] for _ in owners]
    costs_of = {owner: _costs(racks, owner) for owner in set(owners)}
    costs = [costs_of[owner] for owner in owners]
    for exact in (True, False):
        for partition, before in enumerate(standbys):
            kept = [name for name in before if name in costs[partition]]
            if (len(kept) <= count) is exact:
                chosen[partition] = _keep(kept, costs[partition], loads, count)
    for partition, mine in enumerate(chosen):
        _complete(mine, costs[partition], loads, fresh, racks, count, balance)
    if balance:
        _even(chosen, costs, loads, fresh)
    return [_in_order(before, mine) for before, mine in zip(standbys, chosen, strict=True)]


def _costs(racks: Mapping[str, str], owner: str) -> dict[str, int]:
    """Node that may be standby -> 1 in the owner's rack, 0 elsewhere. An owner of unknown rack is alone in its own."""
    own = racks.get(owner)
    return {name: int(rack == own) for name, rack in racks.items() if name != owner}


def _keep(kept: list[str], costs: Mapping[str, int], loads: dict[str, int], count: int) -> list[str]:
    stay = kept
    if len(kept) > count:
        stay = sorted(kept, key=lambda name: (costs[name], loads[name], kept.index(name)))[:count]
    for name in stay:
        loads[name] += 1
    return stay


def _complete(
    mine: list[str],
    costs: Mapping[str, int],
    loads: dict[str, int],
    fresh: frozenset[str],
    racks: Mapping[str, str],
    count: int,
    balance: bool,
) -> None:
    """Fill up to `count`, then, for balance, swap standbys in the owner's rack for such in others."""

    def best() -> str | None:
        used = {racks[name] for name in mine}
        free = [name for name in costs if name in fresh and name not in mine]
        return min(free, key=lambda name: (costs[name], racks[name] in used, loads[name], name), default=None)

    while len(mine) < count and (name := best()) is not None:
        mine.append(name)
        loads[name] += 1
    while balance and any(costs[name] for name in mine) and (name := best()) is not None:
        worst = max(mine, key=lambda held: (costs[held], loads[held]))
        if costs[name] >= costs[worst]:
            return
        mine[mine.index(worst)] = name
        loads[worst] -= 1
        loads[name] += 1


def _even(
    chosen: list[list[str]], costs: Sequence[Mapping[str, int]], loads: dict[str, int], fresh: frozenset[str]
) -> None:
    """Each path lowers the sum of the squared loads, so this ends."""
    held_by: dict[str, dict[int, None]] = {name: {} for name in loads}
    for partition, mine in enumerate(chosen):
        for name in mine:
            held_by[name][partition] = None
    changed = True
    while changed:
        changed = False
        for source in sorted(loads, key=lambda name: (-loads[name], name)):
            while (path := _path(source, chosen, held_by, costs, loads, fresh)) is not None:
                for partition, held, taker in path:
                    chosen[partition][chosen[partition].index(held)] = taker
                    del held_by[held][partition]
                    held_by[taker][partition] = None
                loads[source] -= 1
                loads[path[-1][2]] += 1
                changed = True


def _path(
    source: str,
    chosen: Sequence[Sequence[str]],
    held_by: Mapping[str, Collection[int]],
    costs: Sequence[Mapping[str, int]],
    loads: Mapping[str, int],
    fresh: frozenset[str],
) -> list[tuple[int, str, str]] | None:
    """The shortest chain of (partition, from, to) from `source` to a node with two fewer; None when there is none.

    No partition is used twice in one chain, so its hops can all be made.
    """
    if min(loads.values()) > loads[source] - 2:
        return None
    chains: dict[str, list[tuple[int, str, str]]] = {source: []}
    waiting = deque([source])
    while waiting:
        held = waiting.popleft()
        used = {partition for partition, _, _ in chains[held]}
        for partition in held_by[held]:
            if partition in used:
                continue
            cost = costs[partition]
            for taker in cost:
                if taker in chains or taker not in fresh or taker in chosen[partition] or cost[taker] > cost[held]:
                    continue
                chains[taker] = [*chains[held], (partition, held, taker)]
                if loads[taker] <= loads[source] - 2:
                    return chains[taker]
                waiting.append(taker)
    return None


def _in_order(before: Sequence[str], mine: Sequence[str]) -> tuple[str, ...]:
    if tuple(mine) == before:
        return before
    kept = [name for name in before if name in mine]
    return (*kept, *sorted(name for name in mine if name not in kept))
