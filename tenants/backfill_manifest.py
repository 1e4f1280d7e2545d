"""(P) The history that a model's windows are filled from, as its manifest's `[backfill]` says it.

[backfill]
from = "30d"        # or a day, "2026-01-01" (UTC), or "all"
until = "marked"    # or "held"
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from node.kernel.limits import WINDOW_MS_MAX
from node.kernel.types import Backfill
from tenants.wording import parse_duration, shown, suggestion

_KEYS: Final = ("from", "until")
_UNTIL: Final = ("marked", "held")


def parse_backfill(value: object, problem: Callable[[str], None]) -> Backfill | None:
    """Mistakes are told to `problem`."""
    if not isinstance(value, dict):
        problem('[backfill] must be a table with from, such as from = "30d"')
        return None
    for key in value:
        if key not in _KEYS:
            problem(f"[backfill]: unknown key {shown(key)}" + suggestion(key, _KEYS))
    until: Any = value.get("until", "marked")
    if until not in _UNTIL:
        problem(f'[backfill]: until must be "marked" or "held", not {shown(until)}')
    back_ms, since_ms = _read_from(value.get("from"), problem)
    return Backfill(back_ms, since_ms, until == "held")


def _read_from(value: object, problem: Callable[[str], None]) -> tuple[int, int]:
    """(ms back, or 0; since ms, or 0)"""
    if value == "all":
        return 0, 0
    if not isinstance(value, str):
        problem(f'[backfill]: from must be a duration, a day or "all", such as "30d", not {shown(value)}')
        return 0, 0
    try:
        return 0, max(1, int(datetime.strptime(value, "%Y-%m-%d").replace(tzinfo=UTC).timestamp() * 1000))
    except ValueError:
        pass
    try:
        return parse_duration(value, WINDOW_MS_MAX), 0
    except ValueError as failure:
        problem(f'[backfill]: from is neither a day such as "2026-01-01" nor "all" nor a duration: {failure}')
        return 0, 0
