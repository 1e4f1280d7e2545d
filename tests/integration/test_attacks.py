"""Files that attack whoever loads them. Each is refused for a stated reason, does nothing, and harms no later model."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import pickle
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
import numpy as np
import pytest
import pytest_asyncio
from joblib.numpy_pickle import NumpyArrayWrapper
from joblib.numpy_pickle_compat import NDArrayWrapper, ZNDArrayWrapper
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.validation import check_array
from worker_support import MEMORY_BYTES, rows_of, stored, version_of, warm_server

from node.kernel.errors import ModelRefused
from node.kernel.limits import MIB
from tenants.workers import WarmServer, WorkerProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

FEATURES = ("a", "b")
GOOD = LogisticRegression().fit([[0.0, 0.0], [1.0, 1.0]], [0, 1])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[WarmServer]:
    async with warm_server() as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(server: WarmServer) -> WorkerProcess:
    return await server.spawn("attacker", MEMORY_BYTES)


class Reduced:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def called(module: str, name: str, argument: str, protocol: int = 4) -> bytes:
    """A pickle, written opcode by opcode, that calls a global with one text."""
    if protocol < 4:
        head = b"\x80" + bytes([protocol]) + f"c{module}\n{name}\n".encode()
    else:
        head = b"\x80\x04" + short(module) + short(name) + b"\x93"
    return head + b"X" + struct.pack("<I", len(argument)) + argument.encode() + b"\x85R."


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def command(marker: Path) -> str:
    return f"touch {marker}"


def object_array(payload: Any) -> Any:
    array = np.empty(2, dtype=object)
    array[:] = [payload, 1]
    return array


def with_wrapper(wrapper: Any, tail: bytes) -> bytes:
    """A wrapper object as joblib writes one, followed by bytes of the attacker's choice."""
    return pickle.dumps(wrapper, protocol=2)[:-1] + tail + b"."


