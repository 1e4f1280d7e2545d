"""Tries a freshly loaded model on made-up rows: its columns, its outputs, its cost.

Runs in a worker. The rows are numbers between 0 and 1, ones, zeros and normally distributed numbers, from a fixed
seed; where the model has learned categories, these. One kind that works is enough: models may rightly refuse others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from node.kernel.errors import CallFailed, ModelRefused
from tenants.inputs import ModelInput, Rows, check_columns, forms
from tenants.messages import Load, shorten
from tenants.outputs import Outputs

TRIAL_ROWS = 1024
_FIRST_ROWS = 16
_NESTING_MAX = 8
_REPEATS = 3
_REPEAT_SECONDS_MAX = 0.1
"""A slow model's cost shows at the first try."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What was learned: how to call the model, and its cost in CPU seconds."""

    input: ModelInput
    outputs: Outputs
    seconds_per_row: float
    seconds_per_call: float
    notes: tuple[str, ...]


def try_model(model: Any, request: Load) -> Trial:
    """Raises ModelRefused with the reason for the tenant."""
    names = request.features
    feature_names, feature_count = check_columns(model, names)
    outputs = Outputs(model, request.method, request.outputs)
    categories = learned_categories(model, names)
    texts = set(request.text_features) | {
        names[column] for column, values in categories.items() if all(isinstance(value, str) for value in values)
    }
    kinds = list(_made_up_rows(names, texts, categories))
    failures: list[CallFailed] = []
    for form in forms(model, bool(texts)):
        candidate = ModelInput(names, form, feature_names, feature_count)
        for rows in kinds:
            try:
                outputs.of(candidate, _first(rows, _FIRST_ROWS))
            except CallFailed as failure:
                failures.append(failure)
            else:
                return _measured(candidate, outputs, rows)
    raise ModelRefused(shorten(f"on made-up rows: {failures[0]}"))


def _measured(model_input: ModelInput, outputs: Outputs, rows: Rows) -> Trial:
    one = _first(rows, 1)
    many_seconds = call_seconds = float("inf")
    for _ in range(_REPEATS):
        many_seconds = min(many_seconds, _seconds(model_input, outputs, rows))
        call_seconds = min(call_seconds, _seconds(model_input, outputs, one))
        if many_seconds > _REPEAT_SECONDS_MAX:
            break
    row_seconds = max(0.0, many_seconds - call_seconds) / (len(rows) - 1)
    notes = () if not rows.numbers.size or _takes_missing(model_input, outputs, rows) else (NOTE_MISSING,)
    return Trial(model_input, outputs, row_seconds, max(0.0, call_seconds - row_seconds), notes)


def _first(rows: Rows, count: int) -> Rows:
    return Rows(rows.numbers[:count], {name: column[:count] for name, column in rows.texts.items()})


NOTE_MISSING = "the model does not take missing numbers (NaN): rows that lack one become dead letters"


def _takes_missing(model_input: ModelInput, outputs: Outputs, rows: Rows) -> bool:
    try:
        some = _first(rows, _FIRST_ROWS)
        outputs.of(model_input, Rows(np.full_like(some.numbers, np.nan), some.texts))
    except CallFailed:
        return False
    return True


def _seconds(model_input: ModelInput, outputs: Outputs, rows: Rows) -> float:
    started = time.process_time()
    outputs.of(model_input, rows)
    return time.process_time() - started


def _made_up_rows(names: Sequence[str], texts: set[str], categories: Mapping[int, Sequence[Any]]) -> Iterator[Rows]:
    shape = (TRIAL_ROWS, len(names))
    generator = np.random.default_rng(0)
    for numbers in (generator.random(shape), np.ones(shape), np.zeros(shape), generator.normal(size=shape)):
        columns: dict[str, list[str | None]] = {}
        for column, name in enumerate(names):
            learned = categories.get(column, ())
            if name in texts:
                words = [str(value) for value in learned] or ["a", "b"]
                columns[name] = [words[row % len(words)] for row in range(TRIAL_ROWS)]
                numbers[:, column] = np.nan
            elif learned:
                numbers[:, column] = [float(learned[row % len(learned)]) for row in range(TRIAL_ROWS)]
        yield Rows(numbers, columns)


def learned_categories(model: Any, names: Sequence[str]) -> dict[int, list[Any]]:
    """Column -> categories that an encoder in the model learned of it; columns without are left out.

    Walks pipelines, unions and column transformers. What it does not understand, it leaves out.
    """
    found: dict[int, list[Any]] = {}
    try:
        _collect(model, list(range(len(names))), list(names), found, _NESTING_MAX)
    except Exception:  # a tenant's object may be anything; then the made-up rows are plain
        return {}
    return found


def _collect(model: Any, columns: list[int], names: list[str], found: dict[int, list[Any]], nesting: int) -> None:
    if nesting == 0:
        return
    if hasattr(model, "best_estimator_"):
        _collect(model.best_estimator_, columns, names, found, nesting - 1)
    elif hasattr(model, "transformers_"):
        for _, transformer, chosen in model.transformers_:
            _collect(transformer, _chosen(chosen, names), names, found, nesting - 1)
    elif hasattr(model, "transformer_list"):
        for _, transformer in model.transformer_list:
            _collect(transformer, columns, names, found, nesting - 1)
    elif hasattr(model, "steps"):
        for _, step in model.steps:
            _collect(step, columns, names, found, nesting - 1)
    elif isinstance(categories := getattr(model, "categories_", None), list) and len(categories) == len(columns):
        for column, values in zip(columns, categories, strict=True):
            known = [value for value in values.tolist() if isinstance(value, str) or value == value]
            if known and isinstance(known[0], str | int | float | bool):
                found.setdefault(column, known)


def _chosen(chosen: Any, names: list[str]) -> list[int]:
    """The column numbers of a column transformer's choice: names, numbers, a slice or a mask."""
    if isinstance(chosen, str):
        return [names.index(chosen)]
    if isinstance(chosen, int):
        return [chosen]
    if isinstance(chosen, slice) and not isinstance(chosen.start, str) and not isinstance(chosen.stop, str):
        return list(range(len(names)))[chosen]
    picked = np.asarray(chosen)
    if picked.dtype == bool:
        return [int(index) for index in np.flatnonzero(picked)]
    return [names.index(item) if isinstance(item, str) else int(item) for item in picked.tolist()]
