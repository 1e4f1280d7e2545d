"""Time zones by name. Their rules come with the system or the tzdata package, and count as constants."""

from __future__ import annotations

from datetime import tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo

from node.kernel.errors import NotFound

_NAME_BYTES_MAX = 64
_KEPT_MAX = 1024


@lru_cache(_KEPT_MAX)
def time_zone(name: str) -> tzinfo:
    """Raises NotFound for a zone that the IANA database does not have."""
    try:
        if not 0 < len(name.encode()) <= _NAME_BYTES_MAX:
            raise ValueError
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise NotFound(
            f"time zone {name[:_NAME_BYTES_MAX]!r} is not known; use a name such as 'Europe/Berlin'"
        ) from None
