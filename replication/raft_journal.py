"""What a Raft node keeps on its disk: journal, vote, dump, and whether its log can be relied upon.

It stands in for pysyncobj's own journal, which loses entries when the process is killed while it compacts, swallows a
damaged vote or dump and goes on without it, and never syncs. Here entries have checksums, files are replaced by
renaming, and what can't be read is refused with CatalogCorrupt: the way on is to wipe the folder and start again, the
node then comes back empty and fetches all from the leader.

    journal    magic, then records: length, CRC-32, index, term, command
    vote       term, the node voted for in it, and a lower bound of what is committed
    dump       the state machine as of an index, the two log entries there, the members
    node       who this folder belongs to, and `trusted`: see `RaftFolder.trusted`
    lock       held while a process uses the folder

Methods in camel case are the interface pysyncobj calls. Everything here is used by one thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import pickle
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import msgspec

from node.kernel.errors import CatalogCorrupt, ConfigError, StoreUnavailable

_JOURNAL_MAGIC = b"headrace raft journal 1\n"
_DUMP_MAGIC = b"headrace raft dump 1\n"
_HEAD = struct.Struct("<IIQQ")
_MEMBERSHIP = b"\x02"
_COMMIT_INDEX_S = 10
_FILES = ("journal", "vote", "dump", "node")


class Entry(NamedTuple):
    """One log entry; pysyncobj compares it with plain tuples of the same three."""

    command: bytes
    log_index: int
    term: int


class Vote(msgspec.Struct, frozen=True):
    term: int = 0
    voted_for: str | None = None
    commit_index: int = 1


class Identity(msgspec.Struct, frozen=True):
    name: str
    address: str
    trusted: bool = False


class Dump(msgspec.Struct, frozen=True, array_like=True):
    """The state machine after `last` was applied. `members` holds (address, name) of every node."""

    state: bytes
    before: tuple[bytes, int, int]
    last: tuple[bytes, int, int]
    members: list[tuple[str, str]]


def _corrupt(path: Path, what: str) -> CatalogCorrupt:
    return CatalogCorrupt(
        f"this node's copy of the catalog can't be trusted: {path} {what}. While a quorum of other nodes runs, stop "
        f"this node, delete the folder {path.parent} and start it: it comes back empty and fetches the catalog again"
    )


@contextlib.contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"the catalog's file {path} could not be {doing} ({error}); free or repair the disk, then start the node"
        ) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and durably."""
    temporary = path.with_name(f"{path.name}.new")
    with disk_errors(path, "written"):
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)


def write_dump(path: Path, dump: Dump) -> None:
    body = msgspec.msgpack.encode(dump)
    replace_file(path, _DUMP_MAGIC + hashlib.sha256(body).digest() + body)


def read_dump(path: Path) -> Dump:
    """Raises CatalogCorrupt when its checksum or form is wrong."""
    with disk_errors(path, "read"):
        content = path.read_bytes()
    start = len(_DUMP_MAGIC) + 32
    body = content[start:]
    if not content.startswith(_DUMP_MAGIC) or hashlib.sha256(body).digest() != content[start - 32 : start]:
        raise _corrupt(path, "does not have the checksum written in it")
    try:
        return msgspec.msgpack.decode(body, type=Dump)
    except msgspec.MsgspecError as error:
        raise _corrupt(path, f"is of another format ({error})") from None


