"""What the fold must compute, as a plain program: one event after the other, dicts keyed by tile, no arrays.

Shares nothing with `node.state.fold`. It knows the rules, not the rows: a window of tiles by event time, heads that
every event of the customer advances, tiles that die, late events.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from node.kernel.types import Aggregate

SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
WIDTHS = [
    SECOND, 5 * SECOND, 15 * SECOND, MINUTE, 5 * MINUTE, 15 * MINUTE, HOUR, 2 * HOUR, 6 * HOUR, 12 * HOUR,
    DAY, 2 * DAY, 4 * DAY, 8 * DAY, 16 * DAY, 32 * DAY,
]  # fmt: skip
NEWEST = ("max", "*", "time", "")
PARTS = {"mean": ("sum", "count"), "std": ("count", "shifted", "squared"), "distinct": ("bits",), "since": ("max",)}


@dataclass
class Event:
    customer: str
    type: str
    time_ms: int
    fields: Mapping[str, float | str | None]

    def value(self, name: str) -> float | str | None:
        """None where missing; of the pseudo-fields, '' is there whenever the event is."""
        if name == "":
            return 1.0
        if name == "time":
            return self.time_ms / 1000
        value = self.fields.get(name)
        if isinstance(value, float):
            return None if math.isnan(value) else value + 0.0
        return value


@dataclass(frozen=True)
class Part:
    kind: str
    event: str
    field: str
    where: str


def parts_of(aggregate: Aggregate) -> set[Part]:
    name = "time" if aggregate.function == "since" else aggregate.field
    kinds = PARTS.get(aggregate.function, (aggregate.function,))
    return {Part(kind, aggregate.event, name, aggregate.where) for kind in kinds}


@dataclass
class Window:
    """Parts that were asked for together, over one window."""

    window_ms: int
    parts: set[Part]

    def __post_init__(self) -> None:
        if self.window_ms < 0:  # a session
            self.parts = self.parts | {Part(*NEWEST)}
            self.width, self.tiles = -self.window_ms, 1
            return
        fitting = [width for width in WIDTHS if math.ceil(self.window_ms / width) >= 12] or [SECOND]
        self.width = fitting[-1]
        self.tiles = math.ceil(self.window_ms / self.width) if self.window_ms else 1

    def tile(self, time_ms: int, kept: Kept) -> int:
        if self.window_ms >= 0:
            return time_ms // self.width if self.window_ms else 0
        if kept.head is None or time_ms > kept.newest_ms + self.width:
            return time_ms  # begins a session, or would
        return kept.head if time_ms >= kept.head - self.width else kept.head - 1


@dataclass
class Kept:
    """One customer's part of one window: tile -> part -> value."""

    head: int | None = None
    newest_ms: int = 0
    """Time of the newest event."""
    tiles: dict[int, dict[Part, object]] = field(default_factory=dict)


