"""Operators' commands on a cluster: what the command line asks of a running node, at its peer port.

Address and secret come from the node's own config file. Each function here is one command; `say` is called with a
line for the operator whenever there is something new.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from node.config import allowed
from node.config_sections import ClusterSection, Config, Name
from node.kernel.clock import SystemClock
from node.kernel.errors import ConfigError, HeadraceError, NotFound, PeerUnavailable
from node.serving.cluster import ClusterMember, ClusterPartition, ClusterStatus
from replication.operators import OPERATORS_PATH, STATUS_PATH, Job, JoinBody, NodeBody, PartitionBody, SettingsBody
from replication.peer_client import PeerClient
from replication.raft_journal import accept_loss as accept_loss_of
from replication.raft_types import address_problems

if TYPE_CHECKING:
    from replication.offline_restore import Source

OPERATOR: Final = "operator"
"""The name that operators' calls are signed with."""
ASK_MS_MAX: Final = 20_000
LOOK_S: Final = 0.2
LOST_S_MAX: Final = 30.0
"""How long nobody may answer while a command waits for something."""

Say: TypeAlias = Callable[[str], None]


class CommandFailed(HeadraceError):
    """The command could not be carried out; the message says why and what to do."""


class Operator:
    """Talks to the config's own node, and by its answers to the others."""

    def __init__(self, address: str, client: PeerClient) -> None:
        self.address = address
        self._client = client

    async def post(self, address: str, what: str, body: msgspec.Struct) -> bytes:
        path = f"{OPERATORS_PATH}/{what}"
        return await self._client.ask(address, "POST", path, msgspec.json.encode(body), ASK_MS_MAX)

    async def status(self) -> ClusterStatus:
        """What the leader knows; where it can't be asked, what the config's own node knows."""
        status = await self._status_at(self.address)
        leader = next((member for member in status.members if member.leader), None)
        if status.complete or leader is None:
            return status
        try:
            return await self._status_at(leader.peer_address)
        except PeerUnavailable:
            return status

    async def _status_at(self, address: str) -> ClusterStatus:
        answer = await self._client.ask(address, "GET", STATUS_PATH)
        try:
            return msgspec.json.decode(answer, type=ClusterStatus)
        except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
            raise CommandFailed(f"{address} is of another release: {failure}; use that node's command line") from None

    async def member(self, name: str) -> ClusterMember:
        """Raises CommandFailed when there is no such member."""
        members = {member.name: member for member in (await self.status()).members}
        if name not in members:
            raise CommandFailed(f"there is no node {name} in the cluster; its nodes are {', '.join(members) or 'none'}")
        return members[name]

    async def job(self, address: str, what: str, partition: int) -> Mapping[str, Any]:
        """Have a node snapshot or verify a partition, and wait; what came of it. Raises CommandFailed."""
        job = msgspec.json.decode(await self.post(address, what, PartitionBody(partition)), type=Job)
        while job.state == "running":
            await asyncio.sleep(LOOK_S)
            answer = await self._client.ask(address, "GET", f"{OPERATORS_PATH}/jobs/{job.job}")
            job = msgspec.json.decode(answer, type=Job)
        if job.state == "failed":
            raise CommandFailed(job.reason)
        return job.detail


@asynccontextmanager
async def operating(config: Config) -> AsyncIterator[Operator]:
    """Raises ConfigError when the config is of a node on its own."""
    cluster = _cluster_of(config)
    client = PeerClient(OPERATOR, cluster.secret(), SystemClock())
    await client.start()
    try:
        yield Operator(cluster.peer_address or cluster.peer_listen, client)
    finally:
        await client.stop()


def _cluster_of(config: Config) -> ClusterSection:
    if config.cluster is None:
        raise ConfigError(["[cluster] is missing: this node is on its own, and there is no cluster to change"])
    return config.cluster


async def watch(operator: Operator, say: Say, left: Callable[[ClusterStatus], Sequence[str]], seconds: float) -> None:
    """Wait until `left` finds nothing more to wait for, saying what it finds. Raises CommandFailed."""
    loop = asyncio.get_running_loop()
    deadline, heard, said = loop.time() + seconds, loop.time(), ""
    while True:
        try:
            status = await operator.status()
            heard = loop.time()
        except PeerUnavailable:
            if loop.time() - heard > LOST_S_MAX:
                raise
            status = None
        waiting = left(status) if status is not None else [said]
        if not waiting:
            return
        text = "; ".join(waiting)
        if text != said:
            say(f"waiting: {text}")
            said = text
        if loop.time() > deadline:
            raise CommandFailed(f"not done within {seconds:g} s: {said}; it goes on, `headrace status` shows how far")
        await asyncio.sleep(LOOK_S)


