"""How feature rows become what a model was fitted on: an array where that works, a data frame where it must be.

Runs in a worker. An array is passed wherever the model takes one, because building a data frame costs more than
most models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from node.kernel.errors import ModelRefused
from node.kernel.types import Floats

Form: TypeAlias = Literal["array", "frame", "objects", "vector", "lists", "texts", "text_lists", "records"]


@dataclass(frozen=True, slots=True)
class Rows:
    """`numbers` is float64 [rows, columns]; a text feature's column there is NaN and its values are in `texts`."""

    numbers: Floats
    texts: Mapping[str, list[str | None]]

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, slots=True)
class ModelInput:
    """`names` are the manifest's features in order, `form` is how the model takes them."""

    names: tuple[str, ...]
    form: Form
    feature_names: tuple[str, ...] | None
    feature_count: int | None

    def of(self, rows: Rows) -> Any:
        """What the model's method is called with."""
        if self.form == "array":
            return rows.numbers
        if self.form == "frame":
            return self._frame(rows)
        if self.form == "vector":
            return rows.numbers[:, 0]
        if self.form == "lists":
            return rows.numbers.tolist()
        if self.form == "objects":
            return self._objects(rows)
        if self.form == "records":
            return [dict(zip(self.names, row, strict=True)) for row in self._objects(rows).tolist()]
        column = [text or "" for text in rows.texts.get(self.names[0], [None] * len(rows))]
        return column if self.form == "texts" else [[text] for text in column]

    def _frame(self, rows: Rows) -> Any:
        import pandas as pd

        if not rows.texts:
            return pd.DataFrame(rows.numbers, columns=list(self.names), copy=False)
        columns = {
            name: np.array(rows.texts[name], dtype=object) if name in rows.texts else rows.numbers[:, index]
            for index, name in enumerate(self.names)
        }
        return pd.DataFrame(columns, copy=False)

    def _objects(self, rows: Rows) -> Any:
        objects = rows.numbers.astype(object)
        for index, name in enumerate(self.names):
            if name in rows.texts:
                objects[:, index] = rows.texts[name]
        return objects


def innermost(model: Any) -> Any:
    """The estimator that meets the rows first: the best of a search, the first step of a pipeline."""
    for _ in range(8):
        if hasattr(model, "best_estimator_"):
            model = model.best_estimator_
        elif (steps := getattr(model, "steps", None)) and isinstance(steps, list):
            model = steps[0][1]
        else:
            break
    return model


def forms(model: Any, texts: bool) -> tuple[Form, ...]:
    """The forms that the model may take rows in, the cheapest first."""
    tags = _input_tags(innermost(model))
    if getattr(tags, "dict", False):
        return ("records",)
    if getattr(tags, "string", False) and not tags.two_d_array:
        return ("texts", "text_lists")
    if tags is not None and not tags.two_d_array:
        return ("vector", "lists", "array")
    return ("frame", "objects") if texts else ("array", "frame")


def _input_tags(model: Any) -> Any:
    from sklearn.utils import get_tags

    try:
        return get_tags(model).input_tags
    except Exception:  # any estimator-like object may stand here; without tags it is taken to want a matrix
        return None


def check_columns(model: Any, names: Sequence[str]) -> tuple[tuple[str, ...] | None, int | None]:
    """The names and number of columns that the model was fitted on, each None where it does not know.

    Raises ModelRefused naming the first difference from the manifest's.
    """
    fitted = getattr(model, "feature_names_in_", None)
    count = getattr(model, "n_features_in_", None)
    if fitted is not None:
        fitted_names = tuple(str(name) for name in fitted)
        _compare_names(fitted_names, tuple(names))
        return fitted_names, len(fitted_names)
    if count is None:
        return None, None
    if int(count) != len(names):
        raise ModelRefused(
            f"the model was fitted on {int(count)} columns, the manifest has {len(names)} features; make them agree"
        )
    return None, int(count)


def _compare_names(fitted: tuple[str, ...], named: tuple[str, ...]) -> None:
    for place, (ours, theirs) in enumerate(zip(named, fitted, strict=False), start=1):
        if ours != theirs:
            raise ModelRefused(
                f"column {place} is {theirs!r} in the model and {ours!r} in the manifest; "
                "list [features] in the order of the model's columns"
            )
    if len(fitted) > len(named):
        raise ModelRefused(f"the model needs column {fitted[len(named)]!r} too; add it to [features]")
    if len(named) > len(fitted):
        raise ModelRefused(f"the model has no column {named[len(fitted)]!r}; take it out of [features]")
