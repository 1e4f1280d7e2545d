"""What the last check of each model found, kept beside the node's state: the check writes it, the node shows it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from node.kernel.errors import ExportFailed
from node.kernel.limits import MIB
from node.kernel.types import ModelName
from node.training.consistency import Consistency

_FOLDER: Final = "consistency"
_BYTES_MAX: Final = MIB


class Verdicts:
    """A file for each model below the node's data_dir; read anew only when it has changed."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / _FOLDER
        self._read: dict[ModelName, tuple[int, Consistency | None]] = {}

    def path(self, name: ModelName) -> Path:
        return self._folder / f"{name.tenant}.{name.model}.json"

    def try_folder(self) -> None:
        """Raises ExportFailed when nothing can be kept here: better known before what is to be kept is computed."""
        with self._writing(), tempfile.TemporaryFile(dir=self._folder):
            pass

    def put(self, name: ModelName, found: Consistency) -> None:
        """Raises ExportFailed."""
        with self._writing():
            handle, made = tempfile.mkstemp(prefix=".new-", dir=self._folder)
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(found))
            os.chmod(made, 0o644)
            Path(made).replace(self.path(name))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as failure:
            raise ExportFailed(f"{self._folder} can't be written: {failure.strerror}") from None

    def get(self, name: ModelName) -> Consistency | None:
        """None: never checked, or what is there is no such file."""
        path = self.path(name)
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            self._read.pop(name, None)
            return None
        held = self._read.get(name)
        if held is None or held[0] != changed:
            held = self._read[name] = changed, _load(path)
        return held[1]


def _load(path: Path) -> Consistency | None:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_BYTES_MAX), type=Consistency)
    except (OSError, msgspec.MsgspecError):
        return None