class Journal:
    """Raft's log and vote on disk. An entry is durable once `sync` has returned; raises StoreUnavailable."""

    def __init__(self, folder: Path, sync: bool = True) -> None:
        self._path = folder / "journal"
        self._vote_path = folder / "vote"
        self._sync = sync
        self._dirty = False
        self._entries: list[Entry] = []
        self._offsets: list[int] = []
        existed = self._path.exists()
        if not existed:
            replace_file(self._path, _JOURNAL_MAGIC)
        with disk_errors(self._path, "opened"):
            self._file: BinaryIO = self._path.open("r+b", buffering=0)
        self._end = self._read()
        self._vote = self._read_vote(existed)
        self._vote_saved = True
        self._seconds_unsaved = 0
        if self._entries and self._vote.term < self._entries[-1].term:
            raise _corrupt(self._vote_path, "is older than the journal")

    def _read(self) -> int:
        """Fill the entries; cut a torn last record off, which nobody has been told of; where the next one goes."""
        with disk_errors(self._path, "read"):
            content = self._file.read()
        offset = len(_JOURNAL_MAGIC)
        if not content.startswith(_JOURNAL_MAGIC):
            raise _corrupt(self._path, "is not a journal of this version")
        while offset < len(content):
            entry, end = self._parse(content, offset)
            if entry is None:
                if end < len(content):
                    raise _corrupt(self._path, f"is damaged at byte {offset}")
                self._cut(offset)
                break
            if self._entries and (
                entry.log_index != self._entries[-1].log_index + 1 or entry.term < self._entries[-1].term
            ):
                raise _corrupt(self._path, f"has entries out of order at byte {offset}")
            self._entries.append(entry)
            self._offsets.append(offset)
            offset = end
        return offset

    def _parse(self, content: bytes, offset: int) -> tuple[Entry | None, int]:
        if offset + _HEAD.size > len(content):
            return None, len(content)
        size, checksum, index, term = _HEAD.unpack_from(content, offset)
        end = offset + _HEAD.size + size
        if end > len(content) or zlib.crc32(content[offset + 8 : end]) != checksum:
            return None, end
        return Entry(content[offset + _HEAD.size : end], index, term), end

    def _read_vote(self, needed: bool) -> Vote:
        if not self._vote_path.exists():
            if needed and self._entries and self._entries[-1].term > 0:
                raise _corrupt(self._vote_path, "is missing")
            return Vote()
        with disk_errors(self._vote_path, "read"):
            content = self._vote_path.read_bytes()
        try:
            return msgspec.json.decode(content, type=Vote)
        except msgspec.MsgspecError as error:
            raise _corrupt(self._vote_path, f"can't be read ({error})") from None

    # --- entries

    def add(self, command: bytes, index: int, term: int) -> None:
        record = self._record(command, index, term)
        with disk_errors(self._path, "written"):
            self._write(record)
        self._entries.append(Entry(command, index, term))
        self._offsets.append(self._end)
        self._end += len(record)
        self._dirty = True

    def _write(self, record: bytes) -> None:
        """The whole record, or nothing: a disk that fills up takes a part of it and says so by the count alone."""
        file, written = self._file.fileno(), 0
        try:
            while written < len(record):
                count = os.pwrite(file, record[written:], self._end + written)
                if not count:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written += count
        except OSError:
            os.ftruncate(file, self._end)
            raise

    @staticmethod
    def _record(command: bytes, index: int, term: int) -> bytes:
        body = struct.pack("<QQ", index, term) + command
        return struct.pack("<II", len(command), zlib.crc32(body)) + body

    def sync(self) -> None:
        """Called before anything is sent that another node may rely on, so a batch costs one sync."""
        if self._dirty and self._sync:
            with disk_errors(self._path, "synced"):
                os.fdatasync(self._file.fileno())
        self._dirty = False

    def clear(self) -> None:
        self._entries, self._offsets = [], []
        self._end = len(_JOURNAL_MAGIC)
        self._cut(self._end)

    def _cut(self, size: int) -> None:
        with disk_errors(self._path, "cut"):
            os.ftruncate(self._file.fileno(), size)
        self._dirty = True

    def deleteEntriesFrom(self, position: int) -> None:  # noqa: N802
        if position >= len(self._entries):
            return
        self._end = self._offsets[position]
        del self._entries[position:], self._offsets[position:]
        self._cut(self._end)

    def deleteEntriesTo(self, position: int) -> None:  # noqa: N802
        """Drop the entries in front, by writing the rest to a new file: a kill leaves the old one or the new one."""
        self._entries = self._entries[position:]
        content, self._offsets = bytearray(_JOURNAL_MAGIC), []
        for entry in self._entries:
            self._offsets.append(len(content))
            content += self._record(*entry)
        self._end = len(content)
        replace_file(self._path, bytes(content))
        with disk_errors(self._path, "opened"):
            self._file.close()
            self._file = self._path.open("r+b", buffering=0)
        self._dirty = False

    @overload
    def __getitem__(self, position: int) -> Entry: ...
    @overload
    def __getitem__(self, position: slice) -> list[Entry]: ...
    def __getitem__(self, position: int | slice) -> Entry | list[Entry]:
        return self._entries[position]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        return self._end

    # --- term, vote and commit index

    def _keep(self, vote: Vote) -> None:
        replace_file(self._vote_path, msgspec.json.encode(vote))
        self._vote, self._vote_saved, self._seconds_unsaved = vote, True, 0

    def setCurrentTerm(self, term: int, voted_for: str | None) -> None:  # noqa: N802
        """Durable on return: a vote is never given twice in a term."""
        self._keep(msgspec.structs.replace(self._vote, term=term, voted_for=voted_for))

    def getCurrentTerm(self) -> int:  # noqa: N802
        return self._vote.term

    def getVotedForNodeId(self) -> str | None:  # noqa: N802
        return self._vote.voted_for

    def setRaftCommitIndex(self, index: int) -> None:  # noqa: N802
        self.sync()
        if index != self._vote.commit_index:
            self._vote = msgspec.structs.replace(self._vote, commit_index=index)
            self._vote_saved = False

    def getRaftCommitIndex(self) -> int:  # noqa: N802
        return self._vote.commit_index

    def onOneSecondTimer(self) -> None:  # noqa: N802
        """The commit index is only a bound that the journal is checked by, so it may lag."""
        self._seconds_unsaved += not self._vote_saved
        if self._seconds_unsaved >= _COMMIT_INDEX_S:
            self._keep(self._vote)

    def _destroy(self) -> None:
        self.sync()
        if not self._vote_saved:
            self._keep(self._vote)
        self._file.close()

    # --- what pysyncobj does not check

    def fit(self, dump: Dump | None) -> None:
        """Make the journal begin where the dump ends, as it does unless the process was killed in between.

        pysyncobj would throw away a journal that begins earlier, with entries this node has acknowledged.
        """
        if dump is None:
            if self._entries and self._entries[0].log_index > 1:
                raise _corrupt(self._path.with_name("dump"), "is missing")
            return
        indexes = range(self._entries[0].log_index, self._entries[-1].log_index + 1) if self._entries else range(0)
        if dump.before[1] in indexes and dump.last[1] in indexes:
            position = dump.before[1] - indexes.start
            if tuple(self._entries[position : position + 2]) != (dump.before, dump.last):
                raise _corrupt(self._path, "disagrees with the dump beside it")
            if position:
                self.deleteEntriesTo(position)
        elif self._entries and self._entries[-1].log_index > dump.last[1]:
            raise _corrupt(self._path, "begins behind the end of the dump beside it")
        else:
            self.clear()

    def check_commit_index(self, dump: Dump | None) -> None:
        last = max(self._entries[-1].log_index if self._entries else 1, dump.last[1] if dump else 1)
        if self._vote.commit_index > last:
            raise _corrupt(self._path, f"ends at {last}, before the entry {self._vote.commit_index} that was committed")