class Reference:
    def __init__(self, filters: Mapping[str, Callable[[Event], bool]]) -> None:
        self.filters = filters
        self.windows: list[Window] = []
        self.asked: dict[Aggregate, Window] = {}
        self.kept: dict[str, dict[int, Kept]] = {}
        self.pivots: dict[tuple[str, str, str, str], float] = {}
        self.pivoted: set[tuple[str, str, str]] = set()
        self.late = 0

    def ask(self, aggregates: list[Aggregate]) -> None:
        """From now on keep `aggregates`; what an older window has all the parts of is read from there."""
        added: dict[int, Window] = {}
        for aggregate in sorted(set(aggregates) - set(self.asked)):
            parts = parts_of(aggregate)
            if aggregate.function == "std":
                self.pivoted.add((aggregate.event, aggregate.field, aggregate.where))
            for window in self.windows:
                if window.window_ms == aggregate.window_ms and parts <= window.parts:
                    self.asked[aggregate] = window
                    break
            else:
                window = added.setdefault(aggregate.window_ms, Window(aggregate.window_ms, set()))
                window.parts |= parts
                self.asked[aggregate] = window
        self.windows.extend(added[window_ms] for window_ms in sorted(added))

    def see(self, event: Event) -> dict[Aggregate, float]:
        """Take one event in; the value of each aggregate as of it."""
        since = {a: self.read(a, event.customer, event.time_ms) for a in self.asked if a.function == "since"}
        self._pivot(event)
        late = False
        for number, window in enumerate(self.windows):
            kept = self.kept.setdefault(event.customer, {}).setdefault(number, Kept())
            tile = window.tile(event.time_ms, kept)
            kept.newest_ms = event.time_ms if kept.head is None else max(kept.newest_ms, event.time_ms)
            kept.head = tile if kept.head is None else max(kept.head, tile)
            for old in [old for old in kept.tiles if old <= kept.head - window.tiles]:
                del kept.tiles[old]
            for part in window.parts:
                if self._matches(part.event, part.field, part.where, event):
                    if tile <= kept.head - window.tiles:
                        late = True
                    else:
                        self._take(kept.tiles.setdefault(tile, {}), part, event)
        self.late += late
        values = {a: self.read(a, event.customer, event.time_ms) for a in self.asked if a.function != "since"}
        return values | since

    def _matches(self, event_type: str, name: str, where: str, event: Event) -> bool:
        return (
            event_type in ("*", event.type)
            and (not where or self.filters[where](event))
            and event.value(name) is not None
        )

    def _pivot(self, event: Event) -> None:
        for source in self.pivoted:
            if self._matches(*source, event):
                self.pivots.setdefault((event.customer, *source), event.value(source[1]))  # type: ignore[arg-type]

    def _take(self, tile: dict[Part, object], part: Part, event: Event) -> None:
        value = event.value(part.field)
        held = tile.get(part)
        if part.kind == "count":
            tile[part] = (held or 0.0) + 1.0  # type: ignore[operator]
        elif part.kind == "bits":
            tile[part] = (held or 0) | 1 << (hash64(value) % 256)  # type: ignore[operator, arg-type]
        elif isinstance(value, str) or value is None:
            return
        elif part.kind == "sum":
            tile[part] = (held or 0.0) + value  # type: ignore[operator]
        elif part.kind in ("shifted", "squared"):
            apart = value - self.pivots[event.customer, part.event, part.field, part.where]
            tile[part] = (held or 0.0) + (apart if part.kind == "shifted" else apart * apart)  # type: ignore[operator]
        elif part.kind in ("min", "max"):
            tile[part] = value if held is None else {"min": min, "max": max}[part.kind](held, value)  # type: ignore[type-var]
        elif part.kind == "first":
            if held is None or event.time_ms < held[0]:  # type: ignore[index]
                tile[part] = (event.time_ms, value)
        elif held is None or event.time_ms >= held[0]:  # type: ignore[index]
            tile[part] = (event.time_ms, value)

    def read(self, aggregate: Aggregate, customer: str, time_ms: int) -> float:
        """As of a time, of what was seen until now."""
        window = self.asked[aggregate]
        kept = self.kept.get(customer, {}).get(self.windows.index(window), Kept())
        own = window.tile(time_ms, kept)
        head = own if kept.head is None else max(own, kept.head)
        alive = [tile for tile in kept.tiles if max(own, head) - window.tiles < tile <= own]
        older = sorted((tile for tile in alive if tile != own), key=lambda tile: tile % window.tiles)
        held = {
            part.kind: (
                [kept.tiles[tile][part] for tile in older if part in kept.tiles[tile]],
                [kept.tiles[own][part]] if own in alive and part in kept.tiles[own] else [],
            )
            for part in parts_of(aggregate)
        }
        return self._finish(aggregate, held, time_ms)

    def _finish(self, aggregate: Aggregate, held: Mapping[str, tuple[list, list]], time_ms: int) -> float:  # type: ignore[type-arg]
        def total(kind: str) -> float:
            older, own = held[kind]
            amount = 0.0
            for value in older:
                amount += value
            return amount + (own[0] if own else 0.0)

        everything = {kind: older + own for kind, (older, own) in held.items()}
        match aggregate.function:
            case "count" | "sum":
                return total(aggregate.function)
            case "mean":
                return total("sum") / total("count") if total("count") else math.nan
            case "std":
                count, shifted, squared = total("count"), total("shifted"), total("squared")
                return math.sqrt(max(0.0, (squared - shifted * shifted / count) / count)) if count else math.nan
            case "min" | "max":
                return {"min": min, "max": max}[aggregate.function](everything[aggregate.function], default=math.nan)
            case "first" | "last":
                pairs = sorted(everything[aggregate.function])
                return (pairs[0] if aggregate.function == "first" else pairs[-1])[1] if pairs else math.nan
            case "distinct":
                bits = 0
                for value in everything["bits"]:
                    bits |= value
                return 256 * math.log(256 / max(1, 256 - bits.bit_count()))
            case _:
                return max(0.0, time_ms / 1000 - max(everything["max"])) if everything["max"] else math.nan


def hash64(value: float | str) -> int:
    """BLAKE2b of a text; the finaliser of SplitMix64 over the bits of a number."""
    if isinstance(value, str):
        return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")
    (bits,) = struct.unpack("<Q", struct.pack("<d", value))
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31
