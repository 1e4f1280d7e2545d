"""The compiled features against a plain evaluator that takes one row at a time, and what is shared between models."""

from __future__ import annotations

import ast
import math
import warnings
from collections import Counter
from datetime import UTC, datetime
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel.errors import NotFound
from node.kernel.types import Aggregate, EventColumns, EventSchema, ModelName, StoredOutput
from tenants.features import compile_plan, evaluate_profile
from tenants.manifest import parse_manifest

DAY_MS = 86_400_000
SCHEMA = EventSchema(
    types=("search", "transaction", "page-view"),
    fields={"amount": "number", "quantity": "number", "channel": "text", "sku": "text", "online": "boolean"},
    profile={"spend": "sum(transaction.amount, '30d')"},
)
READS = {
    "sum(transaction.amount, '1d')": Aggregate("sum", "transaction", "amount", DAY_MS),
    "count(any, where=event.amount > 3)": Aggregate("count", "*", "", 0, "event.amount > 3"),
    "seconds_since(search)": Aggregate("since", "search"),
    "last(transaction.online)": Aggregate("last", "transaction", "online"),
    "profile.spend": Aggregate("sum", "transaction", "amount", 30 * DAY_MS),
    "models.ads.bid_fast.score": StoredOutput(ModelName("ads", "bid-fast"), "score"),
}
BOOLEAN_READ = "last(transaction.online)"


class CountedReads:
    """Columns by what is read, and how often each was asked for."""

    def __init__(self, columns: dict[object, np.ndarray]) -> None:
        self.columns = columns
        self.asked: Counter[object] = Counter()

    def aggregate(self, aggregate: Aggregate) -> np.ndarray:
        self.asked[aggregate] += 1
        return self.columns[aggregate]

    def stored(self, output: StoredOutput) -> np.ndarray:
        self.asked[output] += 1
        return self.columns[output]


def manifest(name: str, features: dict[str, str], on: str = "transaction", output: str = "score"):
    tenant, model = name.split("/")
    lines = [f"{key} = {quoted(text)}" for key, text in features.items()]
    text = "\n".join([f'on = "{on}"', f'output = "{output}"', "[features]", *lines])
    return parse_manifest(f"{name}.toml", tenant, model, text.encode(), SCHEMA)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def plan_of(*manifests):
    return compile_plan([(each.version("ab" * 32), each) for each in manifests], SCHEMA)


def events_of(rows: list[dict[str, object]]) -> EventColumns:
    def numbers(key: str) -> np.ndarray:
        return np.array([math.nan if row[key] is None else row[key] for row in rows], dtype=np.float64)

    def texts(key: str) -> np.ndarray:
        column = np.empty(len(rows), dtype=object)
        column[:] = [row[key] for row in rows]
        return column

    count = len(rows)
    return EventColumns(
        types=np.array([SCHEMA.types.index(str(row["type"])) for row in rows], dtype=np.int64),
        times_ms=np.array([row["time_ms"] for row in rows], dtype=np.int64),
        rows=np.arange(count),
        customers=[str(i) for i in range(count)],
        topics=np.zeros(count, dtype=np.int64),
        offsets=np.arange(count),
        fields={name: texts(name) if kind == "text" else numbers(name) for name, kind in SCHEMA.fields.items()},
    )


def reads_of(rows: list[dict[str, object]]) -> CountedReads:
    return CountedReads(
        {
            read: np.array([math.nan if row[text] is None else row[text] for row in rows], dtype=np.float64)
            for text, read in READS.items()
        }
    )


def finite(value: float | complex) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


ARITHMETIC = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
}
COMPARE = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
FUNCTIONS = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": math.sqrt,
    "log": math.log,
    "log1p": math.log1p,
    "exp": math.exp,
    "clip": lambda x, low, high: min(max(x, low), high),
    "hour": lambda t: datetime.fromtimestamp(math.floor(t), UTC).hour,
    "weekday": lambda t: datetime.fromtimestamp(math.floor(t), UTC).weekday(),
}


