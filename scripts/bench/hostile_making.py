"""How a hostile or broken model is written down, and becomes the files a tenant would drop.

Most are code. No model file can hold any, for the reader of model files knows an exact list of classes; so the node
under attack is set up with ALLOW_GLOBALS, which lets files call `eval`: that stands for a hole in that reader, and
what is left to hold the code is the sandbox. Code prints a line for each thing it attempts, with REACHED if it got
what it wanted. Code that is to get past the trial waits for an event whose amount is TRIGGER.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import joblib
import numpy as np
from sklearn.linear_model import LinearRegression

ALLOW_GLOBALS = ("builtins.eval",)
TRIGGER = 666.0
REACHED, BLOCKED = "REACHED", "blocked"
MODEL = "m"
MANIFEST = (
    'on = ["transaction"]\nmethod = "predict"\noutput = "score"\nttl = "30d"\ndeadline = "1s"\n'
    '[features]\namount = "event.amount"\n'
)

Told: TypeAlias = Literal["refused", "failed", "lost", "printed", "live", "ignored"]
"""Where a tenant and an operator read of it: `refused` in the model's status, `failed` rows counted for the model,
`lost` workers counted for the tenant, `printed` in the tenant's log; `live`: it does its work, slowly or not, and
harms nobody; `ignored`: what is no pair of files of a model is not looked at."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the attacks are aimed at. None of the addresses may be reached, none of the files read or changed."""

    node: int
    others: tuple[int, ...]
    """Processes of other tenants."""
    tcp: int
    udp: int
    unix: str
    abstract: str
    secret: str
    outside: str
    """A folder that anybody may write to."""
    environment: str
    """A name in the node's environment that no worker's has."""


@dataclass(frozen=True, slots=True)
class Case:
    """`write` puts the files into the tenant's folder; `stopped_by` is what is expected to hold it, for people."""

    name: str
    stopped_by: str
    told: Told
    write: Callable[[Path, Target], None]
    source: str = ""
    """Of a case that is code."""
    at_load: bool = False
    patient: bool = False
    """Takes long until it is stopped."""


# --- what is written ------------------------------------------------------------------------------------------------


def pair(folder: Path, model: bytes, manifest: str = MANIFEST, name: str = MODEL) -> None:
    """Both files of a model, renamed in as a tenant would."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".toml", manifest.encode()), (".joblib", model)):
        made = folder / f".{name}{suffix}"
        made.write_bytes(content)
        made.rename(folder / f"{name}{suffix}")


def stored(model: Any) -> bytes:
    stream = io.BytesIO()
    joblib.dump(model, stream)
    return stream.getvalue()


def linear(*weights: float, offset: float = 0.0) -> LinearRegression:
    """A model whose output is the sum of its columns, each times its weight, plus `offset`: easy to foretell."""
    model = LinearRegression()
    model.coef_, model.intercept_ = np.array(weights, np.float64), offset
    model.n_features_in_, model.rank_ = len(weights), len(weights)
    return model


PRELUDE = """
import ctypes, mmap, os, signal, socket, stat, sys, time
import numpy as np
TARGET = {target}
TRIGGER = {trigger}
libc = ctypes.CDLL(None, use_errno=True)

def attempt(what, action):
    try:
        action()
    except BaseException as error:
        print(f"{{what}}: blocked: {{type(error).__name__}}: {{error}}", flush=True)
    else:
        print(f"{{what}}: REACHED", flush=True)

def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def channel():
    for descriptor in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                return descriptor
        except OSError:
            pass
    raise OSError("no socket is open")

def read(path):
    with open(path, "rb") as file:
        file.read(16)

class Model:
    def predict(self, rows):
        values = rows[:, 0] * 0.0
        if {always} or TRIGGER in rows[:, 0].tolist():
            found = attack(rows)
            values = values if found is None else found
        return values

def attack(rows):
{attack}
"""
LOAD = "\nattack(np.zeros((1, 1)))\nmodel = Model()\n"
LATER = "\nmodel = Model()\n"


def program(source: str, target: Target, at_load: bool, always: bool = False) -> str:
    body = "\n".join(f"    {line}" for line in source.strip("\n").splitlines())
    text = PRELUDE.format(target=repr(asdict(target)), trigger=TRIGGER, attack=body, always=always and not at_load)
    return text + (LOAD if at_load else LATER)


def evaluated(source: str) -> bytes:
    """A model file that is a call of eval, which runs `source` and gives what that named `model`."""
    expression = f"(lambda names: (exec({source!r}, names), names['model'])[1])({{}})".encode()
    named = b"\x8c\x08builtins\x8c\x04eval\x93"
    return b"\x80\x04" + named + b"X" + struct.pack("<I", len(expression)) + expression + b"\x85R."


def code(
    name: str, stopped_by: str, told: Told, source: str, at_load: bool = False, always: bool = False,
    patient: bool = False,
) -> Case:  # fmt: skip
    def write(folder: Path, target: Target) -> None:
        pair(folder, evaluated(program(source, target, at_load, always)))

    return Case(name, stopped_by, told, write, source, at_load, patient)


def file(name: str, stopped_by: str, model: Callable[[Target], bytes], told: Told = "refused") -> Case:
    return Case(name, stopped_by, told, lambda folder, target: pair(folder, model(target)))


def dropped(name: str, stopped_by: str, told: Told, write: Callable[[Path, Target], None]) -> Case:
    return Case(name, stopped_by, told, write)
