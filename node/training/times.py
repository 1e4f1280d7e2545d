"""(P) Times as operators say them: 2026-01-31, 2026-01-31T06:00 (UTC unless it says else), or ms since the epoch."""

from __future__ import annotations

from datetime import UTC, datetime

from node.kernel.errors import ExportFailed, printable


def time_ms(text: str, otherwise: int) -> int:
    """Milliseconds since the Unix epoch; `otherwise` for ''. Raises ExportFailed."""
    if not text:
        return otherwise
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ExportFailed(
            f"{printable(text)} is no time; say 2026-01-31, 2026-01-31T06:00+01:00 or milliseconds since 1970"
        ) from None
    found = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return round(found.timestamp() * 1000)
