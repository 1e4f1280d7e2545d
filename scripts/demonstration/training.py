"""Three tenants train their models on the first part of the year, with scikit-learn and nothing of the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, TargetEncoder

from demonstration.data import BASKET, TRANSACTION, Array, Events
from demonstration.features import MANIFESTS, Ends, Observed, observe, plan_of, read_manifests, rows_of, stored_before
from demonstration.labels import WEEK_MS, abnormal_limits, fraud_labels, list_labels, offers_labels, reorder_labels
from node.kernel.tables import TableSet
from node.kernel.types import FeatureRows, ModelName, StoredOutput
from tenants.features import CompiledFeatures
from tenants.inputs import ModelInput, Rows
from tenants.shared_names import FEATURES_FILE

REORDER = ModelName("reorder", "again")
OFFERS = ModelName("offers", "redeem")
FRAUD = ModelName("fraud", "abnormal")
LIST = ModelName("reorder", "list")
TRIGGERS: Mapping[ModelName, int] = {REORDER: TRANSACTION, OFFERS: BASKET, FRAUD: BASKET}
"""The type of event, of `TYPES`, that each model runs on; `LIST` runs on none, but by the week."""
MODELS = (*TRIGGERS, LIST)

CUT_MS = int(np.datetime64("2017-09-01", "ms").astype(np.int64))
"""Training sees nothing from here on."""
TRAIN_FROM_MS = int(np.datetime64("2017-02-01", "ms").astype(np.int64))
"""Before it the windows are not yet full, as they will be where the models are used."""
LINES_SHARE = 0.12
"""Of the transactions, taken at random: more do not make `reorder` better."""
SEED = 84


def labels(events: Events, known_until_ms: int) -> dict[ModelName, Array]:
    """float64 [events] for each model: the truth about its triggers, NaN where it has none or it can't be told."""
    limits = abnormal_limits(events, CUT_MS)
    return {
        REORDER: reorder_labels(events, known_until_ms),
        OFFERS: offers_labels(events, known_until_ms),
        FRAUD: fraud_labels(events, limits, known_until_ms),
    }


def estimators() -> dict[ModelName, Any]:
    """Unfitted, one for each model: three kinds of cost, as tenants are."""
    category = ColumnTransformer([("category", TargetEncoder(), ["category", "department"])], remainder="passthrough")
    return {
        REORDER: make_pipeline(category, HistGradientBoostingClassifier(max_iter=100, random_state=SEED)),
        OFFERS: make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        FRAUD: HistGradientBoostingClassifier(max_iter=60, learning_rate=0.05, max_leaf_nodes=15, random_state=SEED),
        LIST: HistGradientBoostingClassifier(max_iter=60, learning_rate=0.05, max_leaf_nodes=15, random_state=SEED),
    }


def last_lines(events: Events, batch_events: int) -> Array:
    """Positions, ascending: the last transaction of each household in each micro-batch, whose score stays stored."""
    lines = np.flatnonzero(events.kinds == TRANSACTION)
    batches = len(events) // batch_events + 1
    keys = events.households[lines] * batches + lines // batch_events
    _, from_the_end = np.unique(keys[::-1], return_index=True)
    return np.sort(lines[len(lines) - 1 - from_the_end])


@dataclass(frozen=True)
class Sample:
    """What the models are fitted and asked on: bool [events] each."""

    lines: Array
    stored: Array
    baskets: Array

    @property
    def wanted(self) -> Array:
        return self.lines | self.stored | self.baskets


def sample(events: Events, batch_events: int) -> Sample:
    chosen = np.random.default_rng(SEED).random(len(events)) < LINES_SHARE
    stored = np.zeros(len(events), np.bool_)
    stored[last_lines(events, batch_events)] = True
    return Sample((events.kinds == TRANSACTION) & chosen, stored, events.kinds == BASKET)


class Training:
    """Fits one model after the other, since `offers` reads what `reorder` says. `batch_events`: see `observe`."""

    def __init__(self, events: Events, batch_events: int, tables: TableSet) -> None:
        self._events = events
        self._tables = tables
        self._batch_events = batch_events
        self._sample = sample(events, batch_events)
        self._truth = labels(events, CUT_MS)
        self._manifests = read_manifests()
        self._plan: CompiledFeatures = plan_of(list(self._manifests.values()))
        self._observed: Observed | None = None
        self._ends = Ends(self._manifests[LIST].version("0" * 64))

    def observe(self, progress: Callable[[int], None]) -> None:
        """Compute the features: one pass over all events."""
        self._observed = observe(
            self._plan,
            self._events,
            self._sample.wanted,
            self._batch_events,
            progress,
            self._tables,
            self._ends,
            self._ends.ends_ms(TRAIN_FROM_MS, CUT_MS - WEEK_MS),
        )

    def fit(self, name: ModelName) -> Any:
        """The fitted estimator; `observe` must have run. Fitting `REORDER` makes its output known to the others."""
        if name == LIST:
            return self._fit_list()
        asked = self._sample.lines if name == REORDER else self._sample.baskets
        usable = asked & np.isfinite(self._truth[name]) & (self._events.times_ms >= TRAIN_FROM_MS)
        places = np.flatnonzero(usable)
        model = estimators()[name].fit(self._inputs(name, places), self._truth[name][places])
        if name == REORDER:
            self._store(model)
        return model

    def _fit_list(self) -> Any:
        found = self._ends.found
        truth = [list_labels(self._events, one.households, one.end_ms, CUT_MS) for one in found]
        numbers = np.concatenate([one.rows.numbers for one in found])
        return estimators()[LIST].fit(as_frame(FeatureRows(found[0].rows.names, numbers)), np.concatenate(truth))

    def _store(self, model: Any) -> None:
        assert self._observed is not None
        places = np.flatnonzero(self._sample.stored)
        scores = model.predict_proba(self._inputs(REORDER, places))[:, 1]
        stored = stored_before(self._events.households, places, scores, self._observed.places, self._batch_events)
        self._observed = self._observed.with_output(StoredOutput(REORDER, "score"), stored)

    def _inputs(self, name: ModelName, places: Array) -> Any:
        assert self._observed is not None
        return as_frame(rows_of(self._plan, name, self._observed, places))


def as_frame(rows: FeatureRows) -> Any:
    """A pandas data frame with the manifest's columns, as a worker makes it."""
    return ModelInput(rows.names, "frame", None, None).of(Rows(rows.numbers, rows.texts))


def drop_models(models: Mapping[ModelName, Any], watched: Path) -> None:
    """Put each model and manifest into the watched directory as a tenant would: written beside, then renamed in."""
    settings = sorted(MANIFESTS.glob(f"*/{FEATURES_FILE}")) + sorted(MANIFESTS.glob("*/tenant.toml"))
    for source in (*settings, *(MANIFESTS / name.tenant / f"{name.model}.toml" for name in models)):
        tenant = watched / source.parent.name
        tenant.mkdir(parents=True, exist_ok=True)
        part = tenant / f".{source.name}.part"
        shutil.copyfile(source, part)
        part.rename(tenant / source.name)
    for name, model in models.items():
        tenant = watched / name.tenant
        part = tenant / f".{name.model}.part"
        joblib.dump(model, part)
        part.rename(tenant / f"{name.model}.joblib")
