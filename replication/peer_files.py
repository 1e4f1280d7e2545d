"""Files on their way between nodes: what the threads of `replication.peers` do, off the event loop.

A sender gives the file to the kernel (sendfile, which uvloop does not have), a receiver reads large pieces, hashes and
writes them. All of that is done without the GIL, so a restore does not hold up the node's cycles; half a receiver's CPU
time goes into the sha256. Classes here block; `abort` may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import re
import select
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from node.kernel import limits
from node.kernel.clock import Clock
from node.kernel.errors import NotFound, PeerUnavailable, StoreUnavailable
from node.kernel.limits import KIB, MIB

_PIECE_BYTES = 512 * KIB
_SEND_BYTES_MAX = 64 * MIB
"""Of one call of sendfile; the kernel takes what fits the socket's buffer."""
_PROBLEM_BYTES_MAX = 64 * KIB
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,15})-[0-9]{1,15}|\*)/([0-9]{1,15})")


def seconds_max(count: int) -> float:
    """How long a transfer of `count` bytes may take in all."""
    return limits.PEER_STALL_MS_MAX / 1000 + count / limits.PEER_BYTES_PER_SECOND_MIN


def open_file(path: Path) -> tuple[BinaryIO, int]:
    """A regular file and its size in bytes; no link is followed. Raises NotFound, StoreUnavailable."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path.name} here; ask another node") from None
    except OSError as failure:
        if failure.errno == errno.ELOOP:
            raise NotFound(f"{path.name} is a link, which is not sent; ask another node") from None
        raise StoreUnavailable(f"the file {path} can't be opened: {failure}; repair the disk") from failure
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise NotFound(f"{path.name} is no file; ask another node")
    return os.fdopen(handle, "rb"), found.st_size


class Sending:
    """A part of a file that goes out through a duplicate of a connection's socket, which must not block."""

    def __init__(self, file: BinaryIO, offset: int, count: int, descriptor: int, clock: Clock) -> None:
        self._file = file
        self._offset = offset
        self._count = count
        self._socket = socket.socket(fileno=os.dup(descriptor))
        self._clock = clock

    def run(self) -> int:
        """Bytes sent, all of them. Raises OSError when the peer is gone, too slow, or the file has shrunk."""
        end = self._offset + self._count
        deadline = self._clock.monotonic() + seconds_max(self._count)
        os.posix_fadvise(self._file.fileno(), self._offset, self._count, os.POSIX_FADV_SEQUENTIAL)
        writable = select.poll()
        writable.register(self._socket, select.POLLOUT)
        try:
            while self._offset < end:
                if not writable.poll(limits.PEER_STALL_MS_MAX) or self._clock.monotonic() > deadline:
                    raise TimeoutError(f"the peer took too long with {self._count} bytes")
                self._offset += self._send(min(end - self._offset, _SEND_BYTES_MAX))
            return self._count
        finally:
            self._socket.close()

    def _send(self, count: int) -> int:
        try:
            sent = os.sendfile(self._socket.fileno(), self._file.fileno(), self._offset, count)
        except BlockingIOError:
            return 0
        if sent == 0:
            raise OSError("the file has become shorter while it was sent")
        return sent

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class Answer:
    """How a peer began to answer; `body` is there unless it is a file's bytes (status 200 and 206)."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def file(self) -> bool:
        return self.status in (http.client.OK, http.client.PARTIAL_CONTENT)


class Download:
    """A file that comes in pieces over as many connections as it takes, into `part`.

    Bytes of `part` that an earlier download left are kept and hashed first. `size` is None where it is not known;
    more than `bytes_max` bytes are not taken. All raise StoreUnavailable when the disk refuses.
    """

    def __init__(self, part: Path, size: int | None, bytes_max: int, clock: Clock) -> None:
        self._part = part
        self._size = size
        self._bytes_max = bytes_max
        self._clock = clock
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._socket: socket.socket | None = None
        self._aborted = False
        self.offset = 0
        self.resumed = 0
        self.deadline = float("inf")
        """When, by the monotonic clock, the attempt is to be aborted."""

    @property
    def complete(self) -> bool:
        return self._size is not None and self.offset == self._size

    def open(self) -> None:
        """Take up what is there of the file."""
        with self._disk():
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._part, "a+b", buffering=0)  # noqa: SIM115
            self._file.seek(0)
            buffer = memoryview(bytearray(_PIECE_BYTES))
            while count := self._file.readinto(buffer):
                self._check_aborted()
                self._digest.update(buffer[:count])
                self.offset += count
        if self.offset > (self._bytes_max if self._size is None else self._size):
            self._start_over()
        self.resumed = self.offset

    def _start_over(self) -> None:
        assert self._file is not None
        with self._disk():
            self._file.truncate(0)
        self._digest = hashlib.sha256()
        self.offset = 0

    def attempt(
        self, address: str, raw_path: str, headers: Mapping[str, str], proven: Callable[[Answer, int], bool]
    ) -> Answer:
        """Ask once for what is missing and take what comes. Raises PeerUnavailable when it was cut.

        `proven` tells whether an answer with a file of so many bytes is of the cluster's; others are not taken.
        """
        partial = {"Range": f"bytes={self.offset}-"} if self.offset else {}
        with _connection_problems(address), self._connected(address) as connection:
            connection.request("GET", raw_path, headers={**headers, **partial})
            with contextlib.closing(connection.getresponse()) as response:
                answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, b"")
                if not answer.file:
                    return self._ended(answer, response.read(_PROBLEM_BYTES_MAX))
                self._take(address, response, answer, proven)
                return answer

    @contextmanager
    def _connected(self, address: str) -> Iterator[http.client.HTTPConnection]:
        connect_s_max, stall_s_max = limits.PEER_CONNECT_MS_MAX / 1000, limits.PEER_STALL_MS_MAX / 1000
        host, _, port = address.rpartition(":")
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=connect_s_max)
        self.deadline = self._clock.monotonic() + connect_s_max + stall_s_max
        try:
            connection.connect()
            connection.sock.settimeout(stall_s_max)
            self._socket = connection.sock  # which the connection forgets once the answer has begun
            self._check_aborted()
            yield connection
        finally:
            self._socket = None
            self.deadline = float("inf")
            connection.close()

    def _ended(self, answer: Answer, body: bytes) -> Answer:
        """No bytes: that the file ends where we are is no refusal."""
        if answer.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and self._size is None:
            total = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
            if total is not None and int(total[2]) == self.offset:
                self._size = self.offset
            else:
                self._start_over()
        return Answer(answer.status, answer.headers, body)

    def _take(
        self, address: str, response: http.client.HTTPResponse, answer: Answer, proven: Callable[[Answer, int], bool]
    ) -> None:
        assert self._file is not None
        count = self._checked_count(address, response, answer)
        if not proven(answer, self.offset + count):
            raise PeerUnavailable(f"{address} sent a file without proof that it is of this cluster; check its secret")
        self._size = self.offset + count
        self.deadline = self._clock.monotonic() + seconds_max(count)
        buffer = memoryview(bytearray(min(_PIECE_BYTES, count) or 1))
        while count:
            got = response.readinto(buffer[: min(count, len(buffer))])
            self._check_aborted()
            if not got:
                raise PeerUnavailable(f"{address} ended the file {count} bytes early; it is resumed when asked again")
            self._write(buffer[:got])
            count -= got

    def _checked_count(self, address: str, response: http.client.HTTPResponse, answer: Answer) -> int:
        """How many bytes come, once they are found to be those that are missing here."""
        count, offset, total = response.length, 0, response.length
        if answer.status == http.client.PARTIAL_CONTENT:
            given = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
            offset, total = (int(given[1]), int(given[2])) if given and given[1] else (-1, None)
        if count is None or total is None or offset != self.offset or offset + count != total:
            raise PeerUnavailable(f"{address} did not send the part of the file that was asked for; upgrade the nodes")
        if self._size is not None and total != self._size:
            raise PeerUnavailable(f"{address} has the file with {total} bytes, not {self._size}; ask another node")
        if total > self._bytes_max:
            raise PeerUnavailable(f"{address} has the file with {total} bytes, over {self._bytes_max}; not fetched")
        return count

    def _write(self, piece: memoryview) -> None:
        assert self._file is not None
        self._digest.update(piece)
        with self._disk():
            written = 0
            while written < len(piece):
                written += self._file.write(piece[written:])
        self.offset += written

    def _check_aborted(self) -> None:
        if self._aborted:
            raise PeerUnavailable(f"{self._part.name} was given up: its peer is too slow, or the node stops; ask again")

    def abort(self) -> None:
        """Make the attempt in progress, and any later one, fail soon."""
        self._aborted = True
        connected = self._socket
        if connected is not None:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def finish(self, target: Path, sha256: str, sync: bool) -> None:
        """Rename the whole file into place. With another hash it is removed. Raises PeerUnavailable then."""
        assert self._file is not None
        with self._disk():
            if self._digest.hexdigest() != sha256:
                self._part.unlink(missing_ok=True)
                raise PeerUnavailable(f"{target.name} came with other bytes than its sha256 {sha256[:12]}; ask again")
            if sync:
                os.fdatasync(self._file.fileno())
            self._part.replace(target)
            if sync:
                _sync_folder(target.parent)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as failure:
            reason = f"a file for {self._part.parent} can't be written: {failure}; free or repair the disk"
            raise StoreUnavailable(reason) from failure


@contextmanager
def _connection_problems(address: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as failure:
        reason = f"{address} can't be reached, or cut the transfer: {failure!r}; it is resumed when asked again"
        raise PeerUnavailable(reason) from failure


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
