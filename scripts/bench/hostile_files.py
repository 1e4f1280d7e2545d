"""Files in the watched directory that attack whoever reads them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile_making import MANIFEST, MODEL, Target, dropped, evaluated, file, linear, pair, program, stored


class Reduced:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def touching(target: Target) -> Reduced:
    return Reduced(os.system, f"touch {target.outside}/touched")


def in_objects(target: Target) -> Any:
    array = np.empty(2, dtype=object)
    array[:] = [touching(target), 1]
    return array


def repeated(count: int) -> bytes:
    """One text of `count` zeros, as a pickle."""
    return b"\x80\x04\x8e" + struct.pack("<Q", count) + bytes(count) + b"."


MODEL_FILES = [
    file("calls os.system", "allow-list", lambda target: stored(touching(target))),
    file("hides a call behind an array", "allow-list", lambda target: stored([np.arange(9.0), touching(target)])),
    file("unpacks to a bomb", "bounded unpacking", lambda _: zlib.compress(repeated(900 << 20), 1)),
    file("is no model", "trial", lambda _: stored({"milk": 1})),
]


def manifested(manifest: str) -> Callable[[Path, Target], None]:
    return lambda folder, _: pair(folder, stored(linear(1.0)), manifest)


def model_link(folder: Path, target: Target) -> None:
    pair(folder, b"")
    (folder / f"{MODEL}.joblib").unlink()
    (folder / f"{MODEL}.joblib").symlink_to(target.secret)


def status_link(folder: Path, target: Target) -> None:
    """The node writes a refusal beside the pair: through this link it would write elsewhere."""
    folder.mkdir(parents=True)
    (folder / f"{MODEL}.status.json").symlink_to(target.secret)
    (folder / f".{MODEL}.status.json").symlink_to(target.secret)
    pair(folder, stored({"milk": 1}))


def pipe(folder: Path, _: Target) -> None:
    folder.mkdir(parents=True)
    os.mkfifo(folder / f"{MODEL}.joblib")
    os.mkfifo(folder / f"{MODEL}.toml")
    os.mkfifo(folder / "tenant.toml")


def folders_for_files(folder: Path, _: Target) -> None:
    for name in (f"{MODEL}.joblib", f"{MODEL}.toml", "tenant.toml", f"{MODEL}.status.json"):
        (folder / name).mkdir(parents=True)


def linked_folder(folder: Path, target: Target) -> None:
    """A tenant that is a link to a folder outside."""
    elsewhere = Path(target.outside).parent / "elsewhere"
    pair(elsewhere, stored(linear(1.0)))
    folder.symlink_to(elsewhere)


def odd_names(folder: Path, _: Target) -> None:
    folder.mkdir(parents=True)
    for name in (b"..toml", b"...joblib", b"\xff\xfe.toml", b"\x1b[2J.joblib", b"a b.toml", b"x" * 200 + b".toml"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"x")


def many_files(folder: Path, _: Target) -> None:
    folder.mkdir(parents=True)
    for number in range(6000):
        (folder / f"n{number}.toml").touch()


def rewritten(folder: Path, target: Target) -> None:
    for number in range(40):
        pair(folder, evaluated(program(f"raise ValueError({number})", target, at_load=True)))


DROPPED = [
    dropped("links its model file elsewhere", "regular files only", "ignored", model_link),
    dropped("links its status file elsewhere", "status is renamed in", "refused", status_link),
    dropped("has pipes for files", "regular files only", "ignored", pipe),
    dropped("is a link to a folder elsewhere", "own folders only", "ignored", linked_folder),
    dropped("has thousands of files", "bounded scan", "ignored", many_files),
    dropped("is rewritten again and again", "settling, trial", "refused", rewritten),
    dropped(
        "has a manifest of ten thousand features",
        "bounded features",
        "refused",
        manifested(MANIFEST + "".join(f'f{number} = "event.amount"\n' for number in range(10_000))),
    ),
    dropped("has a manifest of nested expressions", "bounded depth", "refused",
            manifested(MANIFEST + f'deep = "{"(" * 2000}event.amount{")" * 2000}"\n')),
]  # fmt: skip