# --- members --------------------------------------------------------------------------------------------------------


async def join(config: Config, name: str, raft_address: str, wait_s: float, say: Say) -> None:
    problems = [*_name_problems(name), *address_problems(raft_address)]
    if problems:
        raise CommandFailed("; ".join(problems))
    async with operating(config) as operator:
        await operator.post(operator.address, "join", JoinBody(name, raft_address))
        say(f"{name} may join; start it with this node's [cluster] peers, and {name} at {raft_address}, in its config")
        say(f"until then it counts for a majority as one that is down; `headrace leave {name}` takes that back")
        if wait_s:
            await watch(operator, say, lambda status: _not_heard(status, name), wait_s)
            say(f"{name} has joined")


def _name_problems(name: str) -> Sequence[str]:
    """A name that no config may have would be awaited for good."""
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError:
        return [f"{name} is no name of a node; allowed: {allowed(Name)}"]
    return ()


def _not_heard(status: ClusterStatus, name: str) -> Sequence[str]:
    known = {member.name: member for member in status.members}
    return [] if name in known and known[name].fresh else [f"{name} to start and join"]


async def drain(config: Config, name: str, wait_s: float, say: Say) -> None:
    async with operating(config) as operator:
        await _drain(operator, name, wait_s, say)


async def _drain(operator: Operator, name: str, wait_s: float, say: Say) -> None:
    await operator.member(name)
    await operator.post(operator.address, "drain", NodeBody(name))
    say(f"{name} is draining: others take over what it owns, as soon as they have caught up")
    if wait_s:
        await watch(operator, say, lambda status: _owned_by(status, name), wait_s)
        say(f"{name} owns nothing and can be stopped")


def _owned_by(status: ClusterStatus, name: str) -> Sequence[str]:
    """A line for each partition that the node owns or takes, the first ones in words."""
    shown = 4
    owned = [one for one in status.partitions if one.owner == name or (one.move is not None and one.move.to == name)]
    lines = [_owned_line(partition) for partition in owned[:shown]]
    return [*lines, f"{len(owned) - shown} more partitions"] if len(owned) > shown else lines


def _owned_line(partition: ClusterPartition) -> str:
    return f"partition {partition.number}" + (f" ({partition.reason})" if partition.reason else "")


async def undrain(config: Config, name: str, say: Say) -> None:
    async with operating(config) as operator:
        await operator.member(name)
        await operator.post(operator.address, "undrain", NodeBody(name))
        say(f"{name} takes part again; partitions move to it one after the other")


async def leave(config: Config, name: str, dead: bool, wait_s: float, say: Say) -> None:
    """Drain a node and remove it; with `dead`, remove one that is gone, once others own what it had. One that was let
    join and has not come has nothing to be drained of."""
    async with operating(config) as operator:
        if name in (await operator.status()).awaited:
            await operator.post(operator.address, "leave", NodeBody(name))
            say(f"{name} may not join any more")
            return
        member = await operator.member(name)
        if dead:
            if member.fresh is not False:
                heard = "" if member.heard_ms is None else f", it was heard of {member.heard_ms} ms ago"
                raise CommandFailed(f"{name} is not known to be dead{heard}; stop it first, or leave out --dead")
            await watch(operator, say, lambda status: _owned_by(status, name), wait_s)
        else:
            await _drain(operator, name, wait_s, say)
        await operator.post(await _another(operator, name), "leave", NodeBody(name))
        say(f"{name} is no member any more; stop it, and delete its data_dir before it ever joins again")


async def _another(operator: Operator, name: str) -> str:
    """The address of a node that is there and is not `name`: none can remove itself."""
    status = await operator.status()
    others = [member for member in status.members if member.name != name and member.fresh is not False]
    if not others:
        raise CommandFailed(f"{name} is the last node there is; stop it and delete its data_dir instead")
    addresses = [member.peer_address for member in others]
    return operator.address if operator.address in addresses else addresses[0]


