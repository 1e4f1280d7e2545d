"""What hostile models are aimed at, watched: addresses that count who came, files that must stay as they are."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostile_making import Target

SECRET = "the other tenant's customers\n"


@dataclass(slots=True)
class Aims:
    """Addresses and files outside every worker, and how they were at the start."""

    sockets: tuple[socket.socket, ...]
    folder: Path
    abstract: str
    before: tuple[str, ...]

    def target(self, node: int, others: tuple[int, ...], environment: str) -> Target:
        stream, datagram, _, _ = self.sockets
        return Target(
            node=node,
            others=others,
            tcp=stream.getsockname()[1],
            udp=datagram.getsockname()[1],
            unix=str(self.folder / "socket"),
            abstract=self.abstract,
            secret=str(self.folder / "secret"),
            outside=str(self.folder / "outside"),
            environment=environment,
        )

    def note(self) -> None:
        """Whatever is there now was put there by the suite itself."""
        self.before = _files(self.folder)

    def reached(self) -> list[str]:
        """What has come, or was changed, since the start; empty: nothing."""
        came = select.select(self.sockets, [], [], 0)[0]
        found = [f"somebody reached {one.getsockname()!r}" for one in came]
        now = _files(self.folder)
        found += [f"changed: {line}" for line in sorted(set(now) ^ set(self.before))]
        return found


@contextlib.contextmanager
def aims(folder: Path) -> Iterator[Aims]:
    """Listening addresses on the loopback and in `folder`, which everybody may enter and write to."""
    (folder / "outside").mkdir(parents=True)
    (folder / "secret").write_text(SECRET)
    for path, mode in ((folder, 0o777), (folder / "outside", 0o777), (folder / "secret", 0o666)):
        path.chmod(mode)
    abstract = f"headrace-aim-{os.getpid()}-{folder.name}"
    with contextlib.ExitStack() as stack:
        made = []
        for family, kind, address in (
            (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            (socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "socket")),
            (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{abstract}"),
        ):
            one = stack.enter_context(socket.socket(family, kind))
            one.bind(address)
            if kind == socket.SOCK_STREAM:
                one.listen()
            made.append(one)
        (folder / "socket").chmod(0o777)
        yield Aims(tuple(made), folder, abstract, _files(folder))


def _files(folder: Path) -> tuple[str, ...]:
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""
        name = path.relative_to(folder)
        found.append(f"{name} {status.st_mode:o} {status.st_uid} {status.st_nlink} {status.st_mtime_ns} {content}")
    return tuple(found)
