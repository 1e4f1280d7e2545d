"""The watched directory as it lies on disk: which pairs there are, reading them safely, answering beside them.

Blocking: the watcher calls it in a thread. Tenants own their folders and may put anything there: links, pipes,
files that change while they are read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from node.kernel import limits
from node.kernel.errors import ManifestError, printable
from node.kernel.types import ModelName
from tenants.manifest import is_name
from tenants.shared_names import FEATURES_FILE

MANIFEST = ".toml"
MODEL = ".joblib"
STATUS = ".status.json"
TENANT_FILE = "tenant.toml"
IGNORED_MAX = 256
_LETTERS = "a-z, 0-9, '_' and '-' only, at most 63 of them, the first a letter or digit"

Signature: TypeAlias = tuple[int, int, int, int]
"""Device, inode, size and modification time: what changes when a file does."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What is there. A pair has the signatures of its manifest and its model file, `halves` are pairs not whole yet.

    `places` identifies the directories themselves: a watch on one that was made again hears nothing.
    """

    pairs: Mapping[ModelName, tuple[Signature, Signature]] = field(default_factory=dict)
    halves: frozenset[ModelName] = frozenset()
    tenants: Mapping[str, Signature | None] = field(default_factory=dict)
    """Tenant -> signature of its tenant.toml, None without one."""
    features: Mapping[str, Signature | None] = field(default_factory=dict)
    """Tenant -> signature of its features.toml, None without one."""
    places: tuple[tuple[str, int, int], ...] = ()
    unseen: frozenset[str] = frozenset()
    """Tenants in whose folders not everything was looked at: what is missing of theirs may be there."""
    ignored: tuple[str, ...] = ()
    """One printable line for each name that can't be taken, at most IGNORED_MAX."""
    ignored_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tenant -> the first of those lines that are about its folder."""


def scan(root: Path, known: Collection[str] = ()) -> Scan:
    """Look at every tenant's folder, those that are `known` first: there may be more than TENANTS_MAX.

    Raises OSError when the root itself can't be read.
    """
    found = _Found()
    found.place("", os.stat(root))
    for folder in sorted(os.scandir(root), key=lambda entry: (entry.name not in known, entry.name)):
        if not folder.name.startswith(".") and folder.is_dir(follow_symlinks=False):
            found.look(folder)
    return found.scan()


@dataclass(slots=True)
class _Found:
    """A scan that is being made."""

    pairs: dict[ModelName, tuple[Signature, Signature]] = field(default_factory=dict)
    halves: set[ModelName] = field(default_factory=set)
    tenants: dict[str, Signature | None] = field(default_factory=dict)
    features: dict[str, Signature | None] = field(default_factory=dict)
    places: list[tuple[str, int, int]] = field(default_factory=list)
    unseen: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)
    ignored_of: dict[str, list[str]] = field(default_factory=dict)

    def scan(self) -> Scan:
        places, ignored = tuple(sorted(self.places)), tuple(self.ignored[:IGNORED_MAX])
        halves, unseen = frozenset(self.halves), frozenset(self.unseen)
        ignored_of = {tenant: tuple(lines) for tenant, lines in self.ignored_of.items() if tenant in self.tenants}
        return Scan(self.pairs, halves, self.tenants, self.features, places, unseen, ignored, ignored_of)

    def place(self, name: str, found: os.stat_result) -> None:
        self.places.append((name, found.st_dev, found.st_ino))

    def look(self, folder: os.DirEntry[str]) -> None:
        """At a tenant's folder."""
        tenant = folder.name
        if not is_name(tenant):
            self.ignored.append(f"{printable(tenant)}/: a tenant's folder is named with {_LETTERS}; rename it")
            return
        if len(self.tenants) >= limits.TENANTS_MAX:
            self._not_all(tenant, f": there are {limits.TENANTS_MAX} tenants already")
            return
        try:
            found = os.stat(folder.path)
            files, problems = _files(folder.path)
        except FileNotFoundError:
            return  # removed meanwhile
        except OSError as error:
            self._not_all(tenant, unreadable("", error))
            return
        self.place(tenant, found)
        for problem in problems:
            self._not_all(tenant, problem)
        self.tenants[tenant] = files.pop(TENANT_FILE, None)
        self.features[tenant] = files.pop(FEATURES_FILE, None)
        self._take(tenant, files)

    def _not_all(self, tenant: str, problem: str) -> None:
        self.unseen.add(tenant)
        self._ignore(tenant, problem)

    def _ignore(self, tenant: str, problem: str) -> None:
        line = f"{tenant}/{problem}"
        self.ignored.append(line)
        lines = self.ignored_of.setdefault(tenant, [])
        if len(lines) < limits.TENANT_NAMES_IGNORED_MAX:
            lines.append(line)

    def _take(self, tenant: str, files: Mapping[str, Signature]) -> None:
        stems = {name.removesuffix(suffix) for name in files for suffix in (MANIFEST, MODEL) if name.endswith(suffix)}
        for stem in sorted(stems):
            if not is_name(stem):
                # Such as bytes that are no UTF-8: what comes here as a name is written to files and topics as text.
                self._ignore(tenant, f"{printable(stem)}: a model is named with {_LETTERS}; rename its files")
                continue
            manifest, model = files.get(stem + MANIFEST), files.get(stem + MODEL)
            if manifest is not None and model is not None:
                self.pairs[ModelName(tenant, stem)] = manifest, model
            else:
                self.halves.add(ModelName(tenant, stem))


