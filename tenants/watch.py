"""Takes models from the watched directory: `<watched>/<tenant>/<model>.toml` beside `<model>.joblib`.

watchfiles says that something happened; what is there is always found by looking (`tenants.folder.scan`), which is
repeated every few seconds, as events get lost when a directory is removed and made again. A pair is taken once it is
whole: sizes and times unchanged for the settle time. What becomes of it is the registry's decision.

In a cluster the directory is looked at once the catalog is known, and what is live comes from there (`agreed`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog
from watchfiles import awatch

from node.kernel import limits
from node.kernel.clock import Clock
from node.kernel.errors import HeadraceError, ManifestError, NotFound, StoreUnavailable
from node.kernel.ports import FeaturePlan
from node.kernel.supervise import Supervisor
from node.kernel.types import AgreedModels, EventSchema, ModelName, Quota
from tenants import folder, registry, registry_file, transitions
from tenants.agreement import ModelPublisher
from tenants.feature_reading import read_features
from tenants.fitting import Fitting
from tenants.folder import MANIFEST, MODEL, TENANT_FILE, Scan, Signature
from tenants.manifest import TenantCaps, TenantSettings, parse_tenant
from tenants.publishing import Publishing
from tenants.registry import (
    Action,
    ConfigureTenant,
    CountRefusal,
    Event,
    FeaturesSeen,
    FeaturesUnreadable,
    Shared,
    Snapshot,
    StartTrial,
    TenantSeen,
    WriteStatus,
)
from tenants.shared_names import FEATURES_FILE
from tenants.stage import Promote, RollBack
from tenants.status_files import FEATURES, SETTINGS, StatusFiles
from tenants.trials import Trials, TrialsFor
from tenants.workers import WarmServer

log = structlog.get_logger(__name__)

CAUGHT_UP_SECONDS_MAX = 3600.0
"""A tenant that never stops changing a file must not keep the others from being told what is deleted."""
_IGNORED_LOGGED_MAX = 8


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """`registry` is the file that keeps the live versions over a restart.

    `settle_ms`: how long a pair must be unchanged. `rescan_ms`: how soon what no event told is found. `check_state`
    and `check_room` are as in `Fitting`.
    """

    root: Path
    registry: Path
    caps: TenantCaps = field(default_factory=TenantCaps)
    settle_ms: int = 300
    rescan_ms: int = 5000
    check_state: Callable[[FeaturePlan], str] = lambda plan: ""
    check_room: Callable[[FeaturePlan], str] = lambda plan: ""


@dataclass(frozen=True, slots=True)
class Blobs:
    """Where model files are kept, by sha256. Blocking; called in a thread."""

    put: Callable[[Path], str]
    get: Callable[[str], bytes]
    names: Callable[[], Iterable[str]]
    delete: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WatchStatistics:
    root: str
    tenants: int
    models: int
    live: int
    trials_running: int
    trials: int
    scans: int
    ignored: tuple[str, ...]
    last_error: str
    to_publish: int = 0
    """What this node has yet to tell the cluster."""
    revision: int = 0
    """Of the cluster's catalog, that what is live was last taken from."""


@dataclass(slots=True)
class _Seen:
    """A pair or tenant.toml as it was when it last changed; `since` None once it has been taken."""

    signature: object
    since: float | None


@dataclass(slots=True)
class _Counters:
    scans: int = 0
    last_error: str = ""
    ignored: tuple[str, ...] = ()
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)


