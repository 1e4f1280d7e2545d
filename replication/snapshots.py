"""The snapshots of a node at work: taken and verified in turn, given to peers, uploaded by owners, and restored from.

All that touches a disk or the store runs in threads, one thing for each partition at a time. What `verified` says was
read and opened by this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, TypeVar

import structlog

from node.kernel.clock import Clock
from node.kernel.errors import HeadraceError, NotFound, PeerRefused, PeerUnavailable, StateCorrupt, StoreUnavailable
from node.kernel.limits import (
    NODES_MAX,
    SNAPSHOT_ATTEMPTS_MAX,
    SNAPSHOT_FETCHES_MAX,
    SNAPSHOT_LOOK_MS,
    SNAPSHOT_PIN_MS_MAX,
    SNAPSHOT_RESTORES_MAX,
    SNAPSHOT_RETRY_MS,
    SNAPSHOT_STORE_ASK_MS_MAX,
    SNAPSHOT_STORE_CALLS_MAX,
    SNAPSHOT_THREADS_MAX,
    UNUSED_MS_MAX,
)
from replication.catalog import Catalog
from replication.peer_messages import settled
from replication.peers import PeerCall, PeerReply, PeerRoute
from replication.retention import may_forget
from replication.snapshot import Snapshot, SnapshotFile, decode_snapshot, encode_snapshot, superseded
from replication.snapshot_folder import SnapshotFolder

if TYPE_CHECKING:
    from replication.snapshot_store import SnapshotStore

log = structlog.get_logger(__name__)

STORE_HOLDER = "store"
"""Stands among the nodes that have a snapshot for the store by URL."""
_NUMBER_DIGITS_MAX = 19
_Result = TypeVar("_Result")


class Copied(Protocol):
    """What is needed of a `StateStore`."""

    def changelog_offset(self) -> int: ...

    def checkpoint(self, folder: Path) -> int: ...


class Members(Protocol):
    """What is needed of `replication.cluster.Cluster`."""

    @property
    def name(self) -> str: ...

    @property
    def catalog(self) -> Catalog: ...


class Fetching(Protocol):
    """What is needed of `replication.peers.PeerClient`."""

    async def ask(self, address: str, method: str, path: str, body: bytes = b"") -> bytes: ...

    async def fetch(
        self, address: str, path: str, target: Path, size: int | None, sha256: str, *, sync: bool = True
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Sources:
    """What snapshots are made of and restored by; `node.app` joins these to the parts they come from."""

    stores: Callable[[], Mapping[int, Copied]]
    """The partitions whose stores are open now, owned or standing by."""
    opened_offset: Callable[[Path], Awaitable[int]]
    """Opens a copy of a store, elsewhere, and tells its changelog offset. Raises StateCorrupt, StoreUnavailable."""
    changelog_bounds: Callable[[int], Awaitable[tuple[int, int]]]
    """A partition's first and next changelog offset. Raises BrokerUnavailable."""


@dataclass(frozen=True, slots=True)
class Restored:
    """The last restore of a partition."""

    source: str
    changelog_offset: int
    bytes: int
    bytes_fetched: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PartitionSnapshots:
    changelog_offset: int
    """Of the newest verified snapshot; 0: none."""
    created_ms: int
    bytes: int
    uploaded_offset: int = 0
    reason: str = ""
    """Why the last attempt to take, verify or upload one failed; '' if it did not."""


@dataclass(frozen=True, slots=True)
class SnapshotsStatistics:
    taken: int
    failed: int
    partitions: Mapping[int, PartitionSnapshots]
    restored: Mapping[int, Restored]
    bytes_hashed: int
    store: object = None


@dataclass(frozen=True, slots=True)
class _Source:
    """Somewhere to restore from."""

    name: str
    address: str
    snapshot: Snapshot

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.snapshot.changelog_offset


