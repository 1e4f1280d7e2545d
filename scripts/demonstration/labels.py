"""What the data says happened later: the truth that the models are trained on and measured by.

Each label looks strictly after its own event. Near the end of what is known it can't be told, and is NaN:
that is how training on the first part of the year keeps from peeking into the rest.
"""

from __future__ import annotations

import numpy as np

from demonstration.data import BASKET, DAY_MS, REDEMPTION, TRANSACTION, Array, Events

HORIZON_DAYS = 14
"""How far ahead "soon" is."""
HORIZON_MS = HORIZON_DAYS * DAY_MS
WEEK_MS = 7 * DAY_MS
_NEVER = np.iinfo(np.int64).max // 2
ABNORMAL_SHARE = 0.01
"""The share of receipts whose discount counts as abnormal."""


def later_times(groups: Array, times_ms: Array, asked_groups: Array, asked_ms: Array) -> Array:
    """int64: for each asked (group, time) the first time of that group strictly after it; `_NEVER` for none."""
    order = np.lexsort((times_ms, groups))
    # One sorted key of group and time, so that one binary search answers each question.
    span = int(max(times_ms.max(initial=0), asked_ms.max(initial=0))) + 2
    keys = groups[order].astype(np.int64) * span + times_ms[order]
    found = np.searchsorted(keys, asked_groups.astype(np.int64) * span + asked_ms, side="right")
    inside = found < len(keys)
    place = order[np.minimum(found, len(keys) - 1)] if len(keys) else found
    same = np.zeros(len(found), np.bool_)
    same[inside] = groups[place[inside]] == asked_groups[inside]
    return np.where(same, times_ms[place] if len(keys) else _NEVER, _NEVER)


def soon(asked_ms: Array, later_ms: Array, known_until_ms: int) -> Array:
    """float64: 1.0 within the horizon, else 0.0; NaN where the horizon ends after `known_until_ms`."""
    label = (later_ms - asked_ms <= HORIZON_MS).astype(np.float64)
    label[asked_ms + HORIZON_MS > known_until_ms] = np.nan
    return label


def reorder_labels(events: Events, known_until_ms: int) -> Array:
    """float64 [events]: will the household buy of this line's category again, on a later receipt?

    NaN for other events, and for a line without a category.
    """
    lines = np.flatnonzero((events.kinds == TRANSACTION) & (events.texts["category"] >= 0))
    categories = len(events.vocabularies["category"]) + 1
    groups = events.households[lines] * categories + events.texts["category"][lines]
    times = events.times_ms[lines]
    return _spread(events, lines, soon(times, later_times(groups, times, groups, times), known_until_ms))


def offers_labels(events: Events, known_until_ms: int) -> Array:
    """float64 [events]: will the household redeem a coupon on a later day than this receipt's? NaN for other events."""
    redeemed, baskets = events.kinds == REDEMPTION, np.flatnonzero(events.kinds == BASKET)
    # A redemption is dated at the end of its day, so that of the receipt's own day is not "later".
    day_ends = (events.times_ms[baskets] // DAY_MS + 1) * DAY_MS - 1
    later = later_times(events.households[redeemed], events.times_ms[redeemed], events.households[baskets], day_ends)
    return _spread(events, baskets, soon(day_ends, later, known_until_ms))


def abnormal_limits(events: Events, known_until_ms: int) -> tuple[float, float]:
    """The coupon and the shelf discount that `ABNORMAL_SHARE` of the receipts until then reach."""
    baskets = (events.kinds == BASKET) & (events.times_ms < known_until_ms)
    coupons = (events.numbers["coupon_discount"] + events.numbers["match_discount"])[baskets]
    shelf = events.numbers["retail_discount"][baskets]
    if not len(shelf):
        return np.inf, np.inf
    return float(np.quantile(coupons, 1 - ABNORMAL_SHARE)), float(np.quantile(shelf, 1 - ABNORMAL_SHARE))


def fraud_labels(events: Events, limits: tuple[float, float], known_until_ms: int) -> Array:
    """float64 [events]: will a later receipt of the household have an abnormal discount? NaN for other events."""
    baskets = np.flatnonzero(events.kinds == BASKET)
    coupons = (events.numbers["coupon_discount"] + events.numbers["match_discount"])[baskets]
    abnormal = baskets[(coupons >= limits[0]) | (events.numbers["retail_discount"][baskets] >= limits[1])]
    times = events.times_ms[baskets]
    later = later_times(events.households[abnormal], events.times_ms[abnormal], events.households[baskets], times)
    return _spread(events, baskets, soon(times, later, known_until_ms))


def list_labels(events: Events, households: Array, end_ms: int, known_until_ms: int) -> Array:
    """float64 [households]: will the household come within the week after `end_ms`?"""
    baskets = events.kinds == BASKET
    asked = np.full(len(households), end_ms - 1)
    later = later_times(events.households[baskets], events.times_ms[baskets], households, asked)
    label = (later < end_ms + WEEK_MS).astype(np.float64)
    label[end_ms + WEEK_MS > known_until_ms] = np.nan
    return label


def _spread(events: Events, places: Array, labels: Array) -> Array:
    spread = np.full(len(events), np.nan)
    spread[places] = labels
    return spread