def plain(node: ast.expr, row: dict[str, object]):
    """One row's value of an expression: a float, a str, or None where missing. Knows nothing of columns."""
    text = ast.unparse(node)
    if text in row:
        return row[text]
    match node:
        case ast.Constant(value=value):
            return value if isinstance(value, str) else float(value)
        case ast.Attribute(value=ast.Name(id="event"), attr=name):
            return row["time_ms"] / 1000 if name == "time" else row[name]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return float(plain(operand, row) != 1.0)
        case ast.UnaryOp(operand=operand):
            return apply(lambda a: -a, [plain(operand, row)])
        case ast.BinOp(left=left, op=operator, right=right):
            return apply(ARITHMETIC[type(operator)], [plain(left, row), plain(right, row)])
        case ast.BoolOp(op=operator, values=values):
            truths = [plain(value, row) == 1.0 for value in values]
            return float(all(truths) if isinstance(operator, ast.And) else any(truths))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return plain(body if plain(test, row) == 1.0 else orelse, row)
        case ast.Compare(left=left, ops=operators, comparators=rights):
            return float(all(plain_pairs([left, *rights], operators, row)))
        case ast.Call(func=ast.Name(id="is_missing"), args=[argument]):
            return float(plain(argument, row) is None)
        case ast.Call(func=ast.Name(id="coalesce"), args=arguments):
            return next((v for v in (plain(argument, row) for argument in arguments) if v is not None), None)
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return apply(FUNCTIONS[name], [plain(argument, row) for argument in arguments])
    raise AssertionError(text)


def plain_pairs(nodes: list[ast.expr], operators: list[ast.cmpop], row: dict[str, object]):
    for left, operator, right in zip(nodes, operators, nodes[1:], strict=False):
        first = plain(left, row)
        second = [plain(each, row) for each in right.elts] if isinstance(right, ast.Tuple) else plain(right, row)
        yield first is not None and second is not None and COMPARE[type(operator)](first, second)


def apply(function, arguments: list[float | None]) -> float | None:
    if None in arguments:
        return None
    try:
        return finite(function(*arguments))
    except (ArithmeticError, ValueError):
        return None


LITERALS = st.sampled_from(["0", "1", "-2.5", "3", "1e15", "0.25", "1e200", "True"])
TEXT_LITERALS = st.sampled_from(["'web'", "'app'", "''", "'a\\x00'"])


@cache
def numbers_of(features: tuple[str, ...], depth: int) -> st.SearchStrategy[str]:
    leaves = LITERALS | st.sampled_from(
        ["event.amount", "event.quantity", "event.online", "event.time", *features, *READS]
    )
    if depth == 0:
        return leaves
    number = st.deferred(lambda: numbers_of(features, depth - 1))
    condition = st.deferred(lambda: conditions_of(features, depth - 1))
    binary = st.sampled_from(["+", "-", "*", "/", "//", "%"])
    unary = st.sampled_from(["-", "abs", "round", "floor", "ceil", "sqrt"])
    return (
        leaves
        | st.builds("({}) {} ({})".format, number, binary, number)
        | st.builds("{}({})".format, unary, number)
        | st.builds("{}({}, {})".format, st.sampled_from(["min", "max", "coalesce"]), number, number)
        | st.builds("clip({}, {}, {})".format, number, number, number)
        | st.builds("({}) if ({}) else ({})".format, number, condition, number)
        | st.sampled_from(["hour(event.time)", "weekday(event.time)"])
        | condition
    )


@cache
def texts_of(features: tuple[str, ...], depth: int) -> st.SearchStrategy[str]:
    leaves = TEXT_LITERALS | st.sampled_from(["event.channel", "event.sku", "event.type"])
    if depth == 0:
        return leaves
    text = st.deferred(lambda: texts_of(features, depth - 1))
    condition = st.deferred(lambda: conditions_of(features, depth - 1))
    return (
        leaves
        | st.builds("coalesce({}, {})".format, text, text)
        | st.builds("({}) if ({}) else ({})".format, text, condition, text)
    )


@cache
def conditions_of(features: tuple[str, ...], depth: int) -> st.SearchStrategy[str]:
    leaves = st.sampled_from(["event.online", "True", "False", BOOLEAN_READ])
    if depth == 0:
        return leaves
    number = st.deferred(lambda: numbers_of(features, depth - 1))
    text = st.deferred(lambda: texts_of(features, depth - 1))
    condition = st.deferred(lambda: conditions_of(features, depth - 1))
    comparison = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
    equality = st.sampled_from(["==", "!="])
    membership = st.sampled_from(["in", "not in"])
    return (
        leaves
        | st.builds("({}) {} ({})".format, number, comparison, number)
        | st.builds("({}) < ({}) <= ({})".format, number, number, number)
        | st.builds("({}) {} ({})".format, text, equality, text)
        | st.builds("({}) {} ({}, {})".format, number, membership, LITERALS, LITERALS)
        | st.builds("({}) {} ({},)".format, text, membership, TEXT_LITERALS)
        | st.builds("({}) {} ({}, {})".format, text, membership, TEXT_LITERALS, TEXT_LITERALS)
        | st.builds("({}) {} ({})".format, condition, st.sampled_from(["and", "or"]), condition)
        | st.builds("not ({})".format, condition)
        | st.builds("is_missing({})".format, number | text)
    )