async def accept_loss(config: Config, say: Say) -> None:
    """Let this stopped node, whose disk was lost, vote again; see `replication.raft_journal.accept_loss`."""
    from replication.offline_restore import stopped  # see `restore`

    _cluster_of(config)
    folder = Path(config.node.data_dir) / "cluster" / "raft"
    with stopped(folder / "lock"):
        if not folder.exists():
            raise CommandFailed(
                f"{config.node.name} has no catalog in {folder} yet: start it once, stop it, say it again"
            )
        await asyncio.to_thread(accept_loss_of, folder)
    say(
        f"{config.node.name} votes with the catalog it has, once it is started; what only the lost disks had is gone. "
        "Do this to no more nodes than it takes for a majority with those that kept their disks"
    )


async def settings(config: Config, changes: Mapping[str, int | None], say: Say) -> None:
    """Set what is given and not None, for the whole cluster; a line for each setting as it is then."""
    body = SettingsBody(**changes)
    async with operating(config) as operator:
        if body != SettingsBody():
            await operator.post(operator.address, "settings", body)
        for name, value in msgspec.structs.asdict((await operator.status()).settings).items():
            say(f"{name} = {value}")


# --- partitions -----------------------------------------------------------------------------------------------------


def chosen(status: ClusterStatus, numbers: Iterable[int]) -> list[ClusterPartition]:
    """The partitions named, or all. Raises CommandFailed for one that is not there or has no owner."""
    wanted = sorted(set(numbers)) or range(len(status.partitions))
    unknown = [number for number in wanted if not 0 <= number < len(status.partitions)]
    if unknown or not status.partitions:
        raise CommandFailed(f"there is no partition {unknown[0] if unknown else 0}; there are {len(status.partitions)}")
    return [status.partitions[number] for number in wanted]


def address_of(status: ClusterStatus, name: str) -> str:
    """Raises NotFound."""
    for member in status.members:
        if member.name == name:
            return member.peer_address
    raise NotFound(f"there is no node {name or 'that owns it'} now; look at `headrace status` and try again")


async def snapshot(config: Config, numbers: Iterable[int], say: Say) -> None:
    """A snapshot now, on each node that has the partition: enough holders let the changelog be cut behind it.

    Where one can't be taken, the others are all the same. Raises CommandFailed then.
    """
    taken = failed = 0
    async with operating(config) as operator:
        status = await operator.status()
        replicas = [
            (partition.number, replica.node)
            for partition in chosen(status, numbers)
            for replica in partition.replicas
            if replica.role != "left"
        ]
        for number, node in replicas:
            try:
                told = _snapshot_line(await operator.job(address_of(status, node), "snapshot", number))
                taken += 1
            except HeadraceError as failure:
                told = f"not taken: {failure}"
                failed += 1
            say(f"partition {number} on {node}: {told}")
    if failed:
        raise CommandFailed(f"{failed} of {taken + failed} snapshots were not taken; see above, and take them again")


def _snapshot_line(taken: Mapping[str, Any]) -> str:
    return f"{taken.get('files', 0)} files, {taken.get('bytes', 0):,} bytes, as of {taken.get('changelog_offset', 0):,}"


class ComparedStandby(msgspec.Struct, frozen=True):
    """`equal` is None where it could not be compared, for `reason`."""

    equal: bool | None
    reason: str = ""
    differences: list[str] = []
    first: list[str] = []
    """Customers and chunks that differ, the first few."""


class ReadSnapshots(msgspec.Struct, frozen=True):
    node: str
    right: list[int]
    damaged: list[str]


class VerifiedPartition(msgspec.Struct, frozen=True):
    """What the owner found, as `replication.verification` tells it."""

    partition: int
    changelog_offset: int
    rows: int
    standbys: dict[str, ComparedStandby]
    snapshots: list[ReadSnapshots]


