"""Keeps the model files of the catalog's versions on this node, and the catalog told of which are here.

A file that a version needs and this node lacks is fetched from a node that the catalog says has it, the others being
tried where that fails. A file counts as held once its hash was compared on this node, in this run, and again every
BLOB_CHECK_MS; one that is lost or damaged is told to the catalog and fetched again. A file that no version needs is
let be: its owner removes it. That `keep` must hold `wanted()`, else what one removes the other fetches again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Protocol

import structlog

from node.kernel import limits
from node.kernel.clock import Clock
from node.kernel.errors import (
    BoundExceeded,
    ClusterUnavailable,
    HeadraceError,
    NotFound,
    PeerRefused,
    PeerUnavailable,
    StoreUnavailable,
)
from replication.blobs import BlobStore
from replication.catalog import Catalog
from replication.catalog_tables import table_blobs
from replication.commands import Command, HoldBlob
from replication.peers import PeerCall, PeerClient, PeerReply, PeerRoute

log = structlog.get_logger(__name__)

_LACKING_SHOWN_MAX = 16


class BlobCluster(Protocol):
    """What is needed of `replication.cluster.Cluster`."""

    @property
    def name(self) -> str: ...

    @property
    def incarnation(self) -> int: ...

    @property
    def catalog(self) -> Catalog: ...

    def subscribe(self, changed: Callable[[], None]) -> None: ...

    async def propose(self, command: Command, wait_seconds_max: float = 5.0) -> None: ...


@dataclass(frozen=True, slots=True)
class BlobExchangeStatistics:
    wanted: int
    held: int
    """Of those wanted, here with their hash compared."""
    lacking: tuple[str, ...]
    """Their sha256, the first few."""
    fetching: int
    fetched: int
    failed: int
    """Rounds of asking all holders that brought nothing."""
    lost: int
    """Files that were held and found gone or damaged."""
    last_failure: str


@dataclass(slots=True)
class _Retry:
    """When something that failed is tried again; the wait doubles with each failure."""

    failures: int = 0
    at_s: float = 0.0
    asked: frozenset[str] = frozenset()
    """Addresses that did not give a file; another one is asked at once."""

    def failed(self, now_s: float, asked: frozenset[str] = frozenset()) -> None:
        self.asked = asked
        wait_ms = min(limits.BLOB_RETRY_MS_MIN * 2 ** min(self.failures, 16), limits.BLOB_RETRY_MS_MAX)
        self.failures += 1
        self.at_s = now_s + wait_ms / 1000


def model_blobs(catalog: Catalog) -> frozenset[str]:
    """The sha256 of every model file that a version in the catalog needs."""
    return frozenset(catalog.holders) - table_blobs(catalog)


class BlobExchange:
    """Of the files that `wanted` says the catalog needs, served to peers at `path`.

    `run` is to be supervised; `fetch` and `routes` work beside it."""

    def __init__(
        self,
        blobs: BlobStore,
        client: PeerClient,
        cluster: BlobCluster,
        clock: Clock,
        wanted: Callable[[Catalog], frozenset[str]] = model_blobs,
        path: str = "/peer/blobs",
    ) -> None:
        self._wanted = wanted
        self._path = path
        self._blobs = blobs
        self._client = client
        self._cluster = cluster
        self._clock = clock
        self._changed = asyncio.Event()
        self._held: dict[str, float] = {}
        """sha256 -> when its hash was compared, by the monotonic clock."""
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._check: asyncio.Task[None] | None = None
        self._retries: dict[str, _Retry] = {}
        self._telling = _Retry()
        self._fetched = self._failed = self._lost = 0
        self._last_failure = ""
        self._fault: BaseException | None = None
        cluster.subscribe(self._changed.set)

    def routes(self) -> list[PeerRoute]:
        return [PeerRoute("GET", f"{self._path}/{{sha256}}", self._serve)]

    async def _serve(self, call: PeerCall) -> PeerReply:
        return PeerReply(file=self._blobs.path(call.variables["sha256"]))

    def wanted(self) -> frozenset[str]:
        """The sha256 of every file that a version in the catalog needs."""
        return self._wanted(self._cluster.catalog)

    def statistics(self) -> BlobExchangeStatistics:
        wanted = self.wanted()
        return BlobExchangeStatistics(
            wanted=len(wanted),
            held=len(wanted & self._held.keys()),
            lacking=tuple(sorted(wanted - self._held.keys())[:_LACKING_SHOWN_MAX]),
            fetching=len(self._fetches),
            fetched=self._fetched,
            failed=self._failed,
            lost=self._lost,
            last_failure=self._last_failure,
        )

    async def fetch(self, sha256: str) -> bytes:
        """The file's bytes, from here or, if they have to be, from a peer now.

        Raises NotFound when no version needs it or no node has it, PeerUnavailable, PeerRefused, StoreUnavailable.
        """
        with contextlib.suppress(NotFound):
            return await asyncio.to_thread(self._blobs.get, sha256)
        if sha256 in self._held:
            self._lose(sha256)
        if sha256 not in self.wanted():
            raise NotFound(f"no file with sha256 {sha256} is kept here, nor does a model need it; put it in again")
        await asyncio.shield(self._fetches.get(sha256) or self._start_fetch(sha256))
        return await asyncio.to_thread(self._blobs.get, sha256)

    async def run(self) -> None:
        """Until cancelled: look whenever the catalog changes, a file came, or it is time to try again."""
        try:
            while True:
                self._changed.clear()
                try:
                    wait_s = await self._look()
                except StoreUnavailable as failure:
                    self._note(str(failure))
                    wait_s = limits.BLOB_RETRY_MS_MAX / 1000
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
        finally:
            work = [*self._fetches.values(), *([self._check] if self._check else [])]
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _look(self) -> float:
        """One pass: what is missing is fetched, what is unread is read, what changed is told. Seconds to the next.

        Raises what a task of ours failed with and should not have, and StoreUnavailable.
        """
        if self._fault is not None:
            raise self._fault
        wanted, held, now_s = self.wanted(), set(self._held), self._clock.monotonic()
        here = wanted & set(await asyncio.to_thread(self._blobs.names))
        await asyncio.to_thread(self._blobs.delete_parts, wanted | self._fetches.keys())
        for sha256 in (held - here) & self._held.keys():  # a call may have found out meanwhile
            if sha256 in wanted:
                self._lose(sha256)
            else:
                del self._held[sha256]
        for sha256 in self._retries.keys() - wanted:
            del self._retries[sha256]
        self._fetch_some(wanted - here - self._held.keys(), now_s)
        self._check_one(here, now_s)
        await self._tell(here, now_s)
        later = [retry.at_s for retry in (*self._retries.values(), self._telling) if retry.at_s > now_s]
        return max(0.0, min([*later, now_s + limits.BLOB_LOOK_MS / 1000]) - self._clock.monotonic())

    def _lose(self, sha256: str) -> None:
        self._held.pop(sha256, None)
        self._lost += 1
        log.warning("a model file is gone or damaged; it is fetched again", sha256=sha256)
        self._changed.set()

    def _fail(self, sha256: str, failure: BaseException, asked: frozenset[str] = frozenset()) -> None:
        self._retries.setdefault(sha256, _Retry()).failed(self._clock.monotonic(), asked)
        self._note(str(failure))

    def _note(self, reason: str) -> None:
        self._last_failure = reason
        log.warning("model files are not all here yet", reason=reason)

    # --- getting files

    def _fetch_some(self, missing: Set[str], now_s: float) -> None:
        """Start on those due, the ones that failed least first."""
        due = [sha256 for sha256 in missing - self._fetches.keys() if self._can_come(sha256, now_s)]
        order = sorted((self._retries[sha256].failures if sha256 in self._retries else 0, sha256) for sha256 in due)
        for _, sha256 in order[: max(0, limits.BLOB_FETCHES_MAX - len(self._fetches))]:
            self._start_fetch(sha256)

    def _can_come(self, sha256: str, now_s: float) -> bool:
        """Whether somebody has it, and was not asked yet or may be asked again."""
        addresses = frozenset(self._addresses(sha256))
        retry = self._retries.get(sha256) or _Retry()
        return bool(addresses - retry.asked if retry.at_s > now_s else addresses)

    def _start_fetch(self, sha256: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._fetch(sha256), name=f"fetch model file {sha256[:12]}")
        self._fetches[sha256] = task
        task.add_done_callback(lambda done: self._fetch_ended(sha256, done))
        return task

    def _fetch_ended(self, sha256: str, task: asyncio.Task[None]) -> None:
        self._fetches.pop(sha256, None)
        self._changed.set()
        if task.cancelled():
            return
        failure = task.exception()
        if failure is None:
            self._fetched += 1
            self._held[sha256] = self._clock.monotonic()
            self._retries.pop(sha256, None)
            return
        if not isinstance(failure, HeadraceError):
            self._fault = failure
        self._failed += 1
        self._fail(sha256, failure, frozenset(self._addresses(sha256)))

    async def _fetch(self, sha256: str) -> None:
        """From the first holder that gives it. Raises what the last one said."""
        failure: Exception = NotFound(f"no node that is known has the file with sha256 {sha256}; put it in again")
        for address in self._addresses(sha256):
            try:
                await self._client.fetch(
                    address,
                    f"{self._path}/{sha256}",
                    self._blobs.path(sha256),
                    None,
                    sha256,
                    bytes_max=self._blobs.bytes_max,
                )
                return
            except (NotFound, PeerUnavailable, PeerRefused) as refused:
                failure = refused
        raise failure

    def _addresses(self, sha256: str) -> Iterator[str]:
        """Of its holders, in an order that differs by node and file: not all ask the same one first."""
        catalog = self._cluster.catalog
        holders = catalog.holders.get(sha256, {}).keys() & catalog.nodes.keys() - {self._cluster.name}
        order = {name: hashlib.sha256(f"{self._cluster.name} {name} {sha256}".encode()).digest() for name in holders}
        return (catalog.nodes[name].http_address for name in sorted(holders, key=order.__getitem__))

    # --- trusting what is here

    def _check_one(self, here: Set[str], now_s: float) -> None:
        """Start to read the file that was not read for longest, if it is time."""
        if self._check is not None:
            return
        old_s = now_s - limits.BLOB_CHECK_MS / 1000
        read_s = {sha256: self._held.get(sha256, float("-inf")) for sha256 in here}
        due = [(at_s, sha256) for sha256, at_s in read_s.items() if at_s <= old_s and self._is_due(sha256, now_s)]
        if due:
            self._check = asyncio.get_running_loop().create_task(self._compare(min(due)[1]), name="check a model file")
            self._check.add_done_callback(self._check_ended)

    def _is_due(self, sha256: str, now_s: float) -> bool:
        retry = self._retries.get(sha256)
        return retry is None or retry.at_s <= now_s

    async def _compare(self, sha256: str) -> None:
        was_held = sha256 in self._held
        try:
            if await asyncio.to_thread(self._blobs.check, sha256):
                self._held[sha256] = self._clock.monotonic()
                self._retries.pop(sha256, None)
            elif sha256 in self._held or not was_held:  # else a call has found out meanwhile
                self._lose(sha256)
        except StoreUnavailable as failure:
            self._fail(sha256, failure)

    def _check_ended(self, task: asyncio.Task[None]) -> None:
        self._check = None
        self._changed.set()
        if not task.cancelled() and task.exception() is not None:
            self._fault = task.exception()

    # --- telling the catalog

    async def _tell(self, here: Set[str], now_s: float) -> None:
        """Propose what the catalog does not have right about this node, until one can't be."""
        if self._telling.at_s > now_s:
            return
        for sha256 in sorted(self.wanted()):
            held = sha256 in self._held
            if sha256 in here and not held:  # yet to be read
                continue
            try:
                if not await self._tell_one(sha256, held):
                    return
            except (PeerRefused, ClusterUnavailable, BoundExceeded) as failure:
                self._telling.failed(self._clock.monotonic())
                log.info("the catalog can't be told of a model file yet", sha256=sha256, reason=str(failure))
                return
        self._telling = _Retry()

    async def _tell_one(self, sha256: str, held: bool) -> bool:
        """Whether this node is a member, so that it has a say."""
        name, incarnation, catalog = self._cluster.name, self._cluster.incarnation, self._cluster.catalog
        member = catalog.nodes.get(name)
        if member is None or member.incarnation != incarnation:
            return False
        holders = catalog.holders.get(sha256)
        if holders is not None and (name in holders) != held:
            await self._cluster.propose(
                HoldBlob(revision=catalog.revision, node=name, incarnation=incarnation, blob=sha256, held=held)
            )
        return True