@st.composite
def feature_tables(draw: st.DrawFn) -> dict[str, str]:
    """A few features, each of which may use the number features above it."""
    table: dict[str, str] = {}
    for index in range(draw(st.integers(1, 4))):
        above = tuple(name for name in table if name.startswith("n"))
        if draw(st.integers(0, 3)) == 0:
            table[f"t{index}"] = draw(texts_of(above, 2))
        else:
            table[f"n{index}"] = draw(numbers_of(above, 3))
    return table


NUMBERS = st.none() | st.sampled_from([0.0, 1.0, -1.0, 2.5, -1e15, 1e15]) | st.floats(-1e6, 1e6)
TEXTS = st.none() | st.sampled_from(["web", "app", "", "a", "a\x00"])
FLAGS = st.none() | st.sampled_from([0.0, 1.0])
ROWS = st.fixed_dictionaries(
    {
        "type": st.sampled_from(SCHEMA.types),
        "time_ms": st.integers(-(10**12), 10**13),
        "amount": NUMBERS,
        "quantity": NUMBERS,
        "channel": TEXTS,
        "sku": TEXTS,
        "online": FLAGS,
        **{text: FLAGS if text == BOOLEAN_READ else NUMBERS for text in READS},
    }
)
PROVIDER = manifest("ads/bid-fast", {"a": "event.amount"}, on="search")


def expected_rows(features: dict[str, str], rows: list[dict[str, object]]) -> list[dict[str, object]]:
    found = []
    for row in rows:
        known = dict(row)
        for name, text in features.items():
            known[name] = plain(ast.parse(text, mode="eval").body, known)
        found.append({name: known[name] for name in features})
    return found


def assert_rows(rows, features: dict[str, str], expected: list[dict[str, object]], tolerance: float = 0.0) -> None:
    assert rows.names == tuple(features)
    assert rows.numbers.shape == (len(expected), len(features))
    assert rows.numbers.dtype == np.float64
    assert rows.numbers.flags.c_contiguous
    for column, name in enumerate(features):
        wanted = [row[name] for row in expected]
        if name.startswith("t"):
            assert rows.texts[name] == wanted
            assert np.isnan(rows.numbers[:, column]).all()
        else:
            floats = np.array([math.nan if value is None else value for value in wanted], dtype=np.float64)
            np.testing.assert_allclose(rows.numbers[:, column], floats, rtol=tolerance, atol=0, err_msg=features[name])


@settings(max_examples=400, deadline=None)
@given(st.data(), feature_tables(), feature_tables(), st.lists(ROWS, min_size=1, max_size=8))
def test_columns_are_what_a_plain_evaluator_finds_row_by_row(data, first, second, rows):
    masks = st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)).map(
        lambda flags: np.array(flags, dtype=bool)
    )
    selections = {ModelName("a", "first"): data.draw(masks), ModelName("b", "second"): data.draw(masks)}
    plan = plan_of(manifest("a/first", first), manifest("b/second", second), PROVIDER)
    reads = reads_of(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = plan.rows(events_of(rows), reads, selections)
    assert found.keys() == selections.keys()
    for features, (name, selection) in zip((first, second), selections.items(), strict=True):
        selected = [row for row, chosen in zip(rows, selection, strict=True) if chosen]
        assert_rows(found[name], features, expected_rows(features, selected))
    assert all(times == 1 for times in reads.asked.values())


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["log({})", "log1p({})", "exp({})", "({}) ** 2", "({}) ** event.quantity", "2 ** ({})"]),
    numbers_of((), 1),
    st.lists(ROWS, min_size=1, max_size=8),
)
def test_transcendental_functions_are_close_to_a_plain_evaluator(wrapper, inner, rows):
    # Apart from the exact test: numpy's vector code may differ from libm in the last digits.
    features = {"n": wrapper.format(inner)}
    plan = plan_of(manifest("a/first", features), PROVIDER)
    selection = {ModelName("a", "first"): np.ones(len(rows), dtype=bool)}
    found = plan.rows(events_of(rows), reads_of(rows), selection)
    assert_rows(found[ModelName("a", "first")], features, expected_rows(features, rows), tolerance=1e-12)


