"""Puts what a node's directory wishes into the cluster's catalog, one after another, again until it is taken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from node.kernel.clock import Clock
from node.kernel.errors import HeadraceError
from node.kernel.limits import PUBLISH_RETRY_MS_MAX, PUBLISH_RETRY_MS_MIN
from tenants.agreement import ModelPublisher, encode_report
from tenants.registry import (
    NotPublished,
    Publication,
    Published,
    PutFeatures,
    PutTenant,
    PutVersion,
    Quarantine,
    Snapshot,
    Withdraw,
    publications,
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Retry:
    due: float
    wait_ms: int


class Publishing:
    """`snapshot` gives the registry's present one; `apply` hears what became of each publication.

    What is refused waits longer and longer, and holds up nothing else.
    """

    def __init__(
        self,
        publish: ModelPublisher,
        clock: Clock,
        snapshot: Callable[[], Snapshot],
        apply: Callable[[Published | NotPublished], Awaitable[None]],
    ) -> None:
        self._publish = publish
        self._clock = clock
        self._snapshot = snapshot
        self._apply = apply
        self._retries: dict[Publication, _Retry] = {}
        self.changed = asyncio.Event()
        """To be set whenever the snapshot has changed."""
        self.last_error = ""

    async def catalog_known(self) -> None:
        """Wait until the catalog is known as it is now: decisions on one of before a restart would be wrong."""
        wait_ms = PUBLISH_RETRY_MS_MIN
        while True:
            try:
                return await self._publish.current()
            except HeadraceError as error:
                self.last_error = f"the cluster can't be asked yet, so no files are taken: {error}"
                log.warning("models are not looked at yet", error=str(error))
            await asyncio.sleep(wait_ms / 1000)
            wait_ms = min(wait_ms * 2, PUBLISH_RETRY_MS_MAX)

    async def run(self) -> None:
        while True:
            self.changed.clear()
            wanted = publications(self._snapshot())
            self._retries = {what: retry for what, retry in self._retries.items() if what in wanted}
            for what in wanted:
                retry = self._retries.get(what)
                due = retry is None or retry.due <= self._clock.monotonic()
                if due and what in publications(self._snapshot()):
                    await self._try(what)
            wait = min((retry.due for retry in self._retries.values()), default=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if wait is None else max(wait - self._clock.monotonic(), 0.0)):
                    await self.changed.wait()

    async def _try(self, what: Publication) -> None:
        try:
            await self._put(what)
        except HeadraceError as error:
            before = self._retries.get(what)
            wait_ms = PUBLISH_RETRY_MS_MIN if before is None else min(before.wait_ms * 2, PUBLISH_RETRY_MS_MAX)
            self._retries[what] = _Retry(self._clock.monotonic() + wait_ms / 1000, wait_ms)
            self.last_error = f"not agreed by the cluster yet: {error}"
            log.warning("not published", what=type(what).__name__, of=_subject(what), error=str(error))
            await self._apply(NotPublished(what, str(error)))
        else:
            self._retries.pop(what, None)
            await self._apply(Published(what))

    async def _put(self, what: Publication) -> None:
        match what:
            case PutTenant(tenant, text):
                await self._publish.tenant(tenant, text)
            case PutFeatures(tenant, text):
                await self._publish.features(tenant, text)
            case PutVersion(name, version, blob, manifest, report, stages):
                await self._publish.put(name, version, blob, manifest, encode_report(report), stages)
            case Withdraw(name, version):
                await self._publish.withdraw(name, version)
            case Quarantine(name, version, reason):
                await self._publish.quarantine(name, version, reason)


def _subject(what: Publication) -> str:
    return what.tenant if isinstance(what, PutTenant | PutFeatures) else str(what.name)
