"""Reads a joblib file with an exact list of globals; used inside a locked-down worker only.

A joblib file is a program for the pickle machine. This reader knows the machine's harmless part: plain data,
NumPy arrays in joblib's own wrapping, and objects of classes that `allowlist.txt` names exactly. A global is
looked up in that list and never imported by name. What the list marks `call` may be called while reading; all
else may only be instantiated without its `__init__`, or referred to: nor is it called where it takes the place of
a method that the machine itself calls.
"""

from __future__ import annotations

import _compat_pickle
import functools
import importlib
import io
import math
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar, cast

import numpy as np
from joblib.compressor import _COMPRESSORS, _ZFILE_PREFIX
from joblib.numpy_pickle import NumpyArrayWrapper
from sklearn.utils.validation import check_array

from node.kernel.errors import ModelRefused
from node.kernel.limits import MIB, MODEL_UNPACKED_BYTES_MAX

ARRAY_CHUNK_BYTES = 16 * MIB
LIBRARIES = ("xgboost", "lightgbm")
"""Packages whose part of the list is off unless the operator allows them."""


@dataclass(frozen=True, slots=True)
class AllowedGlobal:
    """One line of the list: `module name [call]`."""

    module: str
    name: str
    call: bool

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def parse_line(line: str) -> AllowedGlobal:
    """Raises ValueError when the line is not `module name` or `module name call`."""
    words = line.split()
    if len(words) not in (2, 3) or words[2:] not in ([], ["call"]):
        raise ValueError(f"{line!r} is not 'module name' or 'module name call'; correct it in the list")
    return AllowedGlobal(words[0], words[1], call=len(words) == 3)


def read_list(text: str) -> list[AllowedGlobal]:
    """The entries of a list: one a line, '#' starts a comment."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [parse_line(line) for line in lines if line]


class Allowlist:
    """The globals a model file may name, imported once (in the warm server) and then only looked up.

    An entry that the installed versions lack is left out, so one list serves several of them.
    """

    def __init__(self, entries: Iterable[AllowedGlobal]) -> None:
        self._objects: dict[tuple[str, str], Any] = {}
        self._callable_ids: set[int] = set()
        self.absent: list[AllowedGlobal] = []
        for entry in entries:
            found = _STAND_INS.get((entry.module, entry.name)) or _resolve(entry)
            if found is _ABSENT:
                self.absent.append(entry)
                continue
            self._objects[entry.module, entry.name] = found
            if entry.call:
                self._callable_ids.add(id(found))

    @classmethod
    def shipped(cls, libraries: Iterable[str] = (), extra: Iterable[str] = ()) -> Allowlist:
        """The list beside this file, with the operator's `libraries` switched on and `extra` lines added."""
        wanted = set(libraries)
        text = resources.files("tenants").joinpath("allowlist.txt").read_text("utf-8")
        entries = [
            entry
            for entry in read_list(text)
            if (package := entry.module.partition(".")[0]) not in LIBRARIES or package in wanted
        ]
        return cls([*entries, *(parse_line(line) for line in extra)])

    def __len__(self) -> int:
        return len(self._objects)

    def find(self, module: str, name: str) -> Any:
        """Raises ModelRefused for a global that is not on the list."""
        try:
            return self._objects[module, name]
        except KeyError:
            raise ModelRefused(
                f"the file uses {module}.{name}, which is not on the list of allowed classes and functions; "
                "leave it out of the model, or ask the operator to allow it"
            ) from None

    def may_call(self, function: object) -> bool:
        return id(function) in self._callable_ids


def latin1_bytes(text: str, encoding: str) -> bytes:
    """All that pickles of protocol 2 need of `_codecs.encode`, which else imports codecs by name."""
    if encoding not in ("latin1", "latin-1"):
        raise ModelRefused(f"the file encodes text as {encoding!r}, which pickle never does; store it with joblib.dump")
    return text.encode("latin-1")


class ArrayCheck(functools.partial[Any]):
    """All that scikit-learn's own models need of `functools.partial`: histogram boosting keeps a `check_array` with its
    arguments. A partial of anything else would be a way to call it with arguments of the file's choice."""

    def __new__(cls, function: object) -> ArrayCheck:
        _require_check_array(function)
        return super().__new__(cls, check_array)

    def __setstate__(self, state: Any) -> None:
        _require_check_array(state[0])
        cast("Any", super()).__setstate__(state)


def _require_check_array(function: object) -> None:
    if function is not check_array:
        raise ModelRefused(
            "the file uses functools.partial, of which only scikit-learn's own use is allowed; leave it out"
        )


_STAND_INS: dict[tuple[str, str], object] = {("_codecs", "encode"): latin1_bytes, ("functools", "partial"): ArrayCheck}
_ABSENT = object()


def _resolve(entry: AllowedGlobal) -> Any:
    try:
        found: Any = importlib.import_module(entry.module)
        for part in entry.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return _ABSENT
    return found


