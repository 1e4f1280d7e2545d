"""(P) What a manifest says of intervals: `every` or `at`, and `zone`, `by`, `grace`, `all`; or `session`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

from node.kernel.errors import NotFound
from node.kernel.limits import INTERVAL_MS_MIN, WINDOW_MS_MAX
from node.kernel.types import Schedule
from node.kernel.zones import time_zone
from tenants.expression import EventField, Node, walk
from tenants.wording import shown

INTERVAL_KEYS: Final = ("every", "at", "zone", "by", "grace", "all", "session")
_TIME: Final = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")


class Reader(Protocol):
    """A manifest being read, which collects mistakes."""

    values: dict[str, Any]

    def problem(self, message: str) -> None: ...

    def choice(self, key: str, choices: tuple[str, ...]) -> str: ...

    def duration(self, key: str, default: str, ms_max: int, *, milliseconds: bool = False) -> int: ...


def is_interval(values: Mapping[str, Any]) -> bool:
    """Whether the manifest is that of an interval model, whatever mistakes it has."""
    return any(key in values for key in INTERVAL_KEYS)


def read_schedule(reader: Reader) -> Schedule:
    """When the model runs. Mistakes are noted in the reader."""
    values = reader.values
    if "on" in values:
        reader.problem("a model has either on (event types) or every or at (intervals) or session; leave one out")
    if "session" in values:
        return _sessions(reader)
    if ("every" in values) == ("at" in values):
        reader.problem('an interval model has either every = "15m" or at = "06:00"')
    by_event = "by" in values and reader.choice("by", ("clock", "event")) == "event"
    for key, needed, given in (
        ("zone", "at", "at" in values),
        ("by", "every", "every" in values),
        ("grace", 'by = "event"', by_event),
    ):
        if key in values and not given:
            reader.problem(f"{key} says something only beside {needed}; leave it out")
    return Schedule(
        every_ms=_every(reader, 0),
        at_ms=_time_of_day(reader) if "at" in values else 0,
        zone=_zone(reader) if "zone" in values else "UTC",
        by_event=by_event,
        grace_ms=reader.duration("grace", "1h", WINDOW_MS_MAX) if by_event and "grace" in values else 0,
        whole=_flag(reader, "all"),
    )


def _sessions(reader: Reader) -> Schedule:
    """Looked for by event time: as often as their gap is long, unless `every` says how often."""
    for key in ("at", "zone", "by", "all"):
        if key in reader.values:
            reader.problem(f"{key} says nothing beside session, which goes by the time of events; leave it out")
    gap_ms = reader.duration("session", "30m", WINDOW_MS_MAX)
    every_ms = _every(reader, max(gap_ms, INTERVAL_MS_MIN))
    grace_ms = reader.duration("grace", "1h", WINDOW_MS_MAX) if "grace" in reader.values else 0
    return Schedule(every_ms, by_event=True, grace_ms=grace_ms, gap_ms=gap_ms)


def _every(reader: Reader, otherwise_ms: int) -> int:
    if "every" not in reader.values:
        return otherwise_ms
    every_ms = reader.duration("every", "15m", WINDOW_MS_MAX)
    if 0 < every_ms < INTERVAL_MS_MIN:
        reader.problem(f"every must be at least {INTERVAL_MS_MIN} ms")
    return every_ms


def _time_of_day(reader: Reader) -> int:
    value = reader.values["at"]
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        reader.problem(f"at must be a time of day in quotes such as '06:00', not {shown(value)}")
        return 0
    return (int(match[1]) * 60 + int(match[2])) * 60_000


def _zone(reader: Reader) -> str:
    value = reader.values["zone"]
    if not isinstance(value, str):
        reader.problem(f"zone must be a time zone in quotes such as 'Europe/Berlin', not {shown(value)}")
        return "UTC"
    try:
        time_zone(value)
    except NotFound as unknown:
        reader.problem(f"zone: {unknown}")
        return "UTC"
    return value


def _flag(reader: Reader, key: str) -> bool:
    value = reader.values.get(key, False)
    if not isinstance(value, bool):
        reader.problem(f"{key} must be true or false, not {shown(value)}")
    return value is True


def refuse_event_fields(reader: Reader, features: Iterable[tuple[str, Node]]) -> None:
    """An interval model is run without an event at hand."""
    for name, expression in features:
        for node in walk(expression):
            if isinstance(node, EventField):
                reader.problem(
                    f"feature {shown(name)}: event.{node.field} has no value in an interval model, which runs without"
                    f" an event; use an aggregate such as last(<type>.{node.field}) or seconds_since(<type>)"
                )
                break
