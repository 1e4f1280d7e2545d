"""Whether owner and standbys hold the same, row for row, as of one frame.

1. Each standby folds no further.
2. The owner copies its store, as of the offset O where its changelog goes on, and digests the copy.
3. Each standby folds exactly to O, copies its store, folds on, and digests its copy.
4. Equal digests are equal stores. For others, the entries of the first bucket that differs name the rows.

The owner's node does this when asked, and carries on with its work meanwhile. A standby whose comparison is not gone on
with folds on after VERIFY_HOLD_MS_MAX. Copies are links and live in a folder of their own, a pair for a partition.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

from node.kernel.clock import Clock
from node.kernel.digest import BucketEntry, StoreDigest, differences, differing_buckets, differing_entries
from node.kernel.errors import NotFound, PeerRefused, PeerUnavailable, StoreUnavailable
from node.kernel.limits import (
    DIGEST_BUCKETS,
    PEER_ASK_MS_MAX,
    SNAPSHOT_INSPECT_MS_MAX,
    VERIFY_ANSWER_MS,
    VERIFY_HOLD_MS_MAX,
    VERIFY_LOOK_MS,
    VERIFY_WORKS_MAX,
)
from replication.peers import PeerCall, PeerReply, PeerRoute
from replication.snapshots import Copied, Members, number_of

log = structlog.get_logger(__name__)

_ROOT = "/peer/verify/{partition}"
_UNANSWERED = (PeerUnavailable, PeerRefused, NotFound)


class Held(Protocol):
    """What is needed of `replication.standby.StandbyFolder`."""

    def hold(self, partition: int, offset: int) -> int:
        """Fold nothing that ends behind `offset`; the store's offset. Raises KeyError where nothing is folded."""
        ...

    def resume(self, partition: int) -> None: ...


class Asking(Protocol):
    """What is needed of `replication.peers.PeerClient`."""

    async def ask(
        self, address: str, method: str, path: str, body: bytes = b"", wait_ms_max: int = PEER_ASK_MS_MAX
    ) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Inspection:
    """Going through a copy of a store, elsewhere. Both raise StateCorrupt and StoreUnavailable."""

    digest: Callable[[Path], Awaitable[StoreDigest]]
    bucket: Callable[[Path, int], Awaitable[list[BucketEntry]]]


