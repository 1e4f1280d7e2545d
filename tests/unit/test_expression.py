"""The expression language: what it takes, what it refuses and where, and that no text breaks it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel.errors import ConfigError
from node.kernel.limits import EXPRESSION_BYTES_MAX, EXPRESSION_DEPTH_MAX, WINDOW_MS_MAX
from node.kernel.types import Aggregate, EventSchema, ModelName, StoredOutput
from tenants.expression import (
    AggregateValue,
    EventField,
    ExpressionError,
    FeatureValue,
    Literal,
    Membership,
    Operation,
    Scope,
    StoredValue,
    evaluate_profile,
    expression_name,
    parse_expression,
    parse_filter,
)
from tenants.wording import parse_duration

HOUR_MS = 3_600_000
SCHEMA = EventSchema(
    types=("search", "transaction", "page-view"),
    fields={"amount": "number", "channel": "text", "online": "boolean", "utm-source": "text"},
    profile={"spend": "sum(transaction.amount, '30d')"},
)
SCOPE = Scope(SCHEMA, evaluate_profile(SCHEMA), {"spend_30d": "number", "kind": "text", "broken": None}, ("below",))
AMOUNT = EventField("amount", "number")


def parse(text: str):
    return parse_expression(text, SCOPE)


def problems(text: str) -> list[str]:
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("1", Literal(1.0, "number")),
        ("True", Literal(1.0, "boolean")),
        ("'a'", Literal("a", "text")),
        ("event.amount", AMOUNT),
        ("event.time", EventField("time", "number")),
        ("event.type", EventField("type", "text")),
        ("event['utm-source']", EventField("utm-source", "text")),
        ("spend_30d", FeatureValue("spend_30d", "number")),
        ("models.grocery_fraud.a.score", StoredValue(StoredOutput(ModelName("grocery_fraud", "a"), "score"))),
        ("models['grocery-fraud'].a.score", StoredValue(StoredOutput(ModelName("grocery_fraud", "a"), "score"))),
        ("profile.events", AggregateValue(Aggregate("count", "*"))),
        ("profile.first_seen", AggregateValue(Aggregate("min", "*", "time"))),
        ("profile.last_seen", AggregateValue(Aggregate("max", "*", "time"))),
        ("profile.spend", AggregateValue(Aggregate("sum", "transaction", "amount", 30 * 24 * HOUR_MS))),
        ("event.channel == 'web'", Membership(EventField("channel", "text"), frozenset({"web"}))),
        ("'web' != event.channel", Membership(EventField("channel", "text"), frozenset({"web"}), negated=True)),
        ("event.amount in (1, -2)", Membership(AMOUNT, frozenset({1.0, -2.0}))),
        ("event.amount not in [1]", Membership(AMOUNT, frozenset({1.0}), negated=True)),
        ("-event.amount", Operation("negate", (AMOUNT,), "number")),
        ("min(event.amount, 3)", Operation("min", (AMOUNT, Literal(3.0, "number")), "number")),
        ("event.online + 1", Operation("+", (EventField("online", "boolean"), Literal(1.0, "number")), "number")),
    ],
)
def test_an_expression_becomes_a_typed_tree(text, node):
    assert parse(text) == node


@pytest.mark.parametrize(
    ("text", "aggregate"),
    [
        ("count(transaction)", Aggregate("count", "transaction")),
        ("count('page-view', '5m')", Aggregate("count", "page-view", "", 300_000)),
        ("count(any, '1h')", Aggregate("count", "*", "", HOUR_MS)),
        ("min(transaction.amount)", Aggregate("min", "transaction", "amount")),
        ("max(any.amount, '2w')", Aggregate("max", "*", "amount", 14 * 24 * HOUR_MS)),
        ("distinct('page-view'['utm-source'], '90s')", Aggregate("distinct", "page-view", "utm-source", 90_000)),
        ("seconds_since(search)", Aggregate("since", "search")),
        ("count(any, session='30m')", Aggregate("count", "*", "", -HOUR_MS // 2)),
        ("max(any.time, session='1h')", Aggregate("max", "*", "time", -HOUR_MS)),
        (
            "sum(transaction.amount, session='1h', where=event.channel == 'web')",
            Aggregate("sum", "transaction", "amount", -HOUR_MS, "event.channel == 'web'"),
        ),
        (
            "count(transaction,'1h',where=(event.channel==\"web\")and event.amount>3)",
            Aggregate("count", "transaction", "", HOUR_MS, "event.channel == 'web' and event.amount > 3"),
        ),
    ],
)
def test_aggregates_say_what_the_row_must_hold(text, aggregate):
    assert parse(text) == AggregateValue(aggregate)


def test_the_last_value_of_a_boolean_is_boolean():
    assert parse("last(transaction.online)").type == "boolean"
    assert parse("mean(transaction.online)").type == "number"


def test_a_chain_of_comparisons_is_all_of_its_pairs():
    assert parse("0 < event.amount <= 5") == parse("0 < event.amount and event.amount <= 5")


def test_lines_may_be_broken_in_a_multi_line_text():
    assert parse("\n  min(event.amount,\n      3)\n") == parse("min(event.amount, 3)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("event.amout", ["column 1: unknown event field 'amout', did you mean 'amount'?"]),
        ("'é' == event.amout", ["column 8: unknown event field 'amout', did you mean 'amount'?"]),
        ("  event.amout", ["column 3: unknown event field 'amout', did you mean 'amount'?"]),
        ("below", ["column 1: feature 'below' is not defined above; a feature may use only the ones above it"]),
        ("spend_3d", ["column 1: unknown feature 'spend_3d', did you mean 'spend_30d'?"]),
        ("amount", ["column 1: unknown feature 'amount', did you mean event.amount?"]),
        ("profile.spent", ["column 1: unknown profile value 'spent', did you mean 'spend'?"]),
        ("cuont(search)", ["column 1: unknown function 'cuont', did you mean 'count'?"]),
        ("count(serch)", ["column 7: unknown event type 'serch', did you mean 'search'?"]),
        ("sum(transaction.amont)", ["column 5: unknown event field 'amont', did you mean 'amount'?"]),
        (
            "tables.products[event.channel].price",
            ["column 1: there is no table 'products'; put it first; there are none"],
        ),
        ("broken + 1", []),
    ],
)
def test_a_mistake_is_told_with_its_place_and_what_was_meant(text, expected):
    assert problems(text) == expected


def test_every_mistake_of_an_expression_is_told():
    assert [problem.split(":")[0] for problem in problems("event.a + event.b * log(event.c)")] == [
        "column 1",
        "column 11",
        "column 25",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "1 +",
        "a) + (b",
        "event",
        "event.amount.x",
        "event[0]",
        "event[event.channel]",
        "models.ads.bid",
        "models.ads.bid.score.x",
        "profile.spend.x",
        "transaction.amount",
        "transaction",
        "event.channel + 1",
        "event.channel < 'a'",
        "event.channel == 1",
        "event.amount == 'a'",
        "event.amount in ('a', 1)",
        "event.amount in ()",
        "event.amount in event.channel",
        "event.amount in (event.time,)",
        "event.amount is 1",
        "not event.amount",
        "event.amount and True",
        "1 if event.amount else 2",
        "1 if True else 'a'",
        "coalesce(1, 'a')",
        "log(event.channel)",
        "log(1, 2)",
        "log(x=1)",
        "clip(1, 2)",
        "min(1)",
        "abs(transaction.amount)",
        "sum(transaction)",
        "sum(event.amount, '1h')",
        "sum(transaction.channel)",
        "distinct(transaction.online)",
        "count(transaction, 3600)",
        "count(transaction, '0s')",
        "count(transaction, '401d')",
        "count(transaction, '1h', '2h')",
        "count(transaction, '1h', session='2h')",
        "count(transaction, session='0s')",
        "count(transaction, session='401d')",
        "count(transaction, session=30)",
        "seconds_since(transaction, session='1h')",
        "count(transaction, '1h', were=True)",
        "count(transaction, where=spend_30d > 1)",
        "count(transaction, where=event.amount)",
        "count(transaction, where=count(search) > 1)",
        "count(transaction, where=profile.spend > 1)",
        "count(transaction, where=models.ads.bid.score > 1)",
        "count(transaction, where=min(search.amount) > 1)",
        "seconds_since(transaction, '1h')",
        "~1",
        "1 & 2",
        "1j",
        "b'a'",
        "None",
        "...",
        "1e999",
        "'\\ud800'",
        "f'{1}'",
        "[1, 2]",
        "{}",
        "(lambda: 1)()",
        "(x := 1)",
        "[x for x in (1, 2)]",
        "__import__('os').system('true')",
        "event.__class__",
        "().__class__",
        "count(transaction, *[1])",
        "count(transaction, **{})",
        "log(*(1,))",
        "\x00",
        "0x" + "f" * 1000,
    ],
)
def test_what_is_not_in_the_language_is_refused(text):
    assert problems(text)


def test_depth_and_size_are_bounded():
    assert parse("-" * (EXPRESSION_DEPTH_MAX - 1) + "1").type == "number"
    for text in (
        "-" * EXPRESSION_DEPTH_MAX + "1",
        "(" * 1500 + "1" + ")" * 1500,
        "-" * 4000 + "1",
        "not " * 1000 + "1",
    ):
        assert "nested" in problems(text)[0] or "not an expression" in problems(text)[0]
    assert "longer than" in problems("1" + " " * EXPRESSION_BYTES_MAX)[0]


def test_profile_values_of_the_operator_are_single_aggregates_under_names_of_their_own():
    schema = EventSchema(
        ("search",), {"amount": "number"}, {"events": "count(search)", "a": "1 + count(search)", "b": "count(serch)"}
    )
    with pytest.raises(ConfigError) as caught:
        evaluate_profile(schema)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "profile 'events'",
        "profile 'a'",
        "profile 'b'",
    ]
    assert evaluate_profile(SCHEMA).keys() == {"events", "first_seen", "last_seen", "spend"}


def test_a_model_is_known_to_expressions_without_hyphens():
    assert expression_name(ModelName("grocery-fraud", "a-b_c")) == ModelName("grocery_fraud", "a_b_c")


@given(st.integers(1, 400), st.sampled_from(["s", "m", "h", "d", "w"]))
def test_durations(count, unit):
    duration_ms = count * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[unit] * 1000
    if duration_ms <= WINDOW_MS_MAX:
        assert parse_duration(f"{count}{unit}", WINDOW_MS_MAX) == duration_ms
    else:
        with pytest.raises(ValueError, match="at most 400d"):
            parse_duration(f"{count}{unit}", WINDOW_MS_MAX)


@pytest.mark.parametrize("text", ["", "1", "h", "-1h", "1.5h", "1 h", "1H", "1ms", "٣h", "9" * 99 + "s", "1h30m"])
def test_other_texts_are_no_durations(text):
    with pytest.raises(ValueError, match=r"is not a duration|at most"):
        parse_duration(text, WINDOW_MS_MAX)


WORDS = """event profile models tables transaction any amount channel online count sum min max where seconds_since
coalesce if else and or not in is lambda for . , ( ) [ ] { } + - * / // % ** == != < <= = : := ' " \\ # @ 1 2.5 1e999
0xg 1_0 'web' '1h' '30x' True None f'' b'' ; ~ spend_30d broken below é ✓ 𝟙"""
TOKENS = st.sampled_from([*WORDS.split(), " ", "\n", "\t", "\x00", "\ud800"])
SOUP = st.lists(TOKENS, max_size=24).map(" ".join) | st.lists(TOKENS, max_size=24).map("".join)


@settings(max_examples=600, deadline=None)
@given(st.text(max_size=60) | SOUP)
def test_no_text_breaks_the_parser(text):
    try:
        node = parse(text)
    except ExpressionError as error:
        for problem in error.problems:
            assert 1 <= problem.column <= len(text) + 1
            assert str(problem).isprintable()
    else:
        assert node.type in ("number", "text", "boolean")


FILTERS = st.recursive(
    st.sampled_from(
        [
            'event.channel=="web"',
            "event.channel in ['a','it\\'s', \"\\\\\"]",
            "(event.amount)>-3",
            "not event.online",
            "event.type!='search'",
            "is_missing( event['utm-source'] )",
            "hour(event.time)<6",
            "1e300<event.amount*2**2",
        ]
    ),
    lambda inner: (
        st.builds("({}) {} ({})".format, inner, st.sampled_from(["and", "or", "=="]), inner)
        | st.builds("({0}) if ({1}) else not({0})".format, inner, inner)
    ),
    max_leaves=5,
)


@settings(deadline=None)
@given(FILTERS)
def test_the_text_of_a_filter_is_canonical(text):
    aggregate = parse(f"count(transaction, '1h', where={text})").aggregate
    again = parse(f"count(transaction, '1h', where={aggregate.where})").aggregate
    assert again == aggregate
    assert parse_filter(aggregate.where, SCHEMA) == parse_filter(text, SCHEMA)