class BoundedReader(io.RawIOBase):
    """Counts what a decompressor gives and stops a file that unpacks to more than its bound."""

    def __init__(self, source: io.BufferedIOBase, bytes_max: int) -> None:
        self._source = source
        self._bytes_max = bytes_max
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        self.count += len(data)
        if self.count > self._bytes_max:
            raise ModelRefused(
                f"the file unpacks to more than {self._bytes_max // MIB} MiB; store a smaller model, "
                "or ask the operator for more memory"
            )
        buffer[: len(data)] = data
        return len(data)


def unpacked(model: bytes, bytes_max: int) -> io.BufferedReader:
    """The file's pickle, decompressed as it is read, whichever of joblib's compressors was used."""
    if model.startswith(_ZFILE_PREFIX):
        raise ModelRefused("the file is in joblib's format of before 2016; store it again with a present joblib")
    source: Any = io.BytesIO(model)
    for compressor in _COMPRESSORS.values():
        if model.startswith(compressor.prefix):
            source = compressor.decompressor_file(source)
            break
    return io.BufferedReader(BoundedReader(source, bytes_max), MIB)


_Unpickler: Any = pickle._Unpickler
"""The pure Python one, because joblib's array bytes lie between the opcodes of the stream."""


class RestrictedUnpickler(_Unpickler):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Unpickler.dispatch)

    def __init__(self, file: io.BufferedReader, allowlist: Allowlist, bytes_max: int, nested: bool = False) -> None:
        super().__init__(file)
        self._file = file
        self._allowlist = allowlist
        self._bytes_max = bytes_max
        self._nested = nested

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:
            module, name = _modern_name(module, name)
        return self._allowlist.find(module, name)

    def persistent_load(self, persistent_id: object) -> Any:
        raise ModelRefused("the file refers to objects outside itself (persistent ids); store it with joblib.dump")

    def refuse_opcode(self) -> None:
        raise ModelRefused(
            "the file uses a part of the pickle format that joblib never writes; store it with joblib.dump"
        )

    def load_reduce(self) -> None:
        function = self.stack[-2]
        if not self._allowlist.may_call(function):
            raise ModelRefused(
                f"the file calls {_describe(function)}, which is not on the list of functions to call while loading; "
                "leave it out of the model, or ask the operator to allow it"
            )
        super().load_reduce()

    def load_newobj(self) -> None:
        self._check_class(self.stack[-2])
        super().load_newobj()

    def load_newobj_ex(self) -> None:
        self._check_class(self.stack[-3])
        super().load_newobj_ex()

    def _check_class(self, cls: object) -> None:
        if not isinstance(cls, type):
            raise ModelRefused(
                f"the file instantiates {_describe(cls)}, which is not a class; store it with joblib.dump"
            )

    def load_append(self) -> None:
        _require(self.stack[-2], list, "appends to")
        super().load_append()

    def load_appends(self) -> None:
        _require(self.metastack[-1][-1], list, "appends to")
        super().load_appends()

    def load_additems(self) -> None:
        _require(self.metastack[-1][-1], set, "adds to")
        super().load_additems()

    def load_setitem(self) -> None:
        _require(self.stack[-3], dict, "sets items of")
        super().load_setitem()

    def load_setitems(self) -> None:
        _require(self.metastack[-1][-1], dict, "sets items of")
        super().load_setitems()

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _NOT_BUILT):
            raise ModelRefused(f"the file changes {_describe(target)} itself; store it with joblib.dump")
        _require_state(target, state, _STATES)
        _refuse_special_names(target, state)
        # Of the class alone: what the file has given an object as an attribute is not to be called.
        set_state = getattr(type(target), "__setstate__", None)
        if set_state is None:
            _restore(target, state)
        else:
            set_state(target, state)
        if type(target) is NumpyArrayWrapper:
            self.stack[-1] = self._read_array(vars(target))

    def _read_array(self, wrapper: Mapping[str, Any]) -> Any:
        """The array whose bytes follow in the stream, as joblib.numpy_pickle.NumpyArrayWrapper writes them."""
        dtype, shape = wrapper.get("dtype"), wrapper.get("shape")
        if not isinstance(dtype, np.dtype) or not _is_shape(shape) or self._nested:
            raise ModelRefused("the file holds an array without a usable type or shape; store it with joblib.dump")
        if dtype.hasobject:
            return RestrictedUnpickler(self._file, self._allowlist, self._bytes_max, nested=True).load_array()
        if wrapper.get("numpy_array_alignment_bytes") is not None:
            self._file.read(self._file.read(1)[0])
        count = math.prod(cast("tuple[int, ...]", shape))
        if count * dtype.itemsize > self._bytes_max:
            raise ModelRefused(
                f"the file announces an array of {count} values, more than fits into the tenant's memory"
            )
        array = np.empty(count, dtype=dtype)
        self._fill(array.view(np.uint8).data if count and dtype.itemsize else memoryview(b""))
        array = array.reshape(shape, order="F" if wrapper.get("order") == "F" else "C")
        return array if dtype.isnative else array.astype(dtype.newbyteorder("="))

    def _fill(self, target: memoryview) -> None:
        position = 0
        while position < len(target):
            read = self._file.readinto(target[position : position + ARRAY_CHUNK_BYTES])
            if not read:
                raise EOFError("the file ends inside an array")
            position += read

    def load_array(self) -> Any:
        array = self.load()
        if not isinstance(array, np.ndarray):
            raise ModelRefused(
                "the file holds something else where an array of objects belongs; store it with joblib.dump"
            )
        return array


