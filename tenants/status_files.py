"""The files that answer tenants beside theirs: `<model>.status.json`, `tenant.status.json`, `features.status.json`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import structlog

from node.kernel.clock import Clock
from node.kernel.limits import STATUS_FILES_UNWRITTEN_MAX
from node.kernel.types import ModelName
from tenants import folder
from tenants.status_content import status_content

log = structlog.get_logger(__name__)

SETTINGS = "tenant"
FEATURES = "features"
"""What answers a tenant's tenant.toml and features.toml is called as if these were its models: no pair can be."""


class StatusFiles:
    """Written as things are at that moment; one that could not be written is known by its name, and written later.

    `told` gives what a file is to say, None where there is to be none. Calls for one file are made one at a time.
    """

    def __init__(self, root: Path, clock: Clock, told: Callable[[ModelName], Mapping[str, object] | None]) -> None:
        self._root = root
        self._clock = clock
        self._told = told
        self._unwritten: set[ModelName] = set()

    @property
    def unwritten(self) -> bool:
        return bool(self._unwritten)

    async def write(self, name: ModelName) -> None:
        told = self._told(name)
        known = name in self._unwritten
        self._unwritten.discard(name)
        if told is None:
            return await self.remove(name)
        try:
            content = status_content({**told, "written_at_ms": self._clock.now_ms()})
            await asyncio.to_thread(folder.write_status, self._root, name, content)
        except (OSError, UnicodeError) as error:
            if isinstance(error, OSError) and len(self._unwritten) < STATUS_FILES_UNWRITTEN_MAX:
                self._unwritten.add(name)  # the tenant's folder: full, read-only or just removed
            if not known:
                log.warning("status file not written", model=str(name), error=str(error))

    async def remove(self, name: ModelName) -> None:
        self._unwritten.discard(name)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(folder.remove_status, self._root, name)

    async def again(self, tenants: Collection[str]) -> None:
        """Write what could not be written, of these tenants: others have gone."""
        self._unwritten = {name for name in self._unwritten if name.tenant in tenants}
        for name in sorted(self._unwritten):
            await self.write(name)
