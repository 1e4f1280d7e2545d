"""`tables.<table>[key].<column>` in features: parsed with its types, looked up once for each key, by one version."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from node.cycle import _pinned
from node.kernel.chunks import decode_chunk, encode_chunk
from node.kernel.errors import ManifestError, TableUnavailable
from node.kernel.tables import NO_TABLES, TableColumn, TableSchema, TableSet
from node.kernel.types import (
    EventColumns,
    EventNames,
    EventSchema,
    FeatureRows,
    ModelName,
    SequenceChunk,
    StagedVersion,
    StageKind,
)
from node.ordering import triggers_of
from node.staging import blind_shadows, divided, table_readers
from tenants.definitions import NOTHING_SHARED
from tenants.expression import ExpressionError, Scope, TableValue, parse_expression
from tenants.features import CompiledFeatures, compile_plan
from tenants.lineage import event_features
from tenants.manifest import parse_manifest
from tenants.staged_plan import StagedPlan
from tenants.staged_plan import plan_of as staged_plan_of
from tests.unit.table_support import version_of

PRODUCTS = TableSchema(
    "sku", "text", {"price": TableColumn("number"), "brand": TableColumn("text"), "unit price": TableColumn("number")}
)
SHOPS = TableSchema("shop", "number", {"size": TableColumn("number"), "fresh": TableColumn("boolean")})
SCHEMA = EventSchema(
    ("buy",), {"sku": "text", "shop": "number", "amount": "number"}, tables={"products": PRODUCTS, "shops": SHOPS}
)
NAME = ModelName("a", "m")
EVENTS = EventNames.of(["events"], SCHEMA.types)


def parse(text: str) -> object:
    return parse_expression(text, Scope(SCHEMA, features={"spent": "number", "code": "text"}))


def problems(text: str) -> list[str]:
    with pytest.raises(ExpressionError) as refused:
        parse(text)
    return list(map(str, refused.value.problems))


def test_a_look_up_has_its_columns_type_and_any_key() -> None:
    found = parse("tables.products[event.sku].price")
    assert isinstance(found, TableValue)
    assert (found.table, found.column, found.type) == ("products", "price", "number")
    assert parse("tables.products[event.sku].brand").type == "text"
    assert parse("tables.shops[event.shop].fresh").type == "boolean"
    assert parse("tables.products[event.sku]['unit price']").column == "unit price"
    for key in ("code", "'a1'", "event.sku if event.amount > 1 else 'b'", "coalesce(event.sku, 'none')"):
        parse(f"tables.products[{key}].price")
    parse("tables.shops[tables.shops[event.shop].size + 1].size")
    parse("max(tables.products[event.sku].price, 1)")
    parse("coalesce(tables.products[event.sku].price, 0) * 2")
    parse("tables.products[event.sku].brand in ('x', 'y')")


FORM = "a table's value is tables.<table>[key].<column>, such as tables.products[event.sku].price"
WRONG = [
    (
        "tables.product[event.sku].price",
        "column 1: there is no table 'product'; put it first, did you mean 'products'?",
    ),
    ("1 + tables.products[event.sku].prize", "column 5: table products has no column 'prize', did you mean 'price'?"),
    ("tables.products[event.sku].sku", "column 1: 'sku' is the key of table products; take one of its other columns"),
    ("tables.products[event.shop].price", "column 17: the key of table products is a text, this is a number"),
    ("tables.shops[event.sku].size", "column 14: the key of table shops is a number, this is a text"),
    ("tables.products[event.skv].price", "column 17: unknown event field 'skv', did you mean 'sku'?"),
    ("tables.products.price", f"column 1: {FORM}"),
    ("tables.products[event.sku]", f"column 1: {FORM}"),
    ("tables.products[event.sku].price.x", f"column 1: {FORM}"),
    ("tables.products[1:2].price", f"column 1: {FORM}"),
    ("tables[event.sku].price", f"column 1: {FORM}"),
    (
        "count(buy, where=tables.products[event.sku].price > 1)",
        "column 18: where= may use only event.<field> and literals",
    ),
]


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_a_wrong_look_up_is_told_with_its_place(text: str, expected: str) -> None:
    assert problems(text) == [expected]


def manifest(**features: str):
    lines = [f'{name} = "{text}"' for name, text in features.items()]
    text = "\n".join(['on = ["buy"]', "[features]", *lines])
    return parse_manifest("m.toml", NAME.tenant, NAME.model, text.encode(), SCHEMA)


def plan_of(**features: str) -> CompiledFeatures:
    made = manifest(**features)
    return compile_plan([(made.version("ab" * 32), made)], SCHEMA)


def events(skus: list[str | None], shops: list[float]) -> EventColumns:
    count, none = len(skus), np.zeros(len(skus), np.int64)
    fields = {"sku": np.array(skus, object), "shop": np.array(shops), "amount": np.full(count, 2.0)}
    return EventColumns(none, none, np.arange(count), [str(at) for at in range(count)], none, none, fields)


class Reads:
    def __init__(self, tables: TableSet) -> None:
        self.tables = tables


class Counted:
    """A reader that counts what it is asked."""

    def __init__(self, reader) -> None:
        self.reader, self.version, self.asked = reader, reader.version, Counter()

    def rows(self, keys):
        self.asked["rows"] += 1
        return self.reader.rows(keys)

    def column(self, name, rows):
        self.asked[name] += 1
        return self.reader.column(name, rows)


def rows_of(plan: CompiledFeatures, tables: TableSet, skus: list[str | None], shops: list[float]) -> FeatureRows:
    return plan.rows(events(skus, shops), Reads(tables), {NAME: np.ones(len(skus), np.bool_)})[NAME]


def test_columns_of_one_key_are_one_look_up(tmp_path: Path) -> None:
    reader = Counted(version_of(tmp_path, "sku,price,brand\na,1.5,x\nb,2.5,y\n"))
    plan = plan_of(
        price="tables.products[event.sku].price",
        brand="tables.products[event.sku].brand",
        spent="tables.products[event.sku].price * event.amount",
        other="tables.products['b'].price",
    )
    rows = rows_of(plan, TableSet({"products": reader}), ["a", "z", "b", None, "a"], [0.0] * 5)
    assert rows.numbers[:, 0].tolist()[::2] == [1.5, 2.5, 1.5]
    assert np.isnan(rows.numbers[[1, 3], 0]).all()
    assert rows.texts["brand"] == ["x", None, "y", None, "x"]
    assert rows.numbers[0, 2] == 3.0
    assert rows.numbers[:, 3].tolist() == [2.5] * 5
    assert reader.asked == {"rows": 2, "price": 2, "brand": 1}


def test_a_table_or_column_that_a_version_has_not_is_missing(tmp_path: Path) -> None:
    plan = plan_of(price="tables.products[event.sku].price", brand="tables.products[event.sku].brand")
    for tables in (NO_TABLES, TableSet({"products": version_of(tmp_path, "sku,cost\na,1\n")})):
        rows = rows_of(plan, tables, ["a"], [0.0])
        assert math.isnan(rows.numbers[0, 0])
        assert rows.texts["brand"] == [None]


def test_a_models_versions_are_those_of_the_tables_it_reads(tmp_path: Path) -> None:
    plan = plan_of(price="event.amount", odd="tables.shops[tables.shops[event.shop].size].size")
    assert plan.tables(NAME) == ("shops",)
    tables = TableSet(
        {
            "products": version_of(tmp_path, "sku,price\na,1\n"),
            "shops": version_of(tmp_path, "shop,size\n1,2\n", key="shop", name="v7"),
        }
    )
    versions = tables.versions(plan.tables(NAME))
    assert versions == {"shops": "v7"}
    given = events(["a"], [1.0])
    triggers = triggers_of(
        plan.models[0], given, EVENTS, np.ones(1, np.bool_), rows_of(plan, tables, ["a"], [1.0]), tables=versions
    )
    assert decode_chunk(encode_chunk(SequenceChunk(3, triggers))).triggers.tables == versions


def test_a_cycle_waits_for_the_version_that_its_models_need() -> None:
    absent = TableSet({}, {"products": "version 1 is being fetched"})
    with pytest.raises(TableUnavailable, match=r"model a/m waits for table products: version 1 is being fetched"):
        _pinned(absent, plan_of(price="tables.products[event.sku].price"))
    assert _pinned(absent, plan_of(size="tables.shops[event.shop].size")) is absent


def beside(kind: StageKind) -> tuple[StagedPlan, StagedVersion]:
    """A live model that reads shops, with a version beside it that reads products."""
    made = [manifest(x=f"tables.{text}") for text in ("shops[event.shop].size", "products[event.sku].price")]
    live, other = [(one.version("ab" * 32), one) for one in made]
    staged = StagedVersion(other[0], kind, 1.0)
    return staged_plan_of([live], [(staged, other[1])], SCHEMA, NOTHING_SHARED), staged


def test_a_cycle_waits_for_the_version_that_a_canary_needs() -> None:
    plan, staged = beside("canary")
    absent = TableSet({}, {"products": "version 1 is being fetched"})
    with pytest.raises(TableUnavailable, match=f"model {staged.key} waits for table products: version 1 is being"):
        _pinned(absent, plan)
    assert blind_shadows(plan, absent) == frozenset()


def test_a_shadow_without_its_table_is_shown_nothing_and_holds_up_nobody() -> None:
    plan, staged = beside("shadow")
    absent = TableSet({}, {"products": "version 1 is being fetched"})
    assert _pinned(absent, plan) is absent
    given, every = events(["a"], [1.0]), {NAME: np.ones(1, np.bool_)}
    assert divided(plan, given, every, blind_shadows(plan, absent)).keys() == {NAME}
    assert divided(plan, given, every, blind_shadows(plan, NO_TABLES)).keys() == {NAME, staged.key}


@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_what_runs_beside_a_live_model_keeps_its_tables_from_being_dropped(kind: StageKind) -> None:
    plan, staged = beside(kind)
    assert table_readers(plan, "products") == [str(staged.key)]
    assert table_readers(plan, "shops") == [str(NAME)]
    assert table_readers(plan, "others") == []


def test_what_a_look_up_needs_of_the_event_is_known() -> None:
    made = manifest(price="tables.products[event.sku].price", fixed="tables.products['a'].price", next="price + 1")
    assert event_features(made) == {"price", "next"}


def test_a_manifest_that_names_no_table_is_refused_with_the_place() -> None:
    with pytest.raises(ManifestError) as refused:
        manifest(price="tables.goods[event.sku].price")
    assert refused.value.problems[0].startswith("m.toml: feature 'price': column 1: there is no table 'goods'")