class _MembershipUnpickler(pickle.Unpickler):
    """Reads pysyncobj's membership commands, and makes nothing but the plain stand-in for a node below."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("pysyncobj.node", "TCPNode"):
            return _NodeRecord
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a membership command")


class _NodeRecord:
    """Takes the attributes of a pickled pysyncobj node."""

    name: str


def fold_members(members: dict[str, str], entries: list[Entry]) -> dict[str, str]:
    """Members (address -> name) after the membership commands among the entries."""
    members = dict(members)
    for entry in entries:
        if entry.command[:1] != _MEMBERSHIP:
            continue
        request: list[Any] = _MembershipUnpickler(io.BytesIO(entry.command[1:])).load()
        kind, address = request[0], str(request[1])
        if kind == "add":
            members[address] = str(getattr(request[2], "name", address) if len(request) > 2 else address)
        else:
            members.pop(address, None)
    return members


def _read_identity(path: Path) -> Identity:
    with disk_errors(path, "read"):
        content = path.read_bytes()
    try:
        return msgspec.json.decode(content, type=Identity)
    except msgspec.MsgspecError as error:
        raise _corrupt(path, f"can't be read ({error})") from None


class RaftFolder:
    """A node's folder: taken for one process, checked, and read. Close it when the node stops.

    Raises ConfigError when the folder is in use or belongs to another node, CatalogCorrupt, StoreUnavailable.
    """

    def __init__(self, path: Path, name: str, address: str, sync: bool) -> None:
        self.path = path
        self.dump_path = path / "dump"
        with disk_errors(path, "opened"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (path / "lock").open("ab")
        try:
            self._take()
            self._identity = self._identify(name, address)
            if self._identity.trusted and not (path / "journal").exists():
                raise _corrupt(path / "journal", "is missing")
            self.dump = read_dump(self.dump_path) if self.dump_path.exists() else None
            self.journal = Journal(path, sync)
            self.journal.fit(self.dump)
            self.journal.check_commit_index(self.dump)
        except BaseException:
            self._lock.close()
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError([f"the folder {self.path} is in use by another process; stop that one first"]) from None
        for left in self.path.glob("*.new"):
            left.unlink()
        for left in self.path.glob("dump.*tmp"):
            left.unlink()

    def _identify(self, name: str, address: str) -> Identity:
        path = self.path / "node"
        if not path.exists():
            identity = Identity(name, address)
            replace_file(path, msgspec.json.encode(identity))
            return identity
        identity = _read_identity(path)
        if (identity.name, identity.address) != (name, address):
            raise ConfigError(
                [
                    f"the folder {self.path} belongs to node {identity.name} at {identity.address}, and this is {name} "
                    f"at {address}; give the node back its name and address, or remove the old one from the cluster "
                    "(leave), delete the folder and join as a new node"
                ]
            )
        return identity

    @property
    def trusted(self) -> bool:
        """Whether this node's log holds all that the node ever acknowledged.

        A node whose disk was lost has forgotten what it acknowledged; were it to vote, a leader could win that lacks
        committed entries. So an empty folder is not trusted until it has founded a cluster, which takes all members, or
        has caught up with a leader; until then it neither votes for a node with a log nor is elected.
        """
        return self._identity.trusted

    def trust(self) -> None:
        if not self._identity.trusted:
            self._identity = msgspec.structs.replace(self._identity, trusted=True)
            replace_file(self.path / "node", msgspec.json.encode(self._identity))

    def members(self, configured: dict[str, str]) -> dict[str, str]:
        """Address -> name: those the dump and the journal name, and only for a new folder those configured."""
        if self.dump is None:
            return fold_members(configured, self.journal[:])
        after = [entry for entry in self.journal[:] if entry.log_index > self.dump.last[1]]
        return fold_members(dict(self.dump.members), after)

    def read_dump(self) -> Dump:
        return read_dump(self.dump_path)

    def close(self) -> None:
        self._lock.close()


def wipe(folder: Path) -> None:
    """Forget a stopped node's copy of the catalog, so that it comes back empty and fetches it from the leader."""
    with disk_errors(folder, "wiped"):
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        if folder.exists():
            _sync_folder(folder)


def accept_loss(folder: Path) -> None:
    """Let a stopped node vote with the log it has, though it may lack acknowledged commands.

    The last resort when so many disks are lost that no quorum of trusted nodes is left: to be done for so many of the
    empty ones, once they have been started, that with the rest they are a quorum; never for all. Raises
    StoreUnavailable, CatalogCorrupt.
    """
    path = folder / "node"
    replace_file(path, msgspec.json.encode(msgspec.structs.replace(_read_identity(path), trusted=True)))
