"""The hostile and broken models: all of them for `isolation`, QUICK for the tests."""

from __future__ import annotations

from hostile_attacks import FILES, KERNEL, NETWORK, PROCESSES
from hostile_files import DROPPED, MODEL_FILES
from hostile_making import Case
from hostile_models import BROKEN, PROTOCOL

CODE = (*BROKEN, *NETWORK, *FILES, *PROCESSES, *KERNEL, *PROTOCOL)
CASES = (*CODE, *MODEL_FILES, *DROPPED)
QUICK = (
    "raises on a row", "segfaults on a row", "loops for ever on a row", "takes all memory bit by bit",
    "prints without end", "connects by TCP", "reads the node's memory and environment", "writes files",
    "forks a bomb", "uses more threads than its share", "signals others", "uses other numbers of system calls",
    "shares memory", "answers with garbage", "answers twice",
)  # fmt: skip


def named(names: tuple[str, ...]) -> tuple[Case, ...]:
    """Raises LookupError for a name that is not there."""
    by_name = {case.name: case for case in CASES}
    return tuple(by_name[name] for name in names)