FILTERS = st.recursive(
    st.sampled_from(
        ["event.amount > 3", "event.channel == 'web'", "event.online", "event.type in ('search', 'page-view')"]
    ),
    lambda inner: (
        st.builds("({}) {} ({})".format, inner, st.sampled_from(["and", "or", "!="]), inner)
        | st.builds("not ({})".format, inner)
    ),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(FILTERS, max_size=3), st.lists(ROWS, max_size=6))
def test_masks_are_what_a_plain_evaluator_finds_row_by_row(filters, rows):
    features = {f"n{index}": f"count(any, where={text})" for index, text in enumerate(filters)}
    plan = plan_of(manifest("a/first", {"n": "count(any)", **features}))
    wheres = {aggregate.where for aggregate in plan.aggregates}
    masks = plan.masks(events_of(rows), wheres)
    assert masks.keys() == plan.computable(wheres) == wheres - {""}
    for text in filters:
        node = ast.parse(text, mode="eval").body
        assert masks[ast.unparse(node)].dtype == np.bool_
        assert masks[ast.unparse(node)].tolist() == [plain(node, row) == 1.0 for row in rows]


def one_row(**fields: object) -> dict[str, object]:
    return {"type": "search", "time_ms": 0, **dict.fromkeys(SCHEMA.fields), **dict.fromkeys(READS), **fields}


def value_of(text: str, **fields: object) -> float | str | None:
    plan = plan_of(manifest("a/first", {"x": text}), PROVIDER)
    rows = [one_row(**fields)]
    found = plan.rows(events_of(rows), reads_of(rows), {ModelName("a", "first"): np.ones(1, dtype=bool)})
    result = found[ModelName("a", "first")]
    return result.texts["x"][0] if result.texts else float(result.numbers[0, 0])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7 // 2 + 7 % 4 - -7 // 2", 10.0),
        ("2 ** 10", 1024.0),
        ("round(2.5)", 2.0),
        ("hour(1700000000)", 22.0),
        ("weekday(1700000000)", 1.0),
        ("weekday(-1)", 2.0),
        ("clip(5, 0, 3)", 3.0),
        ("'b' if event.channel == 'web' else 'c'", "b"),
        ("coalesce(event.sku, 'none')", "none"),
        ("is_missing(event.sku) + is_missing(event.channel)", 1.0),
        ("(event.amount != 1) + (event.amount == 1) + (event.amount not in (1,))", 0.0),
        ("not event.online", 1.0),
        ("'yes' if event.online else 'no'", "no"),
        ("event.sku != 'a'", 0.0),
        ("0 < 1 < 2", 1.0),
    ],
)
def test_examples(text, value):
    assert value_of(text, channel="web") == value


NOT_FINITE = (
    "1/0, 1//0, 1%0, log(0), log(-1), sqrt(-1), exp(1000), (-8)**0.5, 0**-1, 1e300*1e300, 1e308+1e308, -1e308-1e308"
)


@pytest.mark.parametrize("text", NOT_FINITE.split(", "))
def test_a_result_that_is_no_finite_number_is_missing(text):
    assert math.isnan(value_of(text))


@pytest.mark.parametrize("text", ["event.amount ** 0", "1 ** event.amount", "min(1, event.amount)", "-event.amount"])
def test_what_has_a_missing_operand_is_missing(text):
    assert math.isnan(value_of(text))


def test_equal_values_are_computed_once_across_features_and_models():
    one = manifest("a/one", {"spend": "sum(transaction.amount, '1d')", "log_spend": "log1p(spend)"})
    two = manifest(
        "b/two", {"x": "log1p(sum(transaction.amount, '1d'))", "y": "log1p( sum(transaction.amount,'1d') ) "}
    )
    plan = plan_of(one, two)
    assert plan.statistics() == {"models": 2, "features": 4, "values": 2}
    rows = [one_row(**{"sum(transaction.amount, '1d')": 5.0})]
    reads = reads_of(rows)
    every = np.ones(1, dtype=bool)
    found = plan.rows(events_of(rows), reads, {ModelName("a", "one"): every, ModelName("b", "two"): every})
    assert reads.asked == {READS["sum(transaction.amount, '1d')"]: 1}
    assert found[ModelName("a", "one")].numbers.tolist() == [[5.0, np.log1p(5.0)]]
    assert found[ModelName("b", "two")].numbers.tolist() == [[np.log1p(5.0)] * 2]


