"""(P) What each tenant asked for, got, was due and was held back by, over the last windows of time.

A tenant is in one state at any time (`Hold`), so the seconds of its states add up to the window, and its rows are
accounted for: those that waited and those it asked for are those it got, those that were dropped and those that wait.

The scheduler tells of each change. Totals are kept at whole seconds and at whole ten seconds, of the tenants that
changed since: one that is idle costs nothing.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, TypeVar, get_args

Hold: TypeAlias = Literal["idle", "served", "worker", "turn", "blocked", "quota"]
"""Nothing waits; all its rows run; rows wait behind its own batch, as it has one worker; rows wait while others have
the slots; its worker starts, loads or backs off while rows wait; its quota of rows a second holds rows back."""

HOLDS: Final[tuple[Hold, ...]] = get_args(Hold)
WINDOWS_SECONDS: Final = (10, 60, 600)
COMPETITORS_MAX: Final = 5
_COMPETES: Final = frozenset(("served", "worker", "turn"))
_FINE, _COARSE = 1, 10
_KEPT_SECONDS: Final = {_FINE: 60, _COARSE: WINDOWS_SECONDS[-1]}
"""Windows up to 60 seconds begin at a whole second, longer ones at ten."""
_PLACE: Final[Mapping[str, int]] = {
    name: place for place, name in enumerate((*HOLDS, "due", "asked", "got", "dropped", "cpu", "forgiven"))
}
_Kept = TypeVar("_Kept", tuple[float, float, float], tuple[float, "array[float]"])


@dataclass(frozen=True, slots=True)
class Competitor:
    """Another tenant in the window: seconds in which it ran or waited for its turn, CPU seconds, present weight."""

    tenant: str
    weight: float
    competed_seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class ShareWindow:
    """The last `seconds`: up to a sample more than was asked for, less for a tenant that came later.

    `held` gives the seconds in each state. Rows: `waited` at the start and `asked` for are together those `got`,
    `dropped`, `running` and `waiting` now; a row that is tried again was asked for again. `cpu_seconds` it got, and
    `cpu_all` all tenants. `cpu_waiting` is what its waiting rows will take, as far as is known. `share_due` is its
    weight among those of all that had work, averaged over the time in which anybody had; None if nobody had, as is
    `share_got` if nothing ran. `forgiven_seconds` is CPU time that it was due, but its one worker could not take.
    """

    seconds: float
    held: Mapping[Hold, float]
    waited: int
    asked: int
    got: int
    dropped: int
    running: int
    waiting: int
    cpu_seconds: float
    cpu_waiting: float
    cpu_all: float
    share_got: float | None
    share_due: float | None
    forgiven_seconds: float
    competitors: tuple[Competitor, ...]


@dataclass(slots=True, eq=False)
class _Account:
    tenant: str
    weight: float
    born: float
    born_busy: float
    born_cpu: float
    since: float
    due_mark: float
    totals: array[float] = field(default_factory=lambda: array("d", bytes(8 * len(_PLACE))))
    hold: Hold = "idle"
    samples: dict[int, deque[tuple[float, array[float]]]] = field(
        default_factory=lambda: {step: deque() for step in _KEPT_SECONDS}
    )

    @property
    def rows(self) -> float:
        """That wait or run."""
        return _rows(self.totals)


class ShareLedger:
    """`advance` says at what time the following calls happen, in seconds of a clock that never goes back."""

    def __init__(self) -> None:
        self.now = 0.0
        self._started = False
        self._next = 0.0
        self._accounts: dict[str, _Account] = {}
        self._competing: set[_Account] = set()
        self._weights = 0.0
        self._due = 0.0
        """Seconds that each unit of weight was due, had it always competed."""
        self._busy = 0.0
        self._cpu = 0.0
        self._samples: dict[int, deque[tuple[float, float, float]]] = {step: deque() for step in _KEPT_SECONDS}
        """When, busy seconds, CPU seconds of all."""
        self._changed: dict[int, set[_Account]] = {step: set() for step in _KEPT_SECONDS}
        """Accounts to be sampled next: those that changed, and those that are not idle."""

    def advance(self, now: float) -> None:
        """An earlier time than before changes nothing."""
        if not self._started:
            self._start(now)
        if now >= self._next:
            first = max(self._next, math.floor(now) - WINDOWS_SECONDS[-1] - 2 * _COARSE)
            for boundary in range(int(first), math.floor(now) + 1):
                self._run(float(boundary))
                self._sample(boundary)
            self._next = math.floor(now) + 1.0
        self._run(now)

    def _start(self, now: float) -> None:
        self._started, self.now, self._next = True, now, math.floor(now) + 1.0
        for account in self._accounts.values():
            account.born = account.since = now

    def _run(self, now: float) -> None:
        elapsed = now - self.now
        if elapsed <= 0:
            return
        if self._competing:
            self._due += elapsed / self._weights
            self._busy += elapsed
        self.now = now

    def _sample(self, at: int) -> None:
        for step, ring in self._samples.items():
            if at % step:
                continue
            oldest = at - _KEPT_SECONDS[step] - step
            _append(ring, (float(at), self._busy, self._cpu), oldest)
            for account in list(self._changed[step]):
                self._settle(account)
                _append(account.samples[step], (float(at), account.totals[:]), oldest)
                if account.hold == "idle":
                    self._changed[step].discard(account)

    def _settle(self, account: _Account) -> None:
        account.totals[_PLACE[account.hold]] += self.now - account.since
        if account in self._competing:
            account.totals[_PLACE["due"]] += account.weight * (self._due - account.due_mark)
        account.since, account.due_mark = self.now, self._due

    def _note(self, account: _Account) -> None:
        for changed in self._changed.values():
            changed.add(account)

    # What the scheduler tells

    def add(self, tenant: str, weight: float) -> None:
        self._accounts[tenant] = _Account(tenant, weight, self.now, self._busy, self._cpu, self.now, self._due)

    def remove(self, tenant: str) -> None:
        account = self._accounts.pop(tenant)
        self._compete(account, False)
        for changed in self._changed.values():
            changed.discard(account)

    def hold(self, tenant: str, hold: Hold) -> None:
        """The tenant's state from now on."""
        account = self._accounts[tenant]
        if hold == account.hold:
            return
        self._settle(account)
        account.hold = hold
        self._compete(account, hold in _COMPETES)
        self._note(account)

    def weigh(self, tenant: str, weight: float) -> None:
        account = self._accounts[tenant]
        self._settle(account)
        account.weight = weight
        self._weights = sum(other.weight for other in self._competing)

    def _compete(self, account: _Account, competes: bool) -> None:
        if competes == (account in self._competing):
            return
        if competes:
            self._competing.add(account)
            self._weights += account.weight
        else:
            self._competing.discard(account)
            self._weights = self._weights - account.weight if self._competing else 0.0

    def asked(self, tenant: str, rows: int) -> None:
        self._count(tenant, "asked", rows)

    def got(self, tenant: str, rows: int, cpu_seconds: float) -> None:
        """Of a tenant that is gone the time counts among all still."""
        self._cpu += cpu_seconds
        if tenant in self._accounts:
            self._count(tenant, "got", rows)
            self._count(tenant, "cpu", cpu_seconds)

    def dropped(self, tenant: str, rows: int) -> None:
        """Rows that will not run: cancelled, or of a model that is gone."""
        self._count(tenant, "dropped", rows)

    def forgave(self, tenant: str, cpu_seconds: float) -> None:
        self._count(tenant, "forgiven", cpu_seconds)

    def _count(self, tenant: str, what: str, amount: float) -> None:
        if amount:
            account = self._accounts[tenant]
            account.totals[_PLACE[what]] += amount
            self._note(account)

    # What it says

    def windows(self, tenant: str, running: int, cpu_waiting: float) -> tuple[ShareWindow, ...]:
        """One for each of WINDOWS_SECONDS, ending now. `running` rows of the tenant run; see ShareWindow."""
        for account in self._accounts.values():
            self._settle(account)
        asked = self._accounts[tenant]
        return tuple(self._window(asked, seconds, running, cpu_waiting) for seconds in WINDOWS_SECONDS)

    def _window(self, account: _Account, seconds: int, running: int, cpu_waiting: float) -> ShareWindow:
        step = _FINE if seconds <= _KEPT_SECONDS[_FINE] else _COARSE
        start = max((self.now - seconds) // step * step, account.born)
        if self.now - start <= _KEPT_SECONDS[_FINE]:
            step = _FINE  # of a young tenant: what others did meanwhile is told to the second
        before = _at(account, step, start)
        gone = {name: account.totals[place] - before[place] for name, place in _PLACE.items()}
        busy, cpu = self._all_since(account, step, start)
        lasted = self.now - start
        held = {hold: gone[hold] for hold in HOLDS}
        held["idle"] = max(0.0, lasted - sum(held[hold] for hold in HOLDS if hold != "idle"))
        return ShareWindow(
            seconds=lasted,
            held=held,
            waited=round(_rows(before)),
            asked=round(gone["asked"]),
            got=round(gone["got"]),
            dropped=round(gone["dropped"]),
            running=running,
            waiting=round(account.rows) - running,
            cpu_seconds=gone["cpu"],
            cpu_waiting=cpu_waiting,
            cpu_all=cpu,
            share_got=gone["cpu"] / cpu if cpu > 0 else None,
            share_due=min(1.0, gone["due"] / busy) if busy > 0 else None,
            forgiven_seconds=gone["forgiven"],
            competitors=tuple(self._competitors(account, step, start)),
        )

    def _all_since(self, account: _Account, step: int, start: float) -> tuple[float, float]:
        """Busy and CPU seconds of all since `start`: a sample's time, or that at which the account was opened."""
        if start == account.born:
            return self._busy - account.born_busy, self._cpu - account.born_cpu
        ring = self._samples[step]
        place = bisect_right(ring, start, key=lambda sample: sample[0]) - 1
        _, busy, cpu = ring[place] if place >= 0 else (0.0, 0.0, 0.0)
        return self._busy - busy, self._cpu - cpu

    def _competitors(self, account: _Account, step: int, start: float) -> Iterable[Competitor]:
        """The others that had work, those first that used most."""
        found = []
        for other in self._accounts.values():
            before = _at(other, step, start)
            competed = sum(other.totals[_PLACE[hold]] - before[_PLACE[hold]] for hold in _COMPETES)
            if other is not account and competed > 0:
                cpu = other.totals[_PLACE["cpu"]] - before[_PLACE["cpu"]]
                found.append(Competitor(other.tenant, other.weight, competed, cpu))
        found.sort(key=lambda one: (-one.cpu_seconds, -one.competed_seconds, one.tenant))
        return found[:COMPETITORS_MAX]


_NOTHING: Final = array("d", bytes(8 * len(_PLACE)))


def _at(account: _Account, step: int, start: float) -> array[float]:
    """The account's totals at a time at which samples were taken: its last one, as it would be in a later one."""
    samples = account.samples[step]
    place = bisect_right(samples, start, key=lambda sample: sample[0]) - 1
    return samples[place][1] if place >= 0 else _NOTHING


def _rows(totals: array[float]) -> float:
    return totals[_PLACE["asked"]] - totals[_PLACE["got"]] - totals[_PLACE["dropped"]]


def _append(ring: deque[_Kept], sample: _Kept, oldest: float) -> None:
    """Of what is older than `oldest` one is kept: what holds at that time."""
    ring.append(sample)
    while len(ring) > 1 and ring[1][0] <= oldest:
        ring.popleft()