def python(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def lambda_model(marker: Path) -> Any:
    path = str(marker)
    return FunctionTransformer(lambda rows: open(path, "w"))


def by_reduce(function: Any) -> Callable[[Path], bytes]:
    return lambda marker: stored(Reduced(function, command(marker)))


def _wrapper(dtype: Any, shape: Any = (2,)) -> NumpyArrayWrapper:
    return NumpyArrayWrapper(np.ndarray, shape, "C", dtype)


def _popen(marker: Path) -> bytes:
    import subprocess

    return stored(Reduced(subprocess.Popen, ["touch", str(marker)]))


def _import_module(marker: Path) -> bytes:
    import importlib

    return stored(Reduced(importlib.import_module, "antigravity"))


def _partial_state(marker: Path) -> bytes:
    """A harmless partial whose state then names another function."""
    head = pickle.dumps(functools.partial, protocol=2)[:-1] + pickle.dumps(check_array, protocol=2)[2:-1] + b"\x85R"
    return head + pickle.dumps((LogisticRegression, (), {}, None), protocol=2)[2:-1] + b"b."


def _partial(marker: Path) -> bytes:
    import os

    return stored(Reduced(functools.partial(os.system, command(marker))))


def _system() -> Any:
    import os

    return os.system


def instance(module: str, name: str) -> bytes:
    return short(module) + short(name) + b"\x93)\x81"


LINK = instance("sklearn._loss.link", "LogitLink")
"""Of a class without a `__setstate__`."""


def borrowing(attribute: str) -> bytes:
    """An object with `bytes`, which may not be called, as an attribute of its own."""
    return LINK + b"}" + short(attribute) + short("builtins") + short("bytes") + b"\x93sb"


def file_of(opcodes: bytes) -> bytes:
    return b"\x80\x04" + opcodes + b"."


Attack = tuple[str, Callable[[Path], bytes], str]
ATTACKS: list[Attack] = [
    ("os.system by reduce", by_reduce(_system()), "posix.system"),
    ("os.system by name", lambda m: called("os", "system", command(m)), "os.system"),
    ("os.system in protocol 0 names", lambda m: called("posix", "system", command(m), 2), "posix.system"),
    ("builtins.eval", lambda m: stored(Reduced(eval, python(m))), "builtins.eval"),
    ("builtins.exec", lambda m: stored(Reduced(exec, python(m))), "builtins.exec"),
    ("Python 2's __builtin__", lambda m: called("__builtin__", "eval", python(m), 2), "builtins.eval"),
    ("builtins.__import__", lambda m: called("builtins", "__import__", "antigravity"), "builtins.__import__"),
    ("builtins.getattr", lambda m: stored(Reduced(getattr, GOOD, "fit")), "builtins.getattr"),
    (
        "payload after the first array",
        lambda m: stored([np.arange(9.0), Reduced(_system(), command(m))]),
        "posix.system",
    ),
    ("payload in an object array", lambda m: stored(object_array(Reduced(_system(), command(m)))), "posix.system"),
    (
        "object array inside an estimator",
        lambda m: stored(_poisoned(object_array(Reduced(_system(), command(m))))),
        "posix.system",
    ),
    (
        "wrapper that announces objects",
        lambda m: with_wrapper(_wrapper(np.dtype(object)), called("os", "system", command(m))),
        "os.system",
    ),
    (
        "wrapper inside an object array",
        lambda m: with_wrapper(_wrapper(np.dtype(object)), pickle.dumps(_wrapper(np.dtype(object)))),
        "an array without a usable type",
    ),
    ("NDArrayWrapper file name", lambda m: stored(NDArrayWrapper(str(m), np.ndarray)), "NDArrayWrapper"),
    ("ZNDArrayWrapper file name", lambda m: stored(ZNDArrayWrapper(str(m), (), ())), "ZNDArrayWrapper"),
    (
        "joblib's format of before 2016",
        lambda m: b"ZF" + b"0x10".ljust(20) + zlib.compress(called("os", "system", "x")),
        "2016",
    ),
    (
        "attribute walk through an allowed module",
        lambda m: called("sklearn.preprocessing._data", "np.f2py.os.system", command(m)),
        "sklearn.preprocessing._data.np.f2py.os.system",
    ),
    (
        "attribute walk through an allowed class",
        lambda m: called("numpy", "ndarray.__reduce__.__globals__", command(m)),
        "numpy.ndarray.__reduce__.__globals__",
    ),
    (
        "numpy's runstring",
        lambda m: called("numpy.testing._private.utils", "runstring", python(m)),
        "numpy.testing._private.utils.runstring",
    ),
    ("numpy.f2py", lambda m: called("numpy.f2py.crackfortran", "myeval", python(m)), "numpy.f2py.crackfortran.myeval"),
    ("numpy.load", lambda m: stored(Reduced(np.load, str(m))), "numpy.load"),
    ("numpy.memmap", lambda m: stored(Reduced(np.memmap, str(m), "u1", "w+")), "numpy.memmap"),
    ("joblib.load", lambda m: stored(Reduced(joblib.load, str(m))), "joblib.numpy_pickle.load"),
    ("FunctionTransformer of os.system", lambda m: stored(FunctionTransformer(_system())), "posix.system"),
    ("lambda by cloudpickle", lambda m: cloudpickle.dumps(lambda_model(m)), "cloudpickle"),
    ("importlib", _import_module, "importlib.import_module"),
    ("subprocess.Popen", _popen, "subprocess.Popen"),
    ("functools.partial of os.system", _partial, "posix.system"),
    (
        "functools.partial of a class",
        lambda m: stored(Reduced(functools.partial, LogisticRegression)),
        "functools.partial",
    ),
    ("functools.partial by state", _partial_state, "functools.partial"),
    ("scipy's distributions run their shapes", lambda m: stored(_distribution(m)), "scipy.stats"),
    ("copyreg.__newobj__", lambda m: called("copyreg", "_reconstructor", "x"), "copyreg._reconstructor"),
    ("copyreg.add_extension", lambda m: called("copyreg", "add_extension", "os"), "copyreg.add_extension"),
    ("extension registry 1", lambda m: b"\x80\x04\x82\x01.", "part of the pickle format"),
    ("extension registry 4", lambda m: b"\x80\x04\x84\x01\x00\x00\x00.", "part of the pickle format"),
    ("persistent id", lambda m: b"\x80\x02X\x01\x00\x00\x00aQ.", "part of the pickle format"),
    ("INST opcode", lambda m: b"(X\x01\x00\x00\x00aios\nsystem\n.", "part of the pickle format"),
    ("calling a class that is only to be named", lambda m: called("builtins", "str", "x"), "builtins.str"),
    ("calling an allowed function", lambda m: called("sklearn.metrics.pairwise", "rbf_kernel", "x"), "rbf_kernel"),
    ("calling an instance", lambda m: b"\x80\x04" + short("text") + b"\x85)R.", "builtins.tuple"),
    (
        "state for a class",
        lambda m: b"\x80\x04" + short("builtins") + short("set") + b"\x93}b.",
        "changes builtins.set",
    ),
    (
        "codec by name",
        lambda m: b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
        "encodes text as 'rot13'",
    ),
    ("append of an object's own", lambda m: file_of(borrowing("append") + b"K\x05a"), "appends to"),
    ("extend of an object's own", lambda m: file_of(borrowing("extend") + b"(K\x05e"), "appends to"),
    ("append of an object's own, many", lambda m: file_of(borrowing("append") + b"(K\x05K\x06e"), "appends to"),
    ("add of an object's own", lambda m: file_of(borrowing("add") + b"(K\x05\x90"), "adds to"),
    ("an item of what is no dict", lambda m: file_of(LINK + b"K\x01K\x05s"), "sets items of"),
    ("items of what is no dict", lambda m: file_of(LINK + b"(K\x01K\x05u"), "sets items of"),
    ("__setstate__ of an object's own", lambda m: file_of(borrowing("__setstate__") + b"K\x05b"), "sets __setstate__"),
    (
        "__class__ by the state of slots",
        lambda m: file_of(LINK + b"N}" + short("__class__") + short("builtins") + short("bytes") + b"\x93s\x86b"),
        "sets __class__",
    ),
    ("items of a state", lambda m: file_of(LINK + borrowing("items") + b"b"), "from sklearn._loss.link.LogitLink"),
    (
        "items of a slot's state",
        lambda m: file_of(LINK + b"N" + borrowing("items") + b"\x86b"),
        "from sklearn._loss.link.LogitLink",
    ),
    (
        "pop of a state",
        lambda m: file_of(instance("sklearn.linear_model._logistic", "LogisticRegression") + borrowing("pop") + b"b"),
        "from sklearn._loss.link.LogitLink",
    ),
    ("array that is not there", lambda m: with_wrapper(_wrapper(np.dtype("f8"), (10**12,)), b""), "more than fits"),
    ("negative shape", lambda m: with_wrapper(_wrapper(np.dtype("f8"), (-1,)), b""), "usable type or shape"),
    ("truncated file", lambda m: stored(GOOD)[:-20], "damaged"),
    ("no pickle at all", lambda m: b"hello, world", "damaged"),
    ("empty file", lambda m: b"", "damaged"),
    ("broken compression", lambda m: stored(GOOD, ("zlib", 3))[:-9], "damaged"),
    ("not an estimator", lambda m: stored({"a": 1}), "has no predict_proba"),
]
COMPRESSORS = {"zlib": zlib.compress, "gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def _poisoned(array: Any) -> Any:
    model = LogisticRegression().fit([[0.0, 0.0], [1.0, 1.0]], [0, 1])
    model.classes_ = array
    return model


def _distribution(marker: Path) -> Any:
    from scipy.stats import norm

    return norm(0, 1)


async def assert_works(worker: WorkerProcess) -> None:
    version = version_of(FEATURES, number=7)
    await worker.load(version, stored(GOOD))
    outputs = await worker.call(version.version, rows_of(FEATURES, [[1.0, 1.0]]), 10)
    assert outputs.values[0, 0] == pytest.approx(GOOD.predict_proba([[1.0, 1.0]])[0, 1])
    await worker.unload(version.version)


@pytest.mark.parametrize(("build", "reason"), [attack[1:] for attack in ATTACKS], ids=[attack[0] for attack in ATTACKS])
async def test_is_refused_and_does_nothing(
    worker: WorkerProcess, tmp_path: Path, build: Callable[[Path], bytes], reason: str
) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(ModelRefused) as refusal:
        await worker.load(version_of(FEATURES), build(marker))
    assert reason in str(refusal.value)
    assert not marker.exists()
    await assert_works(worker)


@pytest.mark.parametrize("compressor", COMPRESSORS)
async def test_is_refused_compressed(worker: WorkerProcess, tmp_path: Path, compressor: str) -> None:
    attack = stored([np.arange(9.0), Reduced(_system(), command(tmp_path / "marker"))])
    with pytest.raises(ModelRefused, match=r"posix\.system"):
        await worker.load(version_of(FEATURES), COMPRESSORS[compressor](attack))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("attack", [attack[:2] for attack in ATTACKS[:6]], ids=[attack[0] for attack in ATTACKS[:6]])
async def test_joblib_itself_runs_the_same_file(tmp_path: Path, attack: tuple[str, Callable[[Path], bytes]]) -> None:
    """Shows that the files above are attacks, and not merely broken."""
    marker = tmp_path / "marker"
    joblib.load(io.BytesIO(attack[1](marker)))
    assert marker.exists()


async def test_bomb_is_refused(server: WarmServer) -> None:
    worker = await server.spawn("bomber", 64 * MIB)
    for compressor in ("zlib", "gzip", "bz2", "xz"):
        with pytest.raises(ModelRefused, match=r"unpacks to more than|announces an array|more memory"):
            await worker.load(version_of(FEATURES), BOMBS[compressor])
    await assert_works(worker)
    await worker.close()


def _bomb() -> bytes:
    """72 MiB of one text: 8-byte length, then nothing but zeros."""
    size = 72 * MIB
    return b"\x80\x04\x8e" + struct.pack("<Q", size) + bytes(size) + b"."


BOMBS = {name: compressor(_bomb()) for name, compressor in COMPRESSORS.items()}


async def test_deep_nesting_does_no_harm(server: WarmServer) -> None:
    worker = await server.spawn("nester", MEMORY_BYTES)
    deep = b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b"."
    with pytest.raises(ModelRefused, match="has no predict_proba"):
        await worker.load(version_of(FEATURES), deep)
    await assert_works(worker)
    await worker.close()


async def test_endless_load_is_ended(server: WarmServer) -> None:
    worker = await server.spawn("looper", MEMORY_BYTES)
    slow = zlib.compress(b"\x80\x04" + b"N0" * 10_000_000 + b"N.")
    with pytest.raises(ModelRefused, match=r"took longer than 0\.5 s"):
        await worker.load(version_of(FEATURES), slow, deadline_seconds=0.5)
    await worker.lost.wait()
    fresh = await server.spawn("looper", MEMORY_BYTES)
    await assert_works(fresh)
    await fresh.close()
