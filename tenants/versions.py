"""What each version was that has been live, kept in a folder: triggers that wait in a sequence log still run on it.

One JSON file a version, named by its sha256; the file's time is when the version last went live.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import structlog

from node.kernel.errors import StoreUnavailable
from node.kernel.limits import MODELS_PER_TENANT_MAX, TENANTS_MAX
from node.kernel.types import ModelName, ModelVersion
from tenants.folder import replace_file

log = structlog.get_logger(__name__)

REPLACED_MAX = 8
"""Replaced versions of each model that are kept, the newest: their triggers may still wait."""
_REMEMBERED_MAX = 4 * TENANTS_MAX * MODELS_PER_TENANT_MAX


def alike(one: ModelVersion, other: ModelVersion) -> bool:
    """Whether either can run on the other's rows and give what is expected of it."""
    return (one.features, one.outputs, one.labels) == (other.features, other.outputs, other.labels)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a collection found: the model files still named, and the versions that are no longer kept."""

    blobs: frozenset[str]
    dropped: frozenset[str]


class VersionFolder:
    """Used on one thread, but for `collect`, which may run on another while no model is new."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._versions: dict[str, ModelVersion] = {}
        self._live: dict[str, ModelVersion] = {}
        self._unwritten: dict[str, ModelVersion] = {}

    def keep(self, live: Iterable[ModelVersion]) -> None:
        """Remember what is live now. What the disk refuses stays in memory, and is written at the next change."""
        versions = {version.version: version for version in live}
        self._unwritten |= {key: version for key, version in versions.items() if self._live.get(key) != version}
        self._live = versions
        for key, version in list(self._unwritten.items()):
            self.remember(version)
            try:
                self._write(version)
                del self._unwritten[key]
            except OSError as error:
                log.warning(
                    "a version is kept in memory only: its waiting triggers are lost at a restart; free the disk",
                    model=str(version.name),
                    version=version.short_version,
                    error=str(error),
                )

    def remember(self, version: ModelVersion) -> None:
        """Keep in memory what is known from elsewhere."""
        while len(self._versions) >= _REMEMBERED_MAX:
            oldest = next(iter(self._versions))
            del self._versions[oldest]
            self._unwritten.pop(oldest, None)
        self._versions[version.version] = version

    def _write(self, version: ModelVersion) -> None:
        path = self._folder / version.version
        if _read(path) == version:
            os.utime(path)
        else:  # or it is of another model with the same files, at whose end it would go
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, msgspec.json.encode(version))

    def recall(self, name: ModelName, version: str) -> ModelVersion | None:
        """Of that model: the same files under several names make one version, which differs in the name alone. None
        when it is not known. Raises StoreUnavailable when the disk refuses to say."""
        known = self._versions.get(version)
        if known is None:
            try:
                known = _read(self._folder / version)
            except OSError as error:
                raise StoreUnavailable(
                    f"version {version[:12]}, for which triggers wait, can't be read from {self._folder}: {error};"
                    " repair the disk"
                ) from error
            if known is not None:
                self.remember(known)
        return known if known is None or known.name == name else replace(known, name=name)

    def collect(self, models: Collection[ModelName], current: Collection[str]) -> Kept:
        """Remove the files of models that are not among `models`, and of each other but the newest REPLACED_MAX.

        Versions in `current` (live or on trial) stay in any case. Blocking. Raises StoreUnavailable.
        """
        unwritten = list(self._unwritten.values())
        try:
            found = self._found()
            kept = [*unwritten, *_newest(found, models, current)]
            dropped = frozenset(found) - {version.version for version in kept}
            for version in dropped:
                (self._folder / version).unlink(missing_ok=True)
        except OSError as error:
            raise StoreUnavailable(f"{self._folder} can't be tidied: {error}; repair the disk") from error
        return Kept(frozenset(version.blob for version in kept), dropped)

    def forget(self, versions: Iterable[str]) -> None:
        for version in versions:
            self._versions.pop(version, None)

    def _found(self) -> dict[str, tuple[int, ModelVersion | None]]:
        """Version -> when it last went live, ns, and what it is; None where its file is damaged."""
        found: dict[str, tuple[int, ModelVersion | None]] = {}
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if not path.name.startswith("."):
                time_ns = path.stat().st_mtime_ns
                found[path.name] = time_ns, self._versions.get(path.name) or _read(path)
        return found


def _newest(
    found: dict[str, tuple[int, ModelVersion | None]], models: Collection[ModelName], current: Collection[str]
) -> list[ModelVersion]:
    kept: list[ModelVersion] = []
    replaced: dict[ModelName, int] = {}
    for key, (_, version) in sorted(found.items(), key=lambda one: (-one[1][0], one[0])):
        if version is None or (version.name not in models and key not in current):
            continue
        if key not in current:
            replaced[version.name] = replaced.get(version.name, 0) + 1
        if replaced.get(version.name, 0) <= REPLACED_MAX or key in current:
            kept.append(version)
    return kept


def _read(path: Path) -> ModelVersion | None:
    """None when there is no such file, or a damaged one. Raises OSError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ModelVersion)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        log.error(
            "what a version was is damaged on disk; its waiting triggers are lost", file=str(path), error=str(error)
        )
        return None