def _files(folder: str) -> tuple[dict[str, Signature], list[str]]:
    """The manifests and model files by name, and a line for each reason why there may be more."""
    files: dict[str, Signature] = {}
    problems: list[str] = []
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= limits.TENANT_FOLDER_ENTRIES_MAX:
                problems.append(f": has more than {count} files, and not all are looked at; remove what is no model")
                break
            if entry.name.startswith(".") or not entry.name.endswith((MANIFEST, MODEL)):
                continue
            try:
                found = entry.stat()  # of what a link points to: that is what changes
            except FileNotFoundError:
                continue
            except OSError as error:
                problems.append(unreadable(entry.name, error))
                continue
            if stat.S_ISREG(found.st_mode):
                files[entry.name] = _signature(found)
    return files, problems


def unreadable(file: str, error: OSError) -> str:
    """A line for whoever can mend it."""
    return f"{printable(file)}: can't be read: {error.strerror}; make it readable for the node's user"


def _signature(found: os.stat_result) -> Signature:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Held:
    """A file of a tenant, held open: `path` leads to that very file, whatever has its name now."""

    name: str
    descriptor: int
    signature: Signature
    bytes_max: int

    @property
    def path(self) -> Path:
        return Path(f"/proc/self/fd/{self.descriptor}")

    def read(self) -> bytes:
        """All of it, from its start. Raises ManifestError when it has grown over its bound meanwhile, OSError."""
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        with os.fdopen(self.descriptor, "rb", closefd=False) as source:
            content = source.read(self.bytes_max + 1)
        self.check_size(len(content))
        return content

    def check_size(self, size: int) -> None:
        if size > self.bytes_max:
            raise ManifestError([f"{self.name}: has more than {self.bytes_max} bytes; make it smaller"])


@contextmanager
def opened(root: Path, tenant: str, name: str, bytes_max: int) -> Iterator[Held]:
    """A file of a tenant, for as long as it is held.

    Raises ManifestError with a line for the tenant when it isn't a plain file inside the tenant's folder or has
    more than `bytes_max` bytes, OSError when it has gone.
    """
    folder = root / tenant
    descriptor = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        found = os.fstat(descriptor)
        held = Held(name, descriptor, _signature(found), bytes_max)
        # Asked of the open file, so that a link put in its place meanwhile changes nothing.
        if not stat.S_ISREG(found.st_mode) or not Path(os.readlink(held.path)).is_relative_to(folder.resolve()):
            raise ManifestError([f"{name}: not a plain file in the tenant's folder; put the file itself there"])
        held.check_size(found.st_size)
        yield held
    finally:
        os.close(descriptor)


def concerns_us(change: object, path: str) -> bool:
    """Folders (no suffix), manifests and model files; not our own status files, nor hidden or temporary ones."""
    name = Path(path).name
    return not name.startswith(".") and (name.endswith((MANIFEST, MODEL)) or "." not in name)


def write_status(root: Path, name: ModelName, content: bytes) -> None:
    """Put `<model>.status.json` beside the pair, whole or not at all. Raises OSError."""
    replace_file(root / name.tenant / f"{name.model}{STATUS}", content, durable=False)


def remove_status(root: Path, name: ModelName) -> None:
    (root / name.tenant / f"{name.model}{STATUS}").unlink(missing_ok=True)


def replace_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write beside, then rename. The temporary name is hidden and made anew: no link at it is followed."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as target:
        target.write(content)
        if durable:
            target.flush()
            os.fsync(descriptor)
    temporary.replace(path)
