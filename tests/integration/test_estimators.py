"""Every estimator of scikit-learn that can predict, transform or score runs in a sandboxed worker.

It gives there what it gives here, fitted on arrays and on data frames, compressed each way.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator
from itertools import cycle
from typing import Any

import estimator_corpus
import numpy as np
import pytest
import pytest_asyncio
from estimator_corpus import SKIPPED, Case, fitted
from sklearn.utils import all_estimators
from worker_support import COMPRESSIONS, MEMORY_BYTES, rows_of, stored, version_of, warm_server

from tenants.sandbox import SandboxSettings
from tenants.workers import WorkerProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

ESTIMATORS = dict(all_estimators())
LIBRARIES = frozenset({"xgboost", "lightgbm"})
WITHIN = 1e-7
"""A distance of nearly 0 is the root of a rounding error, and rounding depends on the number of BLAS threads."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker() -> AsyncIterator[WorkerProcess]:
    async with warm_server(SandboxSettings(libraries=LIBRARIES)) as server:
        yield await server.spawn("grocery", MEMORY_BYTES)


def columns(given: Any) -> Any:
    """A local output as the worker gives it, written down a second time on purpose."""
    if isinstance(given, list):
        return np.hstack(given)
    dense = given.toarray() if hasattr(given, "toarray") else np.asarray(given)
    return dense.reshape(len(dense), -1).astype(float)


async def compare(worker: WorkerProcess, case: Case, compressions: Any) -> None:
    for method in case.methods:
        expected = columns(getattr(case.model, method)(case.given))
        outputs = tuple(f"o{index}" for index in range(expected.shape[1]))
        version = version_of(case.names, outputs, method)
        await worker.load(version, stored(case.model, next(compressions)), text_features=tuple(case.texts))
        got = await worker.call(version.version, rows_of(case.names, case.numbers, case.texts), 30)
        assert got.values.shape == expected.shape
        assert set(got.errors) == set(np.flatnonzero(~np.isfinite(expected).all(axis=1)).tolist())
        np.testing.assert_allclose(got.values, expected, rtol=WITHIN, atol=WITHIN, err_msg=method)
        await worker.unload(version.version)


@pytest.fixture(scope="module")
def compressions() -> Any:
    return cycle(COMPRESSIONS)


@pytest.mark.parametrize("frame", [False, True], ids=["array", "frame"])
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in SKIPPED])
async def test_loads_and_gives_the_same(worker: WorkerProcess, compressions: Any, name: str, frame: bool) -> None:
    cls = ESTIMATORS[name]
    if name != "FrozenEstimator" and not any(hasattr(cls, method) for method in estimator_corpus.METHODS):
        assert not hasattr(cls, "score")  # it only describes the rows it was fitted on
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = fitted(name, cls, frame)
        assert case.methods
        await compare(worker, case, compressions)


async def test_common_settings(worker: WorkerProcess, compressions: Any) -> None:
    frame = estimator_corpus.shop_frame(estimator_corpus.ROWS)
    numbers = np.column_stack([np.full(len(frame), np.nan), frame["amount"], frame["age"]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in estimator_corpus.further_models():
            if "city" not in getattr(model, "feature_names_in_", ()):
                await compare(worker, Case("", model, estimator_corpus.X, estimator_corpus.X), compressions)
                continue
            version = version_of(("city", "amount", "age"))
            await worker.load(version, stored(model), text_features=("city",))
            plain = "none" if not hasattr(model, "steps") else None
            city: list[str | None] = [
                plain if isinstance(text, float) or text is None else text for text in frame["city"]
            ]
            given = frame.assign(city=city)
            got = await worker.call(version.version, rows_of(version.features, numbers, {"city": city}), 30)
            np.testing.assert_allclose(got.values[:, 0], model.predict_proba(given)[:, -1], rtol=WITHIN)


async def test_only_one_estimator_is_skipped() -> None:
    assert set(SKIPPED) == {"PatchExtractor"}


async def test_xgboost_and_lightgbm(worker: WorkerProcess, compressions: Any) -> None:
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in estimator_corpus.library_models():
            case = Case(type(model).__name__, model, estimator_corpus.X, estimator_corpus.X)
            await compare(worker, case, compressions)
            count += 1
    assert count == 16