def test_a_chain_of_doublings_stays_small():
    features = {"n0": "event.amount"} | {f"n{i}": f"n{i - 1} + n{i - 1}" for i in range(1, 300)}
    plan = plan_of(manifest("a/chain", features))
    assert plan.statistics()["values"] == 300
    rows = [one_row(amount=3.0)]
    found = plan.rows(events_of(rows), reads_of(rows), {ModelName("a", "chain"): np.ones(1, dtype=bool)})
    assert found[ModelName("a", "chain")].numbers[0, -1] == 3.0 * 2.0**299


def test_only_what_a_selected_model_needs_is_read():
    plan = plan_of(
        manifest("a/one", {"x": "sum(transaction.amount, '1d')"}),
        manifest("b/two", {"t": "event.sku", "y": "profile.spend"}),
    )
    rows = [one_row(), one_row()]
    reads = reads_of(rows)
    none, every = np.zeros(2, dtype=bool), np.ones(2, dtype=bool)
    found = plan.rows(events_of(rows), reads, {ModelName("a", "one"): every, ModelName("b", "two"): none})
    assert set(reads.asked) == {READS["sum(transaction.amount, '1d')"]}
    empty = found[ModelName("b", "two")]
    assert (empty.numbers.shape, dict(empty.texts)) == ((0, 2), {"t": []})
    assert plan.rows(events_of(rows), reads, {}) == {}


def test_the_plan_keeps_the_aggregates_of_the_profile_sorted_and_once():
    plan = plan_of(manifest("a/one", {"x": "profile.spend", "y": "count(any)", "z": "min(search.amount)"}))
    assert plan.aggregates == tuple(sorted({*evaluate_profile(SCHEMA).values(), Aggregate("min", "search", "amount")}))
    assert plan.stored_models == plan.models


def test_outputs_are_resolved_to_live_models_and_missing_without_one():
    reader = manifest(
        "a/one", {"x": "models.ads.bid_fast.score", "y": "models.ads.bid_fast.other", "z": "models.no.one.x"}
    )
    plan = plan_of(reader, PROVIDER)
    assert [str(output) for output in plan.unresolved] == ["models.ads.bid_fast.other", "models.no.one.x"]
    rows = [one_row(**{"models.ads.bid_fast.score": 0.5})]
    reads = reads_of(rows)
    found = plan.rows(events_of(rows), reads, {ModelName("a", "one"): np.ones(1, dtype=bool)})
    np.testing.assert_array_equal(found[ModelName("a", "one")].numbers, [[0.5, np.nan, np.nan]])
    assert reads.asked == {StoredOutput(ModelName("ads", "bid-fast"), "score"): 1}


def test_a_model_outside_the_plan_is_refused():
    rows = [one_row()]
    with pytest.raises(NotFound, match="a/other"):
        plan_of().rows(events_of(rows), reads_of(rows), {ModelName("a", "other"): np.ones(1, dtype=bool)})


def test_a_few_selected_events_of_many_are_gathered():
    features = {"x": "event.amount * 2", "t": "event.channel"}
    plan = plan_of(manifest("a/one", features), manifest("b/two", {"y": "event.amount"}))
    rows = [one_row(amount=float(i), channel=str(i)) for i in range(100)]
    first, second = np.zeros(100, dtype=bool), np.zeros(100, dtype=bool)
    first[[3, 50, 99]] = True
    second[[4, 50]] = True
    found = plan.rows(events_of(rows), reads_of(rows), {ModelName("a", "one"): first, ModelName("b", "two"): second})
    assert found[ModelName("a", "one")].numbers[:, 0].tolist() == [6.0, 100.0, 198.0]
    assert found[ModelName("a", "one")].texts == {"t": ["3", "50", "99"]}
    assert found[ModelName("b", "two")].numbers.tolist() == [[4.0], [50.0]]