class ModelWatcher:
    """Keeps the registry's snapshot in step with the directory. `changed` hears of each new snapshot.

    `acted` hears of each action that is for the pool (GoLive, RunBeside, Retire, ConfigureTenant, RemoveTenant), in
    order and after the registry file holds it. `collect` is called in a thread, at a time when no file is being taken,
    to remove what the snapshot no longer needs; it may raise StoreUnavailable, and is called again then.
    """

    def __init__(
        self,
        settings: WatchSettings,
        schema: EventSchema,
        server: WarmServer,
        blobs: Blobs,
        clock: Clock,
        supervisor: Supervisor,
        changed: Callable[[Snapshot], None],
        acted: Callable[[Action], None] = lambda action: None,
        collect: Callable[[Snapshot], None] = lambda snapshot: None,
        publish: ModelPublisher | None = None,
    ) -> None:
        self._settings = settings
        self._schema = schema
        self._fitting = Fitting(schema, settings.check_state, settings.check_room)
        self._blobs = blobs
        self._clock = clock
        self._supervisor = supervisor
        self._changed = changed
        self._acted = acted
        self._collect = collect
        self._collected: Snapshot | None = None
        self._started = clock.monotonic()
        self._publishing = Publishing(publish, clock, lambda: self._snapshot, self._published) if publish else None
        self._snapshot = Snapshot(shared=None if publish is None else Shared())
        self._agreed: AgreedModels | None = None
        self._agreed_settings: dict[str, tuple[str, TenantSettings]] = {}
        self._untold: set[ModelName] = set()
        self._untold_features: set[registry.WriteFeaturesStatus] = set()
        self._telling: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()
        self._at_start: Scan | None = None
        self._seen: dict[ModelName | str, _Seen] = {}
        self._applying = asyncio.Lock()
        self._wake = asyncio.Event()
        self._rearm = asyncio.Event()
        self._absence = ""
        self._places: tuple[tuple[str, int, int], ...] = ()
        whom = TrialsFor(lambda: self._snapshot, self._apply, self._note_caught_up, self._trial_put_off)
        self._trials = Trials(server, blobs.get, clock, supervisor, whom)
        self._statuses = StatusFiles(settings.root, clock, self._status)
        self._settings_told: dict[str, Mapping[str, object]] = {}
        self._ignored_of: Mapping[str, tuple[str, ...]] = {}
        self._saved = b""
        self._counters = _Counters()
        self._nothing_new = False
        self.caught_up = asyncio.Event()
        """Set once all that was found so far has been tried, or CAUGHT_UP_SECONDS_MAX have passed; never cleared."""

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    @property
    def heard(self) -> bool:
        """Whether anything of the cluster's catalog is known."""
        return self._agreed is not None

    async def start(self) -> None:
        """Make what was live before a restart live at once, then watch. Raises ManifestError for a damaged file."""
        await self._restore()
        self._supervisor.start("model watch", self._watch_events())
        self._supervisor.start("model watcher", self._run())

    def failing(self, name: ModelName, version: str, reason: str, at_fault: bool) -> bool:
        """For the pool: a live version can't be run any more. Whether another may be live soon in its place."""
        event = registry.VersionFailing(name, version, reason, self._clock.now_ms(), at_fault)
        self._supervisor.start(f"failing {name}", self._apply(event))
        entry = self._snapshot.models.get(name)
        if entry is not None and entry.staged is not None and entry.staged.version.version == version:
            return at_fault and entry.staged.asked.kind == "canary"
        return at_fault and (self._publishing is not None or (entry is not None and entry.previous is not None))

    def refusals(self, tenant: str) -> dict[str, int]:
        """Quota -> pairs of the tenant that were refused because of it."""
        return {limit: count for (whose, limit), count in self._counters.refusals.items() if whose == tenant}

    async def decide(self, wish: Promote | RollBack) -> None:
        """Of a node by itself: what was decided of a staged or live version. Once this returns it is kept."""
        await self._apply(wish)

    async def set_quota(self, tenant: str, quota: Quota) -> None:
        """Of a node by itself: what an operator allows the tenant from now on. Once this returns it is kept."""
        await self._apply(registry.QuotaSet(tenant, quota, self._settings.caps.limits()))
        self._tell_again(tenant)

    def _tell_again(self, tenant: str) -> None:
        """What of its tenant.toml is cut now."""
        self._seen.pop(f"{tenant}/{TENANT_FILE}", None)
        self._wake.set()

    def look_again(self, tenant: str = "") -> None:
        """At what was refused by its manifest alone, of all tenants by default: other limits or tables may hold now."""
        for name, entry in self._snapshot.models.items():
            newest = entry.newest
            if newest is not None and newest.state == "refused" and not newest.version and tenant in ("", name.tenant):
                self._seen.pop(name, None)
                self._wake.set()
        for other in self._snapshot.refused_features:
            if tenant in ("", other):
                self._seen.pop(f"{other}/{FEATURES_FILE}", None)
                self._wake.set()

    def statistics(self) -> WatchStatistics:
        return WatchStatistics(
            root=str(self._settings.root),
            tenants=len(self._snapshot.tenants),
            models=len(self._snapshot.models),
            live=len(self._snapshot.live),
            trials_running=self._trials.running,
            trials=self._trials.begun,
            scans=self._counters.scans,
            ignored=self._counters.ignored,
            last_error=self._counters.last_error or (self._publishing.last_error if self._publishing else ""),
            to_publish=len(registry.publications(self._snapshot)),
            revision=self._agreed.revision if self._agreed is not None else 0,
        )

    # The loop

    async def _restore(self) -> None:
        try:
            content = await asyncio.to_thread(self._settings.registry.read_bytes)
        except FileNotFoundError:
            return
        self._snapshot, problems = registry_file.decode(content, self._schema, self._publishing is not None)
        for problem in problems:
            log.warning("model not taken over from before", problem=problem)
        self._saved = content
        for settings in self._snapshot.tenants.values():
            self._acted(registry.ConfigureTenant(settings))
        for version, manifest in self._snapshot.live:
            self._acted(registry.GoLive(version, registry.text_features(manifest)))
        for staged, manifest in self._snapshot.beside:
            self._acted(registry.RunBeside(staged.version, registry.text_features(manifest)))
        self._changed(self._snapshot)

    async def _run(self) -> None:
        """One turn: look, take what has settled, sleep until something happens or is due."""
        if self._publishing is not None:
            with contextlib.suppress(OSError):
                self._at_start = await self._scan()
            await self._heard.wait()
            await self._publishing.catalog_known()
            self._supervisor.start("model publisher", self._publishing.run())
        while True:
            self._wake.clear()
            due_seconds = await self._look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due_seconds):
                    await self._wake.wait()

    async def _scan(self) -> Scan:
        return await asyncio.to_thread(folder.scan, self._settings.root, self._snapshot.watched_tenants)

    async def _watch_events(self) -> None:
        while True:
            self._rearm.clear()
            paths = [self._settings.root / name for name, _, _ in self._places] or [self._settings.root]
            # Not recursive: below a tenant's folder there may be links to anywhere, and folders without end.
            seen = awatch(
                *paths, watch_filter=folder.concerns_us, stop_event=self._rearm, recursive=False, debounce=200, step=100
            )
            try:
                async for _ in seen:
                    self._wake.set()
            except (OSError, RuntimeError) as error:  # one is missing or can't be watched: rescans go on
                self._counters.last_error = f"{self._settings.root} can't be watched: {error}"
                await asyncio.sleep(self._settings.rescan_ms / 1000)

    async def _look(self) -> float:
        """Scan and take what is whole; seconds until there is a reason to look again."""
        rescan_seconds = self._settings.rescan_ms / 1000
        try:
            found = await self._scan()
        except OSError as error:
            self._not_there(f"can't be read: {error}")
            return rescan_seconds
        self._counters.scans += 1
        self._at_start = self._at_start or found
        if found.ignored != self._counters.ignored:
            self._counters.ignored = found.ignored
            log.warning("names not taken", ignored=found.ignored[:_IGNORED_LOGGED_MAX], count=len(found.ignored))
        if found.places != self._places:
            self._places = found.places
            self._rearm.set()
        now = self._clock.monotonic()
        await self._tell_ignored(found)
        await self._take_tenants(found, now)
        await self._take_features(found, now)
        for name, signatures in found.pairs.items():
            if self._settled(name, signatures, now):
                await self._take_pair(name, signatures)
        await self._take_deletions(found, now)
        await self._write_unwritten(found.tenants.keys() | found.unseen)
        waiting = [seen.since for seen in self._seen.values() if seen.since is not None]
        self._nothing_new = not waiting
        self._note_caught_up()
        await self._collect_garbage()
        if not waiting:
            return rescan_seconds
        settled_in = min(waiting) + self._settings.settle_ms / 1000 - self._clock.monotonic()
        return min(max(settled_in, 0.005), rescan_seconds)

    def _not_there(self, why: str) -> None:
        """A directory that is not mounted must not retire every model."""
        problem = f"{self._settings.root} {why}; models stay as they are"
        self._counters.last_error = problem
        if problem != self._absence:
            self._absence = problem
            log.warning("watched directory not there", problem=problem)

    async def _collect_garbage(self) -> None:
        """After each change; not before all was tried, as until then what is needed is not yet in the snapshot."""
        snapshot = self._snapshot
        if not self.caught_up.is_set() or self._collected is snapshot:
            return
        try:
            await asyncio.to_thread(self._collect, snapshot)
            self._collected = snapshot
        except StoreUnavailable as error:
            log.warning("what is no longer needed is not removed", error=str(error))

    def _settled(self, key: ModelName | str, signature: object, now: float) -> bool:
        """Whether this is new and unchanged for the settle time; then it counts as taken."""
        seen = self._seen.get(key)
        if seen is None or seen.signature != signature:
            self._seen[key] = _Seen(signature, now)
            return False
        if seen.since is None or now - seen.since < self._settings.settle_ms / 1000:
            return False
        seen.since = None
        return True

    async def _take_tenants(self, found: Scan, now: float) -> None:
        for tenant, signature in found.tenants.items():
            key = f"{tenant}/{TENANT_FILE}"
            if self._publishing is None and tenant not in self._snapshot.tenants:
                await self._apply(TenantSeen(self._usual(tenant)))
            if signature is None and tenant in found.unseen & self._snapshot.watched_tenants:
                continue
            if self._settled(key, signature, now):
                seen = await self._tenant_seen(tenant, signature)
                if seen is None and tenant not in self._snapshot.tenants:
                    seen = TenantSeen(self._usual(tenant))  # its models need not wait until the file is mended
                if seen is not None:
                    await self._apply(seen)

    def settings(self, tenant: str) -> TenantSettings:
        """Those that hold for the tenant; of one that is to come, those that it will begin with."""
        shared = self._snapshot.shared
        known = tenant in self._snapshot.tenants or (shared is not None and tenant in shared.asked)
        return self._snapshot.settings(tenant) if known else self._snapshot.granted(self._usual(tenant))

    def _usual(self, tenant: str) -> TenantSettings:
        """Those of a tenant that asks for nothing."""
        return parse_tenant(TENANT_FILE, tenant, b"", self._settings.caps)

    async def _tenant_seen(self, tenant: str, signature: Signature | None) -> TenantSeen | None:
        """The settings, told to the tenant; None when they are wrong, and those from before stay."""
        first = self._at_start is not None and self._at_start.tenants.get(tenant) == signature
        if signature is None:
            self._settings_told.pop(tenant, None)
            await self._statuses.write(ModelName(tenant, SETTINGS))
            return TenantSeen(self._usual(tenant), "", first)
        seen = None
        try:
            text, settings = await asyncio.to_thread(self._read_tenant, tenant)
            seen = TenantSeen(settings, text, first)
            problems = self._snapshot.granted(settings).capped
        except ManifestError as error:
            problems = error.problems
        except FileNotFoundError:
            return None
        except OSError as error:
            problems = self._unreadable(f"{tenant}/{TENANT_FILE}", TENANT_FILE, error)
        for problem in problems:
            log.warning("tenant settings", tenant=tenant, problem=problem)
        self._settings_told[tenant] = {"state": "live" if seen else "refused", "problems": problems}
        await self._statuses.write(ModelName(tenant, SETTINGS))
        return seen

    def _read_tenant(self, tenant: str) -> tuple[str, TenantSettings]:
        """Its text and what that says. Raises ManifestError, OSError."""
        with folder.opened(self._settings.root, tenant, TENANT_FILE, limits.MANIFEST_BYTES_MAX) as held:
            content = held.read()
        settings = parse_tenant(TENANT_FILE, tenant, content, self._settings.caps)
        return content.decode(), settings

    def _unreadable(self, key: ModelName | str, file: str, error: OSError) -> tuple[str, ...]:
        """What to tell. The next look tries again, as a file that can be read again looks as before."""
        self._seen.pop(key, None)
        return (folder.unreadable(file, error),)

    async def _take_features(self, found: Scan, now: float) -> None:
        """Each features.toml that changed, and those that are gone; before the pairs, which may use them."""
        shared = self._snapshot.shared
        known = self._snapshot.definitions.files if shared is None else shared.taken_features
        if not (found.tenants or found.unseen):
            return  # more likely a directory that is not mounted
        there = {tenant for tenant, signature in found.features.items() if signature is not None}
        for tenant in sorted(there | known.keys() | self._snapshot.refused_features.keys()):
            signature = found.features.get(tenant)
            if signature is None and tenant in found.unseen:
                continue
            if self._settled(key := f"{tenant}/{FEATURES_FILE}", signature, now):
                first = self._at_start is not None and self._at_start.features.get(tenant) == signature
                seen: FeaturesSeen | FeaturesUnreadable | None
                try:
                    seen = await asyncio.to_thread(read_features, self._settings.root, tenant, signature, first)
                except OSError as error:
                    seen = FeaturesUnreadable(tenant, self._unreadable(key, FEATURES_FILE, error))
                if seen is None:
                    self._seen.pop(key, None)  # the next look takes it
                else:
                    await self._apply(seen)

    async def _take_pair(self, name: ModelName, signatures: tuple[Signature, Signature]) -> None:
        try:
            event = await asyncio.to_thread(self._read_pair, name, signatures)
        except OSError as error:
            problems = self._unreadable(name, Path(error.filename or name.model).name, error)
            event = registry.PairRefused(name, problems, self._clock.now_ms())
        if event is None:
            self._seen.pop(name, None)  # the next look takes it
            return
        await self._apply(event)
        if isinstance(event, registry.PairSeen) and not event.blob and self._may_take(name, event.manifest):
            self._seen.pop(name, None)  # what was against it went while it was read
            self._wake.set()

    def _may_take(self, name: ModelName, manifest: bytes) -> bool:
        return transitions.may_take(self._snapshot, name, manifest, self._schema)

    def _read_pair(self, name: ModelName, signatures: tuple[Signature, Signature]) -> Event | None:
        """Read the manifest and, if that may be taken, copy the model file among the blobs; None to look again.

        Raises OSError.
        """
        root, now_ms = self._settings.root, self._clock.now_ms()
        old = self._at_start is not None and self._at_start.pairs.get(name) == signatures
        manifest_name, model_name = name.model + MANIFEST, name.model + MODEL
        try:
            with (
                folder.opened(root, name.tenant, manifest_name, limits.MANIFEST_BYTES_MAX) as manifest,
                folder.opened(root, name.tenant, model_name, limits.MODEL_BYTES_MAX) as model,
            ):
                if (manifest.signature, model.signature) != signatures:
                    return None
                text = manifest.read()
                if not self._may_take(name, text):
                    return registry.PairSeen(name, text, "", now_ms, old)
                blob = self._blobs.put(model.path)
            with folder.opened(root, name.tenant, model_name, limits.MODEL_BYTES_MAX) as after:
                same = after.signature == model.signature
            return registry.PairSeen(name, text, blob, now_ms, old, signatures) if same else None
        except ManifestError as error:
            return registry.PairRefused(name, error.problems, now_ms)
        except StoreUnavailable as error:  # the operator's disk: no fault of the tenant's, so it is tried again
            log.warning("model not taken yet", model=str(name), error=str(error))
            return None
        except HeadraceError as error:
            return registry.PairRefused(name, (f"{model_name}: {error}",), now_ms)
        except FileNotFoundError:
            return None

    async def _take_deletions(self, found: Scan, now: float) -> None:
        """A model whose two files are both gone, and a tenant whose folder is, for the settle time, is forgotten."""
        watched, watched_tenants = self._snapshot.watched, self._snapshot.watched_tenants
        if not (found.tenants or found.unseen) and (watched or watched_tenants):
            # More likely a directory that is not mounted than the wish to stop every model.
            self._not_there("is empty: mount it, or make an empty folder in it if its last tenant is to go")
            return
        self._absence = ""
        if self._snapshot.shared is not None:
            watched -= self._snapshot.shared.gone
        there = found.pairs.keys() | found.halves
        for name in [name for name in watched - there if name.tenant not in found.unseen]:
            if self._settled(name, "gone", now):
                await self._apply(registry.PairGone(name))
                self._seen.pop(name, None)
                entry = self._snapshot.models.get(name)
                if entry is not None and entry.newest is not None:
                    continue  # others use its outputs: it goes once they don't
                self.look_again(name.tenant)
                await self._statuses.remove(name)
        for tenant in watched_tenants - found.tenants.keys() - found.unseen:
            if self._settled(f"{tenant}/{TENANT_FILE}", "gone", now):
                await self._apply(registry.TenantGone(tenant))
                self._seen.pop(f"{tenant}/{TENANT_FILE}", None)
        for name in found.halves:
            self._seen.pop(name, None)
        known = {*found.pairs, *self._snapshot.watched}
        for key in [key for key in self._seen if isinstance(key, ModelName) and key not in known]:
            del self._seen[key]

    # What the registry decides

    async def _apply(self, event: Event) -> None:
        async with self._applying:
            while True:
                before = self._snapshot
                after, actions = self._fitting.next(self._snapshot, event)
                if after is before:
                    return
                await self._save(after)
                if self._snapshot is before:  # else the catalog changed meanwhile
                    break
            self._follow(after, actions)
            # Told last: a tenant that reads "live" may count on it.
            await self._write_statuses(_told(actions))
            await self._write_features_statuses(actions)

    def _follow(self, after: Snapshot, actions: Iterable[Action]) -> None:
        before, self._snapshot = self._snapshot, after
        if after.live != before.live or after.definitions is not before.definitions:
            self._reconsider()
        for action in actions:
            if isinstance(action, StartTrial):
                self._trials.start(action)
            elif isinstance(action, CountRefusal):
                self._counters.refusals[action.tenant, action.limit] += 1
            elif isinstance(action, ConfigureTenant):
                self._acted(action)
                self.look_again(action.settings.tenant)
            elif not isinstance(action, WriteStatus | registry.WriteFeaturesStatus):
                self._acted(action)
        self._changed(self._snapshot)
        if self._publishing is not None:
            self._publishing.changed.set()

    def _reconsider(self) -> None:
        """Look again at what was refused for what others had then: it may be right beside what they have now."""
        self.look_again()
        self._wake.set()

    async def _write_statuses(self, names: Iterable[ModelName]) -> None:
        """Tell the log of each model that changed, and its tenant where the files are."""
        for name in names:
            entry = self._snapshot.models.get(name)
            if entry is None:
                continue
            told = registry.status(self._snapshot, name)
            log.info("model", model=str(name), state=told["state"], problems=told["problems"])
            if entry.unserved is not None:
                log.error("a live model can't be run on this node", model=str(name), problems=entry.unserved.problems)
            if name in self._snapshot.watched:
                await self._statuses.write(name)

    async def _write_features_statuses(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, registry.WriteFeaturesStatus):
                told = registry.features_status(self._snapshot, action.tenant)
                log.info("shared features", **told)
                await self._statuses.write(ModelName(action.tenant, FEATURES))

    async def _save(self, snapshot: Snapshot) -> None:
        """Keep the snapshot, however long the disk refuses: what is not kept must not go live."""
        content = registry_file.encode(snapshot)
        while content != self._saved:
            try:
                await asyncio.to_thread(folder.replace_file, self._settings.registry, content)
                self._saved = content
            except OSError as error:
                self._counters.last_error = (
                    f"{self._settings.registry} can't be written: {error}; models stay as they are"
                )
                log.warning("registry not written", error=str(error))
                await asyncio.sleep(self._settings.rescan_ms / 1000)

    def _status(self, name: ModelName) -> Mapping[str, object] | None:
        """What its status file is to say now."""
        if name.model == SETTINGS:
            return self._tenant_status(name.tenant)
        if name.model == FEATURES:
            return registry.features_status(self._snapshot, name.tenant)
        there = name in self._snapshot.models and name in self._snapshot.watched
        return registry.status(self._snapshot, name) if there else None

    def _tenant_status(self, tenant: str) -> Mapping[str, object] | None:
        """None without a tenant.toml and anything in the folder that is not taken."""
        settings, ignored = self._settings_told.get(tenant), self._ignored_of.get(tenant, ())
        if settings is None and not ignored:
            return None
        return {**(settings or {"state": "live", "problems": ()}), "ignored": ignored}

    async def _tell_ignored(self, found: Scan) -> None:
        """To each tenant of which that changed: the names in its folder that are not taken."""
        before, self._ignored_of = self._ignored_of, found.ignored_of
        for tenant, signature in found.tenants.items():
            settings_known = signature is None or tenant in self._settings_told  # else told with these
            if settings_known and before.get(tenant, ()) != found.ignored_of.get(tenant, ()):
                await self._statuses.write(ModelName(tenant, SETTINGS))

    async def _write_unwritten(self, tenants: Collection[str]) -> None:
        """Of `tenants`, whose folders are there; without any, the directory may just not be mounted."""
        if not tenants:
            return
        self._settings_told = {tenant: told for tenant, told in self._settings_told.items() if tenant in tenants}
        if self._statuses.unwritten:
            async with self._applying:
                await self._statuses.again(tenants)

    # The cluster

    def agreed(self, models: AgreedModels) -> bool:
        """Make live what the catalog says is. At once, whatever this node is busy with: all nodes do.

        False when it is older than what was told before.
        """
        told = self._agreed
        if told is not None and models.revision < told.revision:
            return False
        self._agreed = models
        if told is None or replace(models, revision=0) != replace(told, revision=0):
            settings = {
                tenant: self._read_agreed(tenant, text, models.quotas.get(tenant, Quota()))
                for tenant, text in models.tenants.items()
            }
            after, actions = self._fitting.next(self._snapshot, registry.Agreed(models, settings, self._clock.now_ms()))
            for tenant, quota in models.quotas.items():
                if quota != self._snapshot.quotas.get(tenant):
                    self._tell_again(tenant)
            self._follow(after, actions)
            self._untold |= set(_told(actions))
            self._untold_features |= {one for one in actions if isinstance(one, registry.WriteFeaturesStatus)}
            if self._telling is None or self._telling.done():
                self._telling = self._supervisor.start("models agreed", self._tell_agreed())
        self._heard.set()
        return True

    def _read_agreed(self, tenant: str, text: str, quota: Quota) -> TenantSettings:
        known = self._agreed_settings.get(tenant)
        if known is None or known[0] != text:
            try:
                settings = parse_tenant(TENANT_FILE, tenant, text.encode(), self._settings.caps)
            except ManifestError as error:
                log.error("the cluster's settings of a tenant can't be read here", tenant=tenant, error=str(error))
                settings = self._usual(tenant)
            known = self._agreed_settings[tenant] = text, settings
        return known[1].granted(quota.limits())

    async def _tell_agreed(self) -> None:
        async with self._applying:
            while self._untold or self._untold_features:
                names, self._untold = sorted(self._untold), set()
                files, self._untold_features = self._untold_features, set()
                await self._save(self._snapshot)
                await self._write_statuses(names)
                await self._write_features_statuses(files)

    async def _published(self, event: registry.Published | registry.NotPublished) -> None:
        await self._apply(event)
        if isinstance(event, registry.Published) and isinstance(event.publication, registry.Withdraw):
            self._seen.pop(event.publication.name, None)  # files that are there again are looked at again

    # Trials

    def _trial_put_off(self, name: ModelName, error: HeadraceError) -> None:
        self._counters.last_error = f"the trial of {name} is made again later: {error}"
        if isinstance(error, NotFound):
            self._seen.pop(name, None)  # so that its file is kept once more

    def _note_caught_up(self) -> None:
        late = self._clock.monotonic() - self._started >= CAUGHT_UP_SECONDS_MAX
        if late or (self._nothing_new and not self._trials.running):
            self.caught_up.set()


def _told(actions: Iterable[Action]) -> list[ModelName]:
    return [action.name for action in actions if isinstance(action, WriteStatus)]
