"""The process `tenants.warm_server` as the node has it: started, reached by one socket, ended.

It imports every model library, which takes longer than all else that a node does when it starts. So a node starts it
before it imports itself, and this module imports next to nothing.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import msgspec

from node.kernel.errors import WorkerLost
from tenants import warm_server
from tenants.cgroups import ControlGroups
from tenants.sandbox import SandboxSettings


class WarmProcess:
    """Started when this is made, by the thread that is to outlive it: it ends with its parent. Raises WorkerLost."""

    def __init__(self, settings: SandboxSettings, groups: ControlGroups) -> None:
        """`groups` are its workers'. They come first, because this process has to be in the node's own group."""
        self.groups = groups
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setblocking(False)
        told = warm_server.Settings(
            parent=os.getpid(),
            descriptor=theirs.fileno(),
            required=settings.required,
            libraries=settings.libraries,
            extra_globals=settings.extra_globals,
        )
        with theirs:
            self._process = _started(msgspec.json.encode(told).decode(), theirs.fileno())

    @property
    def ended(self) -> bool:
        """Whether whoever read from `control` has closed it, as it was at its end."""
        return self.control.fileno() < 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> None:
        """Kill it, with all its workers, and close the socket. Blocks until the kernel has its memory back."""
        self.control.close()
        self._process.kill()
        self._process.wait()


def _started(settings: str, descriptor: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-sP", "-m", "tenants.warm_server", settings],
            stdin=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            env=_environment(),
            process_group=0,  # a Ctrl-C at the terminal is the node's to handle; see node.kernel.child
        )
    except OSError as error:
        raise WorkerLost(f"the warm server can't be started ({error}); look at the limits of this machine") from error


def _environment() -> dict[str, str]:
    """Nothing of the node's environment, which may hold secrets; one thread for each numeric library."""
    threads = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        **dict.fromkeys(threads, "1"),
        "LANG": "C.UTF-8",
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