_STATES = (dict, tuple, list, str, bytes, int, float, bool, types.NoneType)
"""What an object may be restored from: methods of anything else might be the file's own."""
_ATTRIBUTES = (dict, types.NoneType)
"""The same of an object whose class does not do it itself."""


def _require(target: object, kind: type, what: str) -> None:
    """So that the method called is the container's own; listed classes that are dicts count as such."""
    if not (issubclass(type(target), dict) if kind is dict else type(target) is kind):
        raise ModelRefused(
            f"the file {what} {_describe(target)}, which is no {kind.__name__}; store it with joblib.dump"
        )


def _require_state(target: object, state: object, kinds: tuple[type, ...]) -> None:
    if type(state) not in kinds:
        raise ModelRefused(
            f"the file restores {_describe(target)} from {_describe(state)}, which nothing is restored from; "
            "store it with joblib.dump"
        )


def _refuse_special_names(target: object, state: object) -> None:
    """Such as `__class__`, or `__array__`, which is called wherever it is found."""
    for part in state if isinstance(state, tuple) else (state,):
        for name in part if isinstance(part, dict) else ():
            if isinstance(name, str) and name.startswith("__") and name.endswith("__"):
                raise ModelRefused(f"the file sets {name} of {_describe(target)}; store it with joblib.dump")


def _restore(target: Any, state: Any) -> None:
    """What pickle does where the class has no `__setstate__`: attributes, and those in slots."""
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    _require_state(target, attributes, _ATTRIBUTES)
    _require_state(target, slots, _ATTRIBUTES)
    if attributes:
        vars(target).update({sys.intern(name) if type(name) is str else name: attributes[name] for name in attributes})
    for name, value in (slots or {}).items():
        setattr(target, name, value)


_NOT_BUILT = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, np.ufunc)
for _opcode, _method in (
    (pickle.REDUCE, RestrictedUnpickler.load_reduce),
    (pickle.NEWOBJ, RestrictedUnpickler.load_newobj),
    (pickle.NEWOBJ_EX, RestrictedUnpickler.load_newobj_ex),
    (pickle.BUILD, RestrictedUnpickler.load_build),
    (pickle.APPEND, RestrictedUnpickler.load_append),
    (pickle.APPENDS, RestrictedUnpickler.load_appends),
    (pickle.ADDITEMS, RestrictedUnpickler.load_additems),
    (pickle.SETITEM, RestrictedUnpickler.load_setitem),
    (pickle.SETITEMS, RestrictedUnpickler.load_setitems),
    *(
        (opcode, RestrictedUnpickler.refuse_opcode)
        for opcode in (
            pickle.EXT1,
            pickle.EXT2,
            pickle.EXT4,
            pickle.PERSID,
            pickle.BINPERSID,
            pickle.INST,
            pickle.OBJ,
            pickle.NEXT_BUFFER,
            pickle.READONLY_BUFFER,
        )
    ),
):
    RestrictedUnpickler.dispatch[_opcode[0]] = _method


def _modern_name(module: str, name: str) -> tuple[str, str]:
    """Today's name of a global in a file of pickle protocol 0 to 2, which use those of Python 2."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        return _compat_pickle.NAME_MAPPING[module, name]
    return _compat_pickle.IMPORT_MAPPING.get(module, module), name


def _is_shape(shape: object) -> bool:
    return isinstance(shape, tuple) and len(shape) <= 32 and all(type(size) is int and size >= 0 for size in shape)


def _describe(thing: object) -> str:
    """A name for an error message; asks the thing itself for nothing but its class's and own plain name."""
    named = thing if isinstance(thing, _NOT_BUILT) else type(thing)
    return f"{getattr(named, '__module__', '?')}.{getattr(named, '__qualname__', getattr(named, '__name__', '?'))}"


def load_model(model: bytes, allowlist: Allowlist, bytes_max: int = MODEL_UNPACKED_BYTES_MAX) -> Any:
    """The object in a joblib file. Raises ModelRefused, with the reason for the tenant, whatever is wrong with it."""
    try:
        return RestrictedUnpickler(unpacked(model, bytes_max), allowlist, bytes_max).load()
    except ModelRefused:
        raise
    except MemoryError:
        raise ModelRefused("the model needs more memory than the tenant has; store a smaller one") from None
    except RecursionError:
        raise ModelRefused("the file nests objects too deeply; store it with joblib.dump") from None
    except Exception as error:
        raise ModelRefused(
            f"the file is damaged or was not stored with joblib.dump ({type(error).__name__}: {error}); store it again"
        ) from error
