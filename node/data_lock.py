"""One node at a time in a data_dir: two would write over each other's models, quotas and tables."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node.kernel.errors import ConfigError

FILE = "lock"


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """For as long as this process lives at most. Raises ConfigError while another node has it, or it can't be made."""
    path = data_dir / FILE
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise ConfigError([f"{path} can't be made ({error.strerror}); let the node write its data_dir"]) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = (
                f"[node] data_dir is {data_dir}, in which a node runs already; stop that one, or name another folder"
            )
            raise ConfigError([problem]) from None
        except OSError as error:
            raise ConfigError([f"{path} can't be locked ({error.strerror}); keep data_dir on a local disk"]) from error
        yield