class Snapshots:
    """`open` before the first restore; `run` takes, verifies, uploads and removes until it is cancelled."""

    def __init__(
        self,
        folder: SnapshotFolder,
        cluster: Members,
        client: Fetching,
        sources: Sources,
        clock: Clock,
        interval_seconds: float,
        store: SnapshotStore | None = None,
    ) -> None:
        self._folder = folder
        self._cluster = cluster
        self._client = client
        self._sources = sources
        self._clock = clock
        self._interval = interval_seconds
        self._store = store
        self._busy: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._disk_threads = ThreadPoolExecutor(SNAPSHOT_THREADS_MAX, thread_name_prefix="snapshots")
        self._store_threads = ThreadPoolExecutor(SNAPSHOT_STORE_CALLS_MAX, thread_name_prefix="snapshots-store")
        self._restoring = asyncio.Semaphore(SNAPSHOT_RESTORES_MAX)
        self._verified: dict[int, Snapshot] = {}
        self._looked: set[int] = set()
        """Partitions whose snapshots of an earlier run have been verified, or were found wanting."""
        self._due: dict[int, float] = {}
        self._pins: dict[tuple[int, int], float] = {}
        self._unused: dict[int, float] = {}
        self._uploaded: dict[int, int] = {}
        self._upload_due: dict[int, float] = {}
        self._reasons: dict[int, str] = {}
        self._upload_reasons: dict[int, str] = {}
        self._restored: dict[int, Restored] = {}
        self._taken = 0
        self._failed = 0

    async def open(self) -> None:
        """Remove what a crash left. Raises StoreUnavailable."""
        await self._at_disk(self._folder.open)

    def close(self) -> None:
        """Once `run` has been cancelled; transfers in threads end soon."""
        self._folder.close()
        if self._store is not None:
            self._store.close()
        for threads in (self._disk_threads, self._store_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def verified(self) -> Mapping[int, int]:
        """Partition -> changelog offset of the newest snapshot here that this process has verified."""
        return {partition: snapshot.changelog_offset for partition, snapshot in self._verified.items()}

    async def stored(self, partition: int) -> int:
        """Changelog offset of the newest snapshot in the store by URL; 0: none. Raises StoreUnavailable."""
        newest = await self._newest_stored(partition)
        return 0 if newest is None else newest.changelog_offset

    async def _newest_stored(self, partition: int) -> Snapshot | None:
        """Raises StoreUnavailable."""
        if self._store is None:
            return None
        try:
            async with asyncio.timeout(SNAPSHOT_STORE_ASK_MS_MAX / 1000):
                return await self._at_store(self._store.newest, partition)
        except TimeoutError:
            reason = f"{self._store.place} did not answer in {SNAPSHOT_STORE_ASK_MS_MAX} ms (SNAPSHOT_STORE_ASK_MS_MAX)"
            raise StoreUnavailable(f"{reason}; look whether it can be reached from this node") from None

    # threads of its own: a store that hangs, or a disk that is read for long, must not hold up partitions that flush

    async def _at_disk(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        return await self._at(self._disk_threads, work, *arguments)

    async def _to_the_end(self, work: Callable[..., None], *arguments: Any) -> None:
        """Waited for even when cancelled: whoever comes next finds nobody else at these files."""
        await settled(asyncio.ensure_future(self._at_disk(work, *arguments)), lambda: None)

    async def _at_store(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        return await self._at(self._store_threads, work, *arguments)

    async def _at(self, threads: ThreadPoolExecutor, work: Callable[..., _Result], *arguments: Any) -> _Result:
        try:
            future = asyncio.get_running_loop().run_in_executor(threads, work, *arguments)
        except RuntimeError:
            raise StoreUnavailable("the node stops, nothing more is done with its snapshots") from None
        return await future

    # taking

    async def run(self) -> None:
        """Take a snapshot of each partition whose changelog moved, every interval; upload those of partitions owned."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look_at_all())
            tasks.create_task(self._keep_taking())
            if self._store is not None:
                tasks.create_task(self._keep_uploading(self._store))

    async def _look_at_all(self) -> None:
        with self._logged("look at snapshots"):
            for partition in await self._at_disk(self._folder.partitions):
                await self._look(partition)

    @contextlib.contextmanager
    def _logged(self, what: str) -> Iterator[None]:
        """What a disk does is no reason for the node to stop."""
        try:
            yield
        except HeadraceError as failure:
            self._failed += 1
            log.warning(f"could not {what}", reason=str(failure))

    async def _keep_taking(self) -> None:
        while True:
            for partition in list(self._sources.stores()):
                if self._clock.monotonic() >= self._due.get(partition, 0.0):
                    with self._logged(f"take a snapshot of partition {partition}"):
                        await self._take_due(partition)
            with self._logged("remove snapshots"):
                await self._remove_unused()
            await asyncio.sleep(SNAPSHOT_LOOK_MS / 1000)

    async def _take_due(self, partition: int) -> None:
        await self._look(partition)
        store = self._sources.stores().get(partition)
        held = self._verified.get(partition)
        behind = 0 if held is None else held.changelog_offset
        if store is None or store.changelog_offset() <= behind:
            if store is not None and store.changelog_offset() < behind:
                self._reasons[partition] = (
                    f"its store is at {store.changelog_offset()}, its snapshot at {behind}: if the changelog was "
                    "made again, remove the partition's snapshots"
                )
            return
        self._due[partition] = self._clock.monotonic() + self._interval
        try:
            await self.take(partition)
        except HeadraceError:
            self._due[partition] = self._clock.monotonic() + min(self._interval, SNAPSHOT_RETRY_MS / 1000)
            raise

    async def take(self, partition: int) -> Snapshot:
        """A new verified snapshot of what the partition's store holds now, or the newest if it holds no more.

        Raises NotFound for a partition that is not open here, StoreUnavailable, StateCorrupt.
        """
        async with self._busy[partition]:
            with self._counted(partition):
                return await self._take(partition)

    @contextlib.contextmanager
    def _counted(self, partition: int) -> Iterator[None]:
        try:
            yield
        except HeadraceError as failure:
            self._reasons[partition] = str(failure)
            raise
        self._reasons.pop(partition, None)

    async def _take(self, partition: int) -> Snapshot:
        store, held = self._sources.stores().get(partition), self._verified.get(partition)
        if store is None:
            raise NotFound(f"partition {partition} is not open on this node; ask its owner or a standby")
        if held is not None and store.changelog_offset() <= held.changelog_offset:
            return held
        snapshot = await self._at_disk(self._folder.take, partition, store.checkpoint)
        try:
            await self._verify(snapshot)
        except StoreUnavailable:  # one more would stay with each attempt, and its links keep tables on the disk
            await self._at_disk(self._folder.remove, partition, snapshot.changelog_offset)
            raise
        self._taken += 1
        await self._at_disk(self._folder.forget_fetched, partition)
        await self._prune(partition)
        log.info("snapshot taken", partition=partition, offset=snapshot.changelog_offset, bytes=snapshot.bytes)
        return snapshot

    async def _verify(self, snapshot: Snapshot, since_s: float = -math.inf) -> None:
        """Read it, but for files found right after `since_s`, and open it; one that is damaged is removed.

        Raises StateCorrupt, StoreUnavailable.
        """
        partition, offset = snapshot.partition, snapshot.changelog_offset
        try:
            await self._at_disk(self._folder.verify, snapshot, since_s)
            found = await self._sources.opened_offset(self._folder.place(partition, offset))
            if found != offset:
                raise StateCorrupt(
                    f"the snapshot of partition {partition} at {offset} is as of {found}; it is not used"
                )
        except StateCorrupt:
            if self._verified.get(partition) == snapshot:
                del self._verified[partition]
            await self._at_disk(self._folder.remove, partition, offset)
            raise
        held = self._verified.get(partition)
        if held is None or held.changelog_offset <= offset:
            self._verified[partition] = snapshot

    async def _prune(self, partition: int) -> None:
        now = self._clock.monotonic()
        self._pins = {key: until for key, until in self._pins.items() if until > now}
        pinned = {offset for number, offset in self._pins if number == partition}
        if partition in self._verified:
            pinned.add(self._verified[partition].changelog_offset)
        for offset in superseded(await self._at_disk(self._folder.offsets, partition), pinned):
            await self._at_disk(self._folder.remove, partition, offset)

    def _pin(self, snapshot: Snapshot) -> None:
        key = (snapshot.partition, snapshot.changelog_offset)
        self._pins[key] = self._clock.monotonic() + SNAPSHOT_PIN_MS_MAX / 1000

    async def _look(self, partition: int) -> None:
        """Verify what an earlier run left, the newest first, until one is right."""
        async with self._busy[partition]:
            if partition in self._looked:
                return
            self._looked.add(partition)
            while partition not in self._verified:
                newest = await self._at_disk(self._folder.newest, partition)
                if newest is None:
                    return
                try:
                    await self._verify(newest)
                except StateCorrupt as failure:
                    log.error("damaged snapshot removed", partition=partition, reason=str(failure))
                except StoreUnavailable as failure:
                    self._reasons[partition] = str(failure)
                    return

    async def _remove_unused(self) -> None:
        """Snapshots of a partition that the catalog has given to others for UNUSED_MS_MAX."""
        now = self._clock.monotonic()
        unused = {number for number in await self._at_disk(self._folder.partitions) if self._is_others(number)}
        self._unused = {number: self._unused.get(number, now) for number in unused}
        for number, since in list(self._unused.items()):
            if now - since < UNUSED_MS_MAX / 1000:
                continue
            self._unused[number] = now  # asked again only after as long
            async with self._busy[number]:
                if await self.may_forget(number) and self._is_others(number):  # it may have come back meanwhile
                    self._verified.pop(number, None)
                    await self._at_disk(self._folder.forget, number)

    def _is_others(self, partition: int) -> bool:
        """Whether the catalog knows the partition and does not name this node as a replica of it."""
        held = self._cluster.catalog.partitions[partition : partition + 1]
        return any(self._cluster.name not in (one.owner, *one.standbys) for one in held)

    async def may_forget(self, partition: int) -> bool:
        """Whether this node, no replica of the partition any more, may delete what it has of it: see `retention`.

        The replicas, and the store by URL where they are too few, are asked for what they have now. Raises
        BrokerUnavailable, TopicMissing, StoreUnavailable.
        """
        start, end = await self._sources.changelog_bounds(partition)
        catalog = self._cluster.catalog
        holders_min = catalog.settings.snapshot_holders_min
        held = catalog.partitions[partition : partition + 1]
        names = {name for one in held for name in (one.owner, *one.standbys)} - {self._cluster.name}
        replicas = [catalog.nodes[name] for name in sorted(names & catalog.nodes.keys())]
        told = await asyncio.gather(*(self._told(node.name, node.http_address, partition) for node in replicas))
        # One that is further than the end is of an earlier changelog, whose topic was made again, or was just taken.
        offsets = {source.name: source.snapshot.changelog_offset for source in told if source is not None}
        verified = {name: offset for name, offset in offsets.items() if offset <= end}
        if self._store is not None and not may_forget(verified, start, holders_min):
            stored = await self.stored(partition)
            verified |= {STORE_HOLDER: stored} if stored <= end else {}
        allowed = may_forget(verified, start, holders_min)
        if not allowed:
            log.info("copy kept, too few others have one", partition=partition, start=start, holders=verified)
        return allowed

    # the store by URL

    def _owns(self, partition: int) -> bool:
        held = self._cluster.catalog.partitions
        return partition < len(held) and held[partition].owner == self._cluster.name

    async def _keep_uploading(self, store: SnapshotStore) -> None:
        while True:
            for partition, snapshot in list(self._verified.items()):
                late = self._uploaded.get(partition, 0) < snapshot.changelog_offset
                due = self._clock.monotonic() >= self._upload_due.get(partition, 0.0)
                if late and due and self._owns(partition):
                    await self._upload(store, snapshot)
            await asyncio.sleep(SNAPSHOT_LOOK_MS / 1000)

    async def _upload(self, store: SnapshotStore, snapshot: Snapshot) -> None:
        """Its folder may go meanwhile only if this takes longer than a peer may take for one file."""
        partition, offset = snapshot.partition, snapshot.changelog_offset
        uploading = asyncio.ensure_future(self._at_store(store.upload, snapshot, self._folder.place(partition, offset)))
        try:
            while not uploading.done():
                self._pin(snapshot)
                await asyncio.wait({uploading}, timeout=SNAPSHOT_PIN_MS_MAX / 4000)
            uploading.result()
            self._uploaded[partition] = offset
            self._upload_reasons.pop(partition, None)
            await self._at_store(store.collect, partition)
            log.info("snapshot uploaded", partition=partition, offset=offset, place=store.place)
        except HeadraceError as failure:
            self._upload_due[partition] = self._clock.monotonic() + SNAPSHOT_RETRY_MS / 1000
            self._failed += 1
            self._upload_reasons[partition] = str(failure)
            log.warning("snapshot not uploaded", partition=partition, reason=str(failure))

    # restoring

    async def restore(self, partition: int, folder: Path) -> bool:
        """Put a snapshot that the changelog goes on from into `folder`, in place of what is there. False: none is.

        The nearest is taken: the newest on the own disk, of a peer, in the store by URL; the next one where that can't
        be had whole. While the changelog is whole, nothing that is wrong with others keeps it from being folded.
        Raises BrokerUnavailable, PeerUnavailable, StoreUnavailable also when this node's disk refuses.
        """
        async with self._busy[partition], self._restoring:
            started = self._clock.monotonic()
            start, end = await self._sources.changelog_bounds(partition)
            found, fetched, source = await self._own(partition, start, end), 0, self._cluster.name
            if found is None:
                taken = await self._fetch_nearest(partition, start, end)
                if taken is None:
                    return False
                found, fetched, source = taken
            await self._to_the_end(self._folder.link, found, folder)
            told = Restored(source, found.changelog_offset, found.bytes, fetched, self._clock.monotonic() - started)
            self._restored[partition] = told
            log.info("snapshot restored", partition=partition, source=source, offset=told.changelog_offset,
                     bytes=told.bytes, bytes_fetched=fetched, seconds=round(told.seconds, 3))  # fmt: skip
            return True

    async def _own(self, partition: int, start: int, end: int) -> Snapshot | None:
        """The newest on this disk that is of use, read again: what it shares with a damaged store may be damaged."""
        since_s = self._clock.monotonic()
        for offset in reversed(await self._at_disk(self._folder.offsets, partition)):
            if not start <= offset <= end:
                continue
            try:
                snapshot = await self._at_disk(self._folder.read, partition, offset)
                await self._verify(snapshot, since_s)
            except (StateCorrupt, NotFound) as failure:
                log.error("damaged snapshot not used", partition=partition, reason=str(failure))
                continue
            return snapshot
        return None

    async def _fetch_nearest(self, partition: int, start: int, end: int) -> tuple[Snapshot, int, str] | None:
        """A snapshot that is now one of this node's own, the bytes that came, and from where; None: there is none."""
        failed: set[tuple[str, int]] = set()
        while len(failed) < SNAPSHOT_ATTEMPTS_MAX:
            nearest = await self._nearest(partition, start, end, failed)
            if nearest is None:
                break
            try:
                return nearest.snapshot, await self._fetch(nearest), nearest.name
            except (PeerUnavailable, PeerRefused, NotFound, StateCorrupt):
                failed.add(nearest.key)
            except StoreUnavailable as failure:
                if start or nearest.address:
                    raise
                log.warning("store gives no file, the changelog is whole", partition=partition, reason=str(failure))
                failed.add(nearest.key)
        if failed and start:
            raise PeerUnavailable(f"no snapshot of partition {partition} could be fetched whole; it is tried again")
        return None

    async def _nearest(
        self, partition: int, start: int, end: int, failed: Collection[tuple[str, int]] = ()
    ) -> _Source | None:
        """The peer with the newest snapshot, those of the same rack and owner and standbys first; else the store."""
        catalog = self._cluster.catalog
        own, held = catalog.nodes.get(self._cluster.name), catalog.partitions[partition : partition + 1]
        replicas = {name for one in held for name in (one.owner, *one.standbys)}
        others = [node for node in catalog.nodes.values() if node.name != self._cluster.name][:NODES_MAX]
        others.sort(key=lambda node: (node.rack != (own.rack if own else ""), node.name not in replicas, node.name))
        told = await asyncio.gather(*(self._told(node.name, node.http_address, partition) for node in others))

        def useful(source: _Source | None) -> TypeGuard[_Source]:
            return source is not None and start <= source.snapshot.changelog_offset <= end and source.key not in failed

        found = [source for source in told if useful(source)]
        if found:
            return max(found, key=lambda source: source.snapshot.changelog_offset)
        stored = await self._in_store(partition, start)
        return stored if useful(stored) else None

    async def _in_store(self, partition: int, start: int) -> _Source | None:
        """The newest in the store by URL. Raises StoreUnavailable when the changelog does not have all by itself."""
        try:
            snapshot = await self._newest_stored(partition)
        except StoreUnavailable as failure:
            if start:
                raise
            log.warning("store not asked, the changelog is whole", partition=partition, reason=str(failure))
            return None
        return None if snapshot is None else _Source(STORE_HOLDER, "", snapshot)

    async def _told(self, name: str, address: str, partition: int) -> _Source | None:
        try:
            content = await self._client.ask(address, "GET", f"/peer/snapshots/{partition}")
            return _Source(name, address, decode_snapshot(content, self._folder.changelog, partition))
        except NotFound:
            return None
        except (PeerUnavailable, PeerRefused, StateCorrupt) as failure:
            log.info("peer has no snapshot to give", partition=partition, peer=name, reason=str(failure))
            return None

    async def _fetch(self, source: _Source) -> int:
        """Make the snapshot one of this node's own; the bytes that were not here yet."""
        snapshot = source.snapshot
        wanted = await self._at_disk(self._folder.wanted, snapshot)
        slots = asyncio.Semaphore(SNAPSHOT_FETCHES_MAX)

        async def fetch(file: SnapshotFile) -> None:
            async with slots:
                await self._fetch_file(source, file)

        try:
            async with asyncio.TaskGroup() as tasks:
                for file in sorted(wanted, key=lambda file: -file.bytes):
                    tasks.create_task(fetch(file))
        except BaseExceptionGroup as failures:
            log.warning("snapshot not fetched", source=source.name, reason=str(failures.exceptions[0]))
            raise failures.exceptions[0] from None
        await self._to_the_end(self._folder.adopt, snapshot)
        self._verified[snapshot.partition] = snapshot
        self._looked.add(snapshot.partition)
        await self._prune(snapshot.partition)
        return sum(file.bytes for file in wanted)

    async def _fetch_file(self, source: _Source, file: SnapshotFile) -> None:
        snapshot = source.snapshot
        target = self._folder.fetched(snapshot.partition, file.sha256)
        if source.address:
            path = f"/peer/snapshots/{snapshot.partition}/{snapshot.changelog_offset}/{file.sha256}"
            await self._client.fetch(source.address, path, target, file.bytes, file.sha256, sync=False)
        elif self._store is not None:
            await self._at_store(self._store.fetch, snapshot, file, target)
        await self._at_disk(self._folder.arrived, snapshot.partition, file.sha256)

    # operators and peers

    async def take_now(self, partition: int) -> Mapping[str, Any]:
        """What an operator is told who asked for a snapshot. Raises what `take` raises."""
        snapshot = await self.take(partition)
        return {
            "partition": partition,
            "changelog_offset": snapshot.changelog_offset,
            "created_ms": snapshot.created_ms,
            "files": len(snapshot.files),
            "bytes": snapshot.bytes,
        }

    async def verify_again(self, partition: int) -> Mapping[str, Any]:
        """Read every file of the snapshots here again; a damaged one is removed, named, and a new one is due."""
        async with self._busy[partition]:
            right, damaged, since_s = [], [], self._clock.monotonic()
            for offset in await self._at_disk(self._folder.offsets, partition):
                try:
                    await self._verify(await self._at_disk(self._folder.read, partition, offset), since_s)
                    right.append(offset)
                except StateCorrupt as failure:
                    damaged.append(str(failure))
                    self._due.pop(partition, None)
                    log.error("damaged snapshot removed", partition=partition, reason=str(failure))
            return {"node": self._cluster.name, "right": right, "damaged": damaged}

    def routes(self) -> Sequence[PeerRoute]:
        return (
            PeerRoute("GET", "/peer/snapshots/{partition}", self._tell_newest),
            PeerRoute("GET", "/peer/snapshots/{partition}/{offset}/{sha256}", self._give_file),
        )

    async def _tell_newest(self, call: PeerCall) -> PeerReply:
        partition = number_of(call, "partition")
        snapshot = self._verified.get(partition)
        if snapshot is None:
            raise NotFound(f"node {self._cluster.name} has no verified snapshot of partition {partition}")
        self._pin(snapshot)
        return PeerReply(encode_snapshot(snapshot))

    async def _give_file(self, call: PeerCall) -> PeerReply:
        partition, offset = number_of(call, "partition"), number_of(call, "offset")
        held = self._verified.get(partition)
        if held is None or held.changelog_offset != offset:
            held = await self._at_disk(self._folder.read, partition, offset)
        self._pin(held)
        return PeerReply(file=self._folder.path(held, call.variables["sha256"]))

    def statistics(self) -> SnapshotsStatistics:
        partitions = {
            number: PartitionSnapshots(
                snapshot.changelog_offset, snapshot.created_ms, snapshot.bytes, self._uploaded.get(number, 0)
            )
            for number, snapshot in self._verified.items()
        }
        not_uploaded = {number: reason for number, reason in self._upload_reasons.items() if self._owns(number)}
        for number, reason in (not_uploaded | self._reasons).items():
            partitions[number] = replace(partitions.get(number, PartitionSnapshots(0, 0, 0)), reason=reason)
        return SnapshotsStatistics(
            self._taken,
            self._failed,
            partitions,
            dict(self._restored),
            self._folder.bytes_hashed,
            None if self._store is None else self._store.statistics(),
        )


def number_of(call: PeerCall, name: str) -> int:
    """A number of the path. Raises NotFound for what is none."""
    text = call.variables[name]
    if not (text.isascii() and text.isdecimal() and len(text) <= _NUMBER_DIGITS_MAX):
        raise NotFound(f"{name} {text[:40]!r} is no number")
    return int(text)
