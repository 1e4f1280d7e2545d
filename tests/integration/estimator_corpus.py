"""Every estimator of scikit-learn that a worker must take, fitted small and quick, with rows to call it on.

Shared by the tests and by scripts/allowlist, which records what these files need.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import (
    BaggingClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils import all_estimators

METHODS = ("predict_proba", "predict", "transform", "decision_function", "score_samples", "mahalanobis")
SKIPPED = {"PatchExtractor": "takes images, which are no rows of features"}

_random = np.random.default_rng(7)
ROWS = 40
X = np.vstack([_random.uniform(0.1, 1.0, (ROWS // 2, 4)), _random.uniform(0.8, 2.0, (ROWS // 2, 4))])
Y = np.repeat([0, 1], ROWS // 2)
VALUES = X @ np.array([1.0, 2.0, 0.5, 0.25]) + 1.0
TARGETS = np.column_stack([VALUES, VALUES[::-1]])
LABELS = np.column_stack([Y, (X[:, 1] > 1).astype(int)])
WHOLE = np.floor(2 * X)
WORDS = ["red apple", "green pear", "red pear", "green apple tree"] * (ROWS // 4)
KERNEL = rbf_kernel(X[::10])


@dataclass(frozen=True)
class Case:
    """A fitted estimator with rows: `numbers` [rows, columns] and `texts` for a worker, `given` for itself."""

    name: str
    model: Any
    numbers: Any
    given: Any
    texts: dict[str, list[str | None]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.texts) if self.texts else tuple(f"f{index}" for index in range(self.numbers.shape[1]))

    @property
    def methods(self) -> list[str]:
        return [method for method in METHODS if hasattr(self.model, method)]


def _logistic() -> Any:
    return LogisticRegression()


_CONSTRUCTED: dict[str, Callable[[Any], Any]] = {
    "ColumnTransformer": lambda cls: cls([("scaled", StandardScaler(), [0, 1]), ("kept", "passthrough", [2, 3])]),
    "FeatureUnion": lambda cls: cls([("standard", StandardScaler()), ("unit", MinMaxScaler())]),
    "FrozenEstimator": lambda cls: cls(_logistic().fit(X, Y)),
    "FunctionTransformer": lambda cls: cls(np.log1p),
    "GridSearchCV": lambda cls: cls(_logistic(), {"C": [0.1, 1.0]}, cv=2),
    "Pipeline": lambda cls: cls([("log", FunctionTransformer(np.log1p)), ("model", _logistic())]),
    "RandomizedSearchCV": lambda cls: cls(_logistic(), {"C": [0.1, 1.0]}, n_iter=2, cv=2, scoring="roc_auc"),
    "SelfTrainingClassifier": lambda cls: cls(_logistic()),
    "SparseCoder": lambda cls: cls(np.eye(4)),
    "StackingClassifier": lambda cls: cls([("a", _logistic()), ("b", RandomForestClassifier(3))], cv=2),
    "StackingRegressor": lambda cls: cls([("a", LinearRegression())], cv=2),
    "VotingClassifier": lambda cls: cls([("a", _logistic()), ("b", RandomForestClassifier(3))], voting="soft"),
    "VotingRegressor": lambda cls: cls([("a", LinearRegression())]),
    "MultiOutputRegressor": lambda cls: cls(LinearRegression()),
    "RegressorChain": lambda cls: cls(LinearRegression()),
    "SequentialFeatureSelector": lambda cls: cls(_logistic(), n_features_to_select=2, cv=2),
    "RFECV": lambda cls: cls(_logistic(), cv=2),
}
_QUICK: dict[str, Any] = {
    "n_estimators": 3,
    "max_iter": 50,
    "n_components": 2,
    "n_clusters": 2,
    "cv": 2,
    "novelty": True,
    "n_knots": 3,
    "max_subpopulation": 20,
    "n_resampling": 5,
    "random_state": 0,
}
_PARAMETERS: dict[str, dict[str, Any]] = {
    "FeatureHasher": {"n_features": 8},
    "GenericUnivariateSelect": {"mode": "k_best", "param": 2},
    "HashingVectorizer": {"n_features": 16},
    "KNeighborsTransformer": {"n_neighbors": 3},
    "LogisticRegression": {},
    "MultiTaskElasticNet": {"alpha": 0.1},
    "RandomTreesEmbedding": {"n_estimators": 2, "max_depth": 2},
    "SVC": {},
    "OrthogonalMatchingPursuitCV": {},
    "HistGradientBoostingClassifier": {"max_iter": 5},
    "HistGradientBoostingRegressor": {"max_iter": 5},
    "SelectKBest": {"k": 2},
    "SelectPercentile": {"percentile": 50},
    "LinearDiscriminantAnalysis": {},
    "PLSCanonical": {"n_components": 2},
    "CCA": {"n_components": 1},
    "RadiusNeighborsClassifier": {"outlier_label": 0},
    "Birch": {"threshold": 0.5},
}


def constructed(name: str, cls: Any) -> Any:
    if name in _CONSTRUCTED:
        return _CONSTRUCTED[name](cls)
    try:
        model = cls(**_PARAMETERS.get(name, {}))
    except TypeError:
        return cls(_logistic())
    if name not in _PARAMETERS:
        known = model.get_params(deep=False)
        model.set_params(**{key: value for key, value in _QUICK.items() if key in known})
    return model


def _targets(name: str, model: Any) -> Any:
    if name in ("MultiOutputRegressor", "RegressorChain") or name.startswith(("MultiTask", "PLS", "CCA")):
        return TARGETS
    if name in ("MultiOutputClassifier", "ClassifierChain"):
        return LABELS
    if name == "SelfTrainingClassifier":
        return np.where(np.arange(ROWS) % 5 == 0, -1, Y)
    kind = getattr(model, "_estimator_type", None) or getattr(model.__sklearn_tags__(), "estimator_type", None)
    return VALUES if kind == "regressor" else Y


def _special(name: str, model: Any) -> Case | None:
    """The estimators that do not take a matrix of any numbers."""
    if name in ("CountVectorizer", "TfidfVectorizer", "HashingVectorizer"):
        return Case(name, model.fit(WORDS), np.full((ROWS, 1), np.nan), WORDS, {"words": list(WORDS)})
    if name in ("DictVectorizer", "FeatureHasher"):
        records = [{f"f{index}": value for index, value in enumerate(row)} for row in X.tolist()]
        return Case(name, model.fit(records), X, records)
    if name in ("LabelBinarizer", "LabelEncoder"):
        return Case(name, model.fit(WHOLE[:, 0]), WHOLE[:, :1], WHOLE[:, 0])
    if name == "MultiLabelBinarizer":
        return Case(name, model.fit(WHOLE.tolist()), WHOLE, WHOLE.tolist())
    if name == "IsotonicRegression":
        return Case(name, model.fit(X[:, 0], VALUES), X[:20, :1], X[:20, 0])
    if name == "KernelCenterer":
        return Case(name, model.fit(KERNEL), KERNEL, KERNEL)
    if name in ("KNeighborsTransformer", "RadiusNeighborsTransformer"):
        return Case(name, model.fit(X[:20]), X, X)
    return None


def fitted(name: str, cls: Any, frame: bool) -> Case:
    model = constructed(name, cls)
    if (special := _special(name, model)) is not None:
        return special
    rows = WHOLE if name in ("OneHotEncoder", "OrdinalEncoder", "TargetEncoder", "CategoricalNB") else X
    given = pd.DataFrame(rows, columns=[f"f{index}" for index in range(4)]) if frame else rows
    if name == "FrozenEstimator":
        return Case(name, model, X, X)
    model.fit(given, _targets(name, model))
    return Case(name, model, rows, given)


def cases(frame: bool) -> Iterator[Case]:
    """Each estimator that can predict, transform or score, fitted on arrays or on data frames."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, cls in all_estimators():
            if name not in SKIPPED and (name == "FrozenEstimator" or any(hasattr(cls, method) for method in METHODS)):
                yield fitted(name, cls, frame)


