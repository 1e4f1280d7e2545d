"""Moves staged versions on, or back: by the conditions of their manifests, and by operators.

A node by itself judges what it has seen itself. In a cluster each node tells the leader what it has seen, and the
leader judges all of it together; whatever is decided there is in the catalog, so that all nodes do the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import msgspec
import structlog

from node.kernel.clock import Clock
from node.kernel.errors import HeadraceError, NotFound
from node.kernel.limits import STAGE_LOOK_MS
from node.kernel.types import ModelName
from tenants.agreement import ModelPublisher
from tenants.comparison import Figures, merged
from tenants.judge import Verdict, judge
from tenants.registry import AUTOMATIC, Entry, Snapshot
from tenants.stage import Promote, RollBack

log = structlog.get_logger(__name__)

_decoder = msgspec.msgpack.Decoder(Figures)
_NOT_BESIDE = "it can't run beside what is live now"


class Judging:
    """`figures` gives what this node has seen by version, `decide` takes a wish on a node by itself."""

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        figures: Callable[[], Mapping[str, Figures]],
        clock: Clock,
        decide: Callable[[Promote | RollBack], Awaitable[None]],
        publish: ModelPublisher | None,
    ) -> None:
        self._snapshot = snapshot
        self._figures = figures
        self._clock = clock
        self._decide = decide
        self._publish = publish
        self.changed = asyncio.Event()
        """To be set whenever the snapshot has changed."""
        self.verdicts: Mapping[str, Verdict] = {}
        """The last ones by version, of what is staged; of a cluster, at its leader."""

    async def run(self) -> None:
        """For ever; asleep while nothing is staged."""
        while True:
            self.changed.clear()
            await self.look()
            if any(entry.staged is not None for entry in self._snapshot().models.values()):
                await asyncio.sleep(STAGE_LOOK_MS / 1000)
            else:
                await self.changed.wait()

    async def look(self) -> None:
        """Judge what is staged once, and do what follows."""
        seen = self._gathered()
        if seen is None:
            self.verdicts = {}
            return
        verdicts: dict[str, Verdict] = {}
        wishes = list(self._left_out())
        for name, entry in sorted(self._snapshot().models.items()):
            staged = entry.staged
            if staged is None or entry.live is None:
                continue
            version, now_ms = staged.version.version, self._clock.now_ms()
            figures = merged(seen.get(version, ()), staged.stage)
            verdict = verdicts[version] = judge(staged.asked, figures, (now_ms - staged.since_ms) / 1000)
            if verdict.decision == "promote":
                wishes.append(Promote(name, version, staged.stage, AUTOMATIC, verdict.reason, now_ms))
            elif verdict.decision == "roll back":
                wishes.append(RollBack(name, version, AUTOMATIC, verdict.reason, now_ms))
        self.verdicts = verdicts
        for wish in wishes:
            try:
                await self._wish(wish)
            except HeadraceError as error:  # it is judged again
                log.warning("a stage was not changed", model=str(wish.name), error=str(error))

    def _gathered(self) -> Mapping[str, list[Figures]] | None:
        own = self._figures()
        if self._publish is None:
            return {version: [figures] for version, figures in own.items()}
        told = self._publish.gathered({version: msgspec.msgpack.encode(figures) for version, figures in own.items()})
        if told is None:
            return None
        found: dict[str, list[Figures]] = {}
        for version, bodies in told.items():
            for body in bodies:
                try:
                    found.setdefault(version, []).append(_decoder.decode(body))
                except msgspec.MsgspecError as error:
                    log.warning("a node's figures of a staged version can't be read", version=version, error=str(error))
        return found

    def _left_out(self) -> list[Promote | RollBack]:
        """Versions that the catalog has staged and that can't be here; all nodes find the same."""
        snapshot = self._snapshot()
        if snapshot.shared is None:
            return []
        return [
            RollBack(name, version, AUTOMATIC, _NOT_BESIDE, self._clock.now_ms())
            for name, versions in snapshot.shared.versions.items()
            for version, known in versions.items()
            if known.state == "staged"
            and (entry := snapshot.models.get(name)) is not None
            and entry.live is not None
            and entry.staged is None
        ]

    # Operators

    async def promote(self, name: ModelName, version: str, to_live: bool, who: str, reason: str) -> None:
        """The staged version goes to its next stage, or is live; `version` '' or its first digits.

        Raises NotFound, PeerRefused, ClusterUnavailable.
        """
        staged = self._entry(name).staged
        if staged is None or not staged.version.version.startswith(version):
            raise NotFound(f"no version {version}{' ' if version else ''}of {name} is in stages; look at its models")
        key, now_ms = staged.version.version, self._clock.now_ms()
        await self._wish(Promote(name, key, staged.stage, who, reason, now_ms, to_live))

    async def roll_back(self, name: ModelName, version: str, who: str, reason: str) -> None:
        """The staged version, or else the live one, is quarantined; `version` as for `promote`.

        Raises NotFound, also where no version was live before; PeerRefused, ClusterUnavailable.
        """
        entry = self._entry(name)
        running = entry.staged or entry.live
        if running is None or not running.version.version.startswith(version):
            raise NotFound(f"version {version} of {name} is neither in stages nor live; look at its models")
        shared = self._snapshot().shared
        fallback = entry.previous is not None if shared is None else shared.has_fallback(name)
        if entry.staged is None and not fallback:
            raise NotFound(f"no version of {name} was live before that may be again; drop another pair, or delete it")
        await self._wish(RollBack(name, running.version.version, who, reason, self._clock.now_ms()))

    def _entry(self, name: ModelName) -> Entry:
        entry = self._snapshot().models.get(name)
        if entry is None:
            raise NotFound(f"there is no model {name}; /v1/models lists those that are")
        return entry

    async def _wish(self, wish: Promote | RollBack) -> None:
        log.info("stage changes", **{name: str(getattr(wish, name)) for name in ("name", "version", "who", "reason")})
        if self._publish is None:
            await self._decide(wish)
        elif isinstance(wish, Promote):
            await self._publish.promote(wish)
        else:
            await self._publish.roll_back(wish)
