"""The list itself: exact, sorted, resolvable here, and without what could be turned against us."""

from __future__ import annotations

import io
import pickle
from importlib import resources

import numpy as np
import pytest
from sklearn.utils import all_estimators

from node.kernel.errors import ModelRefused
from tenants.unpickle import LIBRARIES, Allowlist, load_model, parse_line, read_list

FORBIDDEN_PACKAGES = {
    "importlib",
    "io",
    "joblib",
    "os",
    "operator",
    "pandas",
    "pathlib",
    "pickle",
    "posix",
    "re",
    "runpy",
}
FORBIDDEN_PACKAGES |= {"shutil", "socket", "subprocess", "sys", "tempfile", "types", "ctypes", "copyreg", "cloudpickle"}
FORBIDDEN_MODULES = ("scipy.stats", "sklearn.datasets", "numpy.testing", "numpy.f2py", "numpy.ctypeslib", "numpy.lib")
FORBIDDEN_NAMES = {"eval", "exec", "getattr", "setattr", "open", "compile", "vectorize", "frompyfunc", "load", "memmap"}
ENTRIES = read_list(resources.files("tenants").joinpath("allowlist.txt").read_text("utf-8"))


def test_each_line_is_there_once_and_sorted() -> None:
    lines = [f"{entry.module} {entry.name}{' call' if entry.call else ''}" for entry in ENTRIES]
    assert lines == sorted(lines)
    assert len({(entry.module, entry.name) for entry in ENTRIES}) == len(ENTRIES) > 900


def test_nothing_dangerous_is_on_it() -> None:
    for entry in ENTRIES:
        package = entry.module.partition(".")[0]
        harmless = (entry.module, entry.name) == ("joblib.numpy_pickle", "NumpyArrayWrapper")
        assert harmless or package not in FORBIDDEN_PACKAGES, entry
        assert not entry.module.startswith(FORBIDDEN_MODULES), entry
        assert entry.name not in FORBIDDEN_NAMES, entry
        assert "." not in entry.name, entry
    functools = [entry.name for entry in ENTRIES if entry.module == "functools"]
    assert functools == ["partial"]  # which a stand-in answers


def test_calls_are_few() -> None:
    assert sum(entry.call for entry in ENTRIES) < 60
    assert [entry.name for entry in ENTRIES if entry.call and entry.module == "numpy"] == ["dtype"]


def test_every_estimator_is_on_it() -> None:
    listed = {(entry.module, entry.name) for entry in ENTRIES}
    assert {(cls.__module__, cls.__name__) for _, cls in all_estimators()} <= listed


def test_libraries_are_off_by_default() -> None:
    on = Allowlist.shipped(LIBRARIES)
    off = Allowlist.shipped()
    assert len(off) < len(on)
    assert on.find("xgboost.sklearn", "XGBClassifier").__name__ == "XGBClassifier"
    with pytest.raises(ModelRefused, match="ask the operator"):
        off.find("xgboost.sklearn", "XGBClassifier")


def test_installed_versions_have_nearly_all_of_it() -> None:
    absent = {entry.module for entry in Allowlist.shipped(LIBRARIES).absent}
    assert all(module.startswith(("numpy.core", "numpy._core")) for module in absent), absent


@pytest.mark.parametrize("line", ["", "os", "os system now", "os system call more"])
def test_a_line_of_another_form_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match="is not 'module name'"):
        parse_line(line)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_data_of_every_protocol_comes_back(protocol: int) -> None:
    data = {"a": [1, 2.5, None, True, "ü", b"\xff", (1, 2), {3}, frozenset({4}), 10**30, -0.0], "b": np.float64(1.5)}
    file = io.BytesIO()
    pickle.dump(data, file, protocol)
    assert load_model(file.getvalue(), Allowlist.shipped()) == data