def shop_frame(rows: int) -> pd.DataFrame:
    """A text column with missing values beside two of numbers."""
    cities = ["Oslo", "Bergen", None]
    return pd.DataFrame({"city": [cities[row % 3] for row in range(rows)], "amount": X[:rows, 0], "age": X[:rows, 2]})


def further_models() -> Iterator[Any]:
    """What common settings add to the files of the estimators above."""
    frame = shop_frame(ROWS)
    for categories in (frame["city"].fillna("none").astype("category"), frame["city"].fillna("none")):
        given = frame.assign(city=categories)
        yield HistGradientBoostingClassifier(max_iter=3, categorical_features=["city"]).fit(given, Y)
    for kernel in ("ball_tree", "kd_tree"):
        yield KNeighborsClassifier(algorithm=kernel).fit(X, Y)
        yield KNeighborsClassifier(algorithm=kernel).fit(X.astype(np.float32), Y)
    for solver in ("sgd", "lbfgs"):
        yield MLPClassifier(solver=solver, max_iter=5).fit(X, Y)
    for loss in ("log_loss", "modified_huber", "squared_hinge", "squared_error", "huber", "epsilon_insensitive"):
        yield SGDClassifier(loss=loss).fit(X, Y)
    for loss in ("squared_error", "absolute_error", "huber", "quantile"):
        yield GradientBoostingRegressor(loss=loss, n_estimators=2).fit(X, VALUES)
    for loss in ("squared_error", "absolute_error", "gamma", "poisson"):
        yield HistGradientBoostingRegressor(loss=loss, max_iter=2).fit(X, VALUES)
    for method in ("sigmoid", "isotonic", "temperature"):
        yield CalibratedClassifierCV(LinearSVC(), method=method, cv=2).fit(X, Y)
    yield OneVsRestClassifier(LogisticRegression()).fit(X, np.column_stack([Y, np.ones_like(Y)]))
    yield BaggingClassifier(random_state=np.random.RandomState(0), n_estimators=2).fit(X, Y)
    yield GradientBoostingClassifier(n_estimators=2, init="zero", max_depth=2).fit(X, np.arange(ROWS) % 3)
    encode = ColumnTransformer([("city", OneHotEncoder(), ["city"])], remainder=StandardScaler())
    yield make_pipeline(encode, LogisticRegression()).fit(frame, Y)


def library_models() -> Iterator[Any]:
    """XGBoost's and LightGBM's models with scikit-learn's interface."""
    import lightgbm
    import xgboost

    names = ["f0", "f1", "f2", "f3"]
    frame = pd.DataFrame(X, columns=names)
    quiet = {"n_estimators": 3, "verbose": -1, "min_child_samples": 2}
    for given in (X, frame):
        yield xgboost.XGBClassifier(n_estimators=3, n_jobs=2).fit(given, Y)
        yield xgboost.XGBRegressor(n_estimators=3).fit(given, VALUES)
        yield xgboost.XGBRFClassifier(n_estimators=3).fit(given, Y)
        yield xgboost.XGBRFRegressor(n_estimators=3).fit(given, VALUES)
        yield xgboost.XGBRanker(n_estimators=3).fit(given, Y, group=[ROWS])
        yield lightgbm.LGBMClassifier(n_jobs=2, **quiet).fit(given, Y)
        yield lightgbm.LGBMRegressor(**quiet).fit(given, VALUES)
        yield lightgbm.LGBMRanker(**quiet).fit(given, Y, group=[ROWS])