class Verified(msgspec.Struct):
    """What `verify` found: standbys that `differ` from the owner, what is `unknown` as it was not compared."""

    right: bool = True
    differ: int = 0
    unknown: int = 0
    damaged: int = 0
    partitions: list[VerifiedPartition] = []

    def count(self, found: VerifiedPartition) -> list[str]:
        """Take in what was found of one partition; a line for each thing that is not right, or one that all is."""
        self.partitions.append(found)
        lines = []
        for standby, result in found.standbys.items():
            if result.equal is None:
                self.unknown += 1
                lines.append(f"{standby} was not compared: {result.reason}")
            elif not result.equal:
                self.differ += 1
                first = f", first {', '.join(result.first)}" if result.first else ""
                lines.append(f"{standby} differs from the owner: {'; '.join(result.differences)}{first}")
        for snapshots in found.snapshots:
            self.damaged += len(snapshots.damaged)
            lines += [f"{snapshots.node}: {reason}" for reason in snapshots.damaged]
        self.right = self.right and not lines
        kept = sum(len(snapshots.right) for snapshots in found.snapshots)
        equal = f"{found.rows:,} rows as of {found.changelog_offset:,}, the same on {len(found.standbys)} standbys"
        return lines or [f"{equal}; {kept} snapshots right"]

    def fail(self, reason: str) -> list[str]:
        self.right = False
        self.unknown += 1
        return [f"not verified: {reason}"]


async def verify(config: Config, numbers: Iterable[int], as_json: bool, say: Say) -> bool:
    """Compare owners and standbys row for row, and read all snapshots again; whether all is right."""
    verified = Verified()
    async with operating(config) as operator:
        for partition in chosen(await operator.status(), numbers):
            try:
                lines = verified.count(await _verify(operator, partition.number))
            except HeadraceError as failure:
                lines = verified.fail(str(failure))
            for line in () if as_json else lines:
                say(f"partition {partition.number}: {line}")
    if as_json:
        say(msgspec.json.encode(verified).decode())
    return verified.right


async def _verify(operator: Operator, partition: int) -> VerifiedPartition:
    """By the owner as it is now: partitions move while others are verified, and once more is worth it then."""
    try:
        return await _verify_once(operator, partition)
    except HeadraceError:
        return await _verify_once(operator, partition)


async def _verify_once(operator: Operator, partition: int) -> VerifiedPartition:
    status = await operator.status()
    found = await operator.job(address_of(status, status.partitions[partition].owner), "verify", partition)
    try:
        return msgspec.convert(found, VerifiedPartition)
    except msgspec.ValidationError as failure:
        raise CommandFailed(f"the owner is of another release: {failure}; use its command line") from None


async def restore(config: Config, partition: int, source: str, say: Say) -> None:
    """Replace a stopped node's store of a partition by a snapshot: of a peer (its HOST:PORT), a URL, or its own."""
    # Here and in `_source`, as what they import would make every other command wait.
    from node.state.inspection import changelog_offset_of
    from replication.offline_restore import restore as restore_stopped
    from replication.offline_restore import stopped
    from replication.snapshot_folder import SnapshotFolder

    _cluster_of(config)
    data, changelog, name = Path(config.node.data_dir), config.kafka.changelog_topic, config.node.name
    clock = SystemClock()
    folder = SnapshotFolder(data / "snapshots", changelog, name, clock)
    try:
        with stopped(data / "cluster" / "raft" / "lock"):
            async with _source(config, source, clock) as found:
                target = data / "partitions" / str(partition)
                snapshot = await restore_stopped(partition, target, folder, found, changelog_offset_of, _Progress(say))
    finally:
        folder.close()
    say(
        f"partition {partition} restored from {source or 'its own snapshot'}: {snapshot.bytes:,} bytes as of "
        f"{snapshot.changelog_offset:,}; the node goes on from there when it is started"
    )


@asynccontextmanager
async def _source(config: Config, source: str, clock: SystemClock) -> AsyncIterator[Source | None]:
    """Only a peer is asked with the secret: a credential of systemd's is gone while the unit is stopped."""
    from replication.offline_restore import PeerSource, StoreSource
    from replication.snapshot_store import SnapshotStore

    changelog = config.kafka.changelog_topic
    if not source:
        yield None
    elif "://" in source:
        store = SnapshotStore(source, config.kafka.application, changelog, config.node.name, clock)
        try:
            yield StoreSource(store)
        finally:
            store.close()
    elif address_problems(source):
        raise CommandFailed(f"{source} is neither a URL nor a peer's HOST:PORT")
    else:
        client = PeerClient(OPERATOR, _cluster_of(config).secret(), clock)
        await client.start()
        try:
            yield PeerSource(client, source, changelog)
        finally:
            await client.stop()


class _Progress:
    """A line for each tenth."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._tenth = -1

    def __call__(self, here: int, whole: int) -> None:
        tenth = 10 * here // max(whole, 1)
        if tenth > self._tenth:
            self._tenth = tenth
            self._say(f"{here:,} of {whole:,} bytes are here")
