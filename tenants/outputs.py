"""How what a model's method gives becomes float64 columns, one for each output the manifest names.

`predict_proba` with one output is the last column, with several all columns; `predict` of text classes is the
index into the sorted classes, else the value; `transform` is dense columns; the others are what they give.
Runs in a worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from node.kernel.errors import CallFailed, ModelRefused
from node.kernel.types import Floats
from tenants.inputs import ModelInput, Rows
from tenants.messages import ROW_REASON_CHARACTERS_MAX, labels_problem, row_errors, shorten

METHODS = (
    "predict_proba",
    "predict",
    "transform",
    "decision_function",
    "score_samples",
    "predict_log_proba",
    "mahalanobis",
)
_NO_LABEL = "output {!r} is not one of the model's classes"


class Outputs:
    """One model's method, called with rows of any number.

    Raises ModelRefused when the model has no such method, or text classes that are too long or too many.
    """

    def __init__(self, model: Any, method: str, names: tuple[str, ...]) -> None:
        self._names = names
        self._probabilities = method in ("predict_proba", "predict_log_proba")
        self._method = _method_of(model, method)
        self._indices = _class_indices(model) if method == "predict" else []
        self.labels: tuple[str, ...] = tuple(self._indices[0]) if len(self._indices) == 1 else ()
        if problem := labels_problem(self.labels):
            raise ModelRefused(problem)

    def of(self, model_input: ModelInput, rows: Rows) -> tuple[Floats, dict[int, str]]:
        """Values [rows, outputs] and the rows without a usable output. Raises CallFailed."""
        try:
            given = self._method(model_input.of(rows))
            values, errors = self._columns(given, len(rows))
        except CallFailed:
            raise
        except Exception as error:
            raise CallFailed(shorten(f"the model raised {type(error).__name__}: {error}")) from error
        if values.shape != (len(rows), len(self._names)):
            raise CallFailed(
                f"the model gave {values.shape[0]} rows of {values.shape[1]} outputs for {len(rows)} rows, "
                f"the manifest names {len(self._names)}; name as many outputs as the model gives"
            )
        return values, row_errors(values, self._names, errors)

    def _columns(self, given: Any, rows: int) -> tuple[Floats, dict[int, str]]:
        if self._probabilities:
            return self._numbers(self._probability_columns(given, rows)), {}
        matrix = _matrix(given, rows)
        if matrix.dtype.kind in "OUST" and self._indices:
            return self._label_columns(matrix)
        return self._numbers(matrix), {}

    def _probability_columns(self, given: Any, rows: int) -> Any:
        if isinstance(given, list):  # one array for each target
            parts = [_matrix(part, rows) for part in given]
            if len(self._names) == len(parts):
                return np.hstack([part[:, -1:] for part in parts])
            return np.hstack(parts)
        matrix = _matrix(given, rows)
        return matrix[:, -1:] if len(self._names) == 1 else matrix

    def _numbers(self, matrix: Any) -> Floats:
        try:
            return np.ascontiguousarray(matrix, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise CallFailed(shorten(f"the model's output is not numbers: {error}")) from error

    def _label_columns(self, matrix: Any) -> tuple[Floats, dict[int, str]]:
        values = np.full(matrix.shape, np.nan)
        errors: dict[int, str] = {}
        for column, name in enumerate(self._names[: matrix.shape[1]]):
            indices = self._indices[min(column, len(self._indices) - 1)]
            for row, label in enumerate(matrix[:, column].tolist()):
                index = indices.get(str(label))
                if index is None:
                    errors[row] = shorten(_NO_LABEL.format(name), ROW_REASON_CHARACTERS_MAX)
                else:
                    values[row, column] = index
        return values, errors


def _method_of(model: Any, method: str) -> Callable[[Any], Any]:
    if method not in METHODS:
        raise ModelRefused(f"method {method!r} can't be called; choose one of {', '.join(METHODS)}")
    try:
        found = getattr(model, method)
    except Exception as error:  # scikit-learn's conditional methods raise what their check raised
        has = [name for name in METHODS if _has(model, name)]
        raise ModelRefused(
            shorten(f"{type(model).__name__} has no {method} ({error}); it has {', '.join(has) or 'no method we call'}")
        ) from error
    if not callable(found):
        raise ModelRefused(f"{method} of {type(model).__name__} can't be called; store the fitted estimator itself")
    return found  # type: ignore[no-any-return]


def _has(model: Any, name: str) -> bool:
    try:
        return callable(getattr(model, name))
    except Exception:
        return False


def _class_indices(model: Any) -> list[dict[str, int]]:
    """For each target whose classes are texts: class -> its place; empty when the classes are numbers."""
    try:
        classes = model.classes_
    except Exception:  # not a classifier, or a pipeline without one
        return []
    targets = classes if isinstance(classes, list) else [classes]
    arrays = [np.asarray(target) for target in targets]
    if not any(
        array.dtype.kind in "OUST" and any(isinstance(label, str) for label in array.tolist()) for array in arrays
    ):
        return []
    return [{str(label): index for index, label in enumerate(array.ravel().tolist())} for array in arrays]


def _matrix(given: Any, rows: int) -> Any:
    """A dense array of two dimensions. Raises CallFailed when there are more."""
    dense = given.toarray() if hasattr(given, "toarray") else np.asarray(given)
    if dense.ndim == 1:
        return dense.reshape(1, -1) if rows == 1 else dense.reshape(-1, 1)  # some flatten the answer to one row
    if dense.ndim != 2:
        raise CallFailed(f"the model gave an array of {dense.ndim} dimensions; only rows of numbers can be stored")
    return dense