class Verification:
    """`files` reads a partition's snapshots on this node again, and tells of each whether it is right."""

    def __init__(
        self,
        folder: Path,
        cluster: Members,
        client: Asking,
        stores: Callable[[], Mapping[int, Copied]],
        standbys: Held,
        inspection: Inspection,
        files: Callable[[int], Awaitable[Mapping[str, Any]]],
        clock: Clock,
    ) -> None:
        self._folder = folder
        self._cluster = cluster
        self._client = client
        self._stores = stores
        self._standbys = standbys
        self._inspection = inspection
        self._files = files
        self._clock = clock
        self._works: dict[tuple[str, int, int], asyncio.Task[bytes]] = {}
        self._holds: dict[int, asyncio.TimerHandle] = {}
        self._copies: dict[int, asyncio.TimerHandle] = {}
        self._verifying: set[int] = set()

    async def open(self) -> None:
        """Remove copies that a crash left."""
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def close(self) -> None:
        for partition in list(self._holds):
            self._resume(partition)
        for timer in self._copies.values():
            timer.cancel()
        works = list(self._works.values())
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)

    # the owner's side

    async def verify(self, partition: int) -> Mapping[str, Any]:
        """Compare this node's store with each standby's, and read the snapshots of all of them again.

        The result is plain JSON: `equal`, the offset, and for each standby what differs. Raises PeerRefused where this
        node is not the owner, NotFound where the partition is not open, StoreUnavailable, StateCorrupt.
        """
        catalog, name = self._cluster.catalog, self._cluster.name
        held = catalog.partitions[partition] if partition < len(catalog.partitions) else None
        if held is None or held.owner != name:
            raise PeerRefused(
                f"node {name} does not own partition {partition}; ask {held.owner if held else 'another'}"
            )
        if partition in self._verifying:
            raise PeerRefused(f"partition {partition} is being verified already; wait for that")
        self._verifying.add(partition)
        addresses = {other: catalog.nodes[other].http_address for other in held.standbys if other in catalog.nodes}
        try:
            return await self._verify(partition, addresses)
        finally:
            self._verifying.discard(partition)

    async def _verify(self, partition: int, addresses: Mapping[str, str]) -> Mapping[str, Any]:
        results: dict[str, Mapping[str, Any]] = {}
        held: list[str] = []
        try:
            for standby, address in addresses.items():
                try:
                    await self._ask(address, partition, "hold")
                    held.append(standby)
                except _UNANSWERED as failure:
                    results[standby] = {"equal": None, "reason": str(failure)}
            return await self._compare(partition, {standby: addresses[standby] for standby in held}, results)
        finally:
            for standby in held:
                with contextlib.suppress(*_UNANSWERED):
                    await self._ask(addresses[standby], partition, "end")

    async def _compare(
        self, partition: int, held: Mapping[str, str], results: dict[str, Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """`results` has what is known of standbys that are not `held`, by name to address."""
        async with self._copied(partition) as (copy, offset):
            theirs = {
                standby: asyncio.create_task(self._digest_there(address, partition, offset))
                for standby, address in held.items()
            }
            try:
                ours = await self._inspection.digest(copy)
                for standby, digesting in theirs.items():
                    results[standby] = await self._compared(held[standby], partition, ours, digesting, copy)
            finally:
                for digesting in theirs.values():
                    digesting.cancel()
                await asyncio.gather(*theirs.values(), return_exceptions=True)
        snapshots = [await self._files(partition)]
        for address in held.values():
            with contextlib.suppress(*_UNANSWERED):
                snapshots.append(msgspec.json.decode(await self._work(address, partition, "files")))
        right = all(result["equal"] for result in results.values()) and not any(one["damaged"] for one in snapshots)
        log.info("partition verified", partition=partition, offset=offset, right=right, standbys=len(results))
        return {"partition": partition, "right": right, "changelog_offset": offset, "rows": ours.rows,
                "chunks": ours.chunks, "standbys": results, "snapshots": snapshots}  # fmt: skip

    async def _digest_there(self, address: str, partition: int, offset: int) -> StoreDigest:
        content = await self._work(address, partition, f"digest?offset={offset}")
        return msgspec.json.decode(content, type=StoreDigest)

    async def _compared(
        self, address: str, partition: int, ours: StoreDigest, digesting: Awaitable[StoreDigest], copy: Path
    ) -> Mapping[str, Any]:
        try:
            theirs = await digesting
            found = differences(ours, theirs)
            buckets = differing_buckets(ours, theirs)
            named: list[str] = []
            if buckets:
                path = f"bucket?offset={theirs.changelog_offset}&bucket={buckets[0]}"
                entries = msgspec.json.decode(await self._work(address, partition, path), type=list[BucketEntry])
                named = differing_entries(await self._inspection.bucket(copy, buckets[0]), entries)
            return {"equal": not found, "differences": found, "first": named}
        except (*_UNANSWERED, msgspec.MsgspecError) as failure:
            return {"equal": None, "reason": str(failure)}

    async def _ask(self, address: str, partition: int, path: str) -> bytes:
        return await self._client.ask(address, "POST", f"/peer/verify/{partition}/{path}")

    async def _work(self, address: str, partition: int, path: str) -> bytes:
        """Ask for work that takes longer than a call may: the same call again joins it."""
        deadline = self._clock.monotonic() + SNAPSHOT_INSPECT_MS_MAX / 1000
        while True:
            answer = await self._client.ask(
                address, "POST", f"/peer/verify/{partition}/{path}", wait_ms_max=2 * VERIFY_ANSWER_MS
            )
            if answer:
                return answer
            if self._clock.monotonic() > deadline:
                raise PeerUnavailable(f"{address} has not done {path} of partition {partition} in time; verify again")

    # copies

    @contextlib.asynccontextmanager
    async def _copied(self, partition: int) -> AsyncIterator[tuple[Path, int]]:
        copy = self._folder / f"{partition}-own"
        store = self._stores().get(partition)
        if store is None:
            raise NotFound(f"partition {partition} is not open on this node; wait until it runs")
        try:
            await _delete(copy)
            offset = await asyncio.to_thread(store.checkpoint, copy)
            yield copy, offset
        finally:
            await _delete(copy)

    def _place(self, partition: int, offset: int) -> Path:
        return self._folder / f"{partition}-{offset}"

    # a standby's side

    def routes(self) -> Sequence[PeerRoute]:
        return (
            PeerRoute("POST", f"{_ROOT}/hold", self._hold),
            PeerRoute("POST", f"{_ROOT}/digest", self._digest),
            PeerRoute("POST", f"{_ROOT}/bucket", self._bucket),
            PeerRoute("POST", f"{_ROOT}/files", self._verify_files),
            PeerRoute("POST", f"{_ROOT}/end", self._end),
        )

    async def _hold(self, call: PeerCall) -> PeerReply:
        partition = number_of(call, "partition")
        return PeerReply(str(self._held_at(partition, 0)).encode())

    def _held_at(self, partition: int, offset: int) -> int:
        try:
            reached = self._standbys.hold(partition, offset)
        except KeyError:
            raise PeerRefused(f"node {self._cluster.name} does not stand by for partition {partition} now") from None
        if partition not in self._holds:
            loop = asyncio.get_running_loop()
            self._holds[partition] = loop.call_later(VERIFY_HOLD_MS_MAX / 1000, self._resume, partition)
        return reached

    def _resume(self, partition: int) -> None:
        timer = self._holds.pop(partition, None)
        if timer is not None:
            timer.cancel()
            self._standbys.resume(partition)

    async def _digest(self, call: PeerCall) -> PeerReply:
        partition, offset = number_of(call, "partition"), _asked(call, "offset")

        async def digest() -> bytes:
            copy = await self._copy_at(partition, offset)
            return msgspec.json.encode(await self._inspection.digest(copy))

        return await self._answer(("digest", partition, offset), digest())

    async def _bucket(self, call: PeerCall) -> PeerReply:
        partition, offset, bucket = number_of(call, "partition"), _asked(call, "offset"), _asked(call, "bucket")
        copy = self._place(partition, offset)

        async def entries() -> bytes:
            if bucket >= DIGEST_BUCKETS or not copy.exists():
                raise NotFound(f"partition {partition} has no copy as of {offset} here; verify again")
            return msgspec.json.encode(await self._inspection.bucket(copy, bucket))

        return await self._answer((f"bucket {bucket}", partition, offset), entries())

    async def _verify_files(self, call: PeerCall) -> PeerReply:
        partition = number_of(call, "partition")

        async def files() -> bytes:
            return msgspec.json.encode(await self._files(partition))

        return await self._answer(("files", partition, 0), files())

    async def _copy_at(self, partition: int, offset: int) -> Path:
        """A copy of the standby's store as of `offset`, to which it folds and no further; then it folds on.

        Raises PeerRefused when it is further, does not get there in time, or is no standby.
        """
        try:
            await self._fold_to(partition, offset)
            store = self._stores().get(partition)
            if store is None:
                raise PeerRefused(f"partition {partition} was closed meanwhile; verify again")
            await self._forget(partition)
            copy = self._place(partition, offset)
            self._forget_later(partition)
            if await asyncio.to_thread(store.checkpoint, copy) != offset:
                raise StoreUnavailable(f"partition {partition} was folded on while it was copied; verify again")
            return copy
        finally:
            self._resume(partition)

    def _forget_later(self, partition: int) -> None:
        """Should the owner go away: links keep tables on the disk that the store has done with."""
        loop = asyncio.get_running_loop()
        self._copies[partition] = loop.call_later(
            SNAPSHOT_INSPECT_MS_MAX / 1000, lambda: loop.create_task(self._forget(partition))
        )

    async def _forget(self, partition: int) -> None:
        timer = self._copies.pop(partition, None)
        if timer is not None:
            timer.cancel()
        for copy in await asyncio.to_thread(lambda: list(self._folder.glob(f"{partition}-[0-9]*"))):
            await _delete(copy)

    async def _end(self, call: PeerCall) -> PeerReply:
        """The owner has what it wants, or gave up."""
        partition = number_of(call, "partition")
        self._resume(partition)
        await self._forget(partition)
        return PeerReply()

    async def _fold_to(self, partition: int, offset: int) -> None:
        deadline = self._clock.monotonic() + VERIFY_HOLD_MS_MAX / 1000
        reached = self._held_at(partition, offset)
        while reached < offset:
            store = self._stores().get(partition)
            if store is None or self._clock.monotonic() > deadline:
                raise PeerRefused(f"partition {partition} got to {reached} here, not to {offset}; see why it lags")
            await asyncio.sleep(VERIFY_LOOK_MS / 1000)
            reached = store.changelog_offset()
        if reached > offset:
            raise PeerRefused(f"partition {partition} is at {reached} here, past {offset}; verify again")

    async def _answer(self, key: tuple[str, int, int], work: Coroutine[Any, Any, bytes]) -> PeerReply:
        """What the work gives, or nothing yet: the same call again joins it."""
        task = self._works.get(key)
        if task is None:
            if len(self._works) >= VERIFY_WORKS_MAX:
                self._works = {key: old for key, old in self._works.items() if not old.done()}
            if len(self._works) >= VERIFY_WORKS_MAX:
                work.close()
                raise PeerRefused(f"{VERIFY_WORKS_MAX} comparisons run on this node (VERIFY_WORKS_MAX); wait for one")
            task = self._works[key] = asyncio.create_task(work)
        else:
            work.close()
        await asyncio.wait({task}, timeout=VERIFY_ANSWER_MS / 1000)
        if not task.done():
            return PeerReply(b"")
        self._works.pop(key, None)
        return PeerReply(task.result())


def _asked(call: PeerCall, name: str) -> int:
    return number_of(PeerCall({name: call.query.get(name, "")}, {}, b"", call.peer), name)


async def _delete(copy: Path) -> None:
    await asyncio.to_thread(shutil.rmtree, copy, ignore_errors=True)
