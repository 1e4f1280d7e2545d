"""Manifests and tenant settings: what they say, and every mistake in them on a line of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel.errors import ManifestError
from node.kernel.limits import FEATURES_PER_MODEL_MAX, MANIFEST_BYTES_MAX
from node.kernel.types import Aggregate, EventSchema, ModelName, Schedule, StoredOutput
from tenants.manifest import TenantCaps, TenantSettings, is_name, parse_manifest, parse_tenant

SCHEMA = EventSchema(("search", "transaction"), {"amount": "number", "channel": "text"})
FILE = "grocery-fraud/coupon_abuse.toml"
MANIFEST = b"""
on       = ["transaction"]
output   = ["low", "high"]
method   = "transform"
ttl      = "2d"
deadline = "250ms"
weight   = 2
[features]
amount      = "event.amount"
spend_30d   = "sum(transaction.amount, '30d')"
usual       = "spend_30d / max(1, count(transaction, '30d'))"
"Unit Bid"  = "models.ads.bid.score"
channel     = "event.channel"
"""


def parse(text: str | bytes, tenant: str = "grocery-fraud", model: str = "coupon_abuse"):
    return parse_manifest(FILE, tenant, model, text.encode() if isinstance(text, str) else text, SCHEMA)


def problems(text: str | bytes, **names: str) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse(text, **names)
    assert all(problem.startswith(FILE + ": ") for problem in caught.value.problems)
    return [problem.removeprefix(FILE + ": ") for problem in caught.value.problems]


def test_a_manifest_says_what_triggers_the_model_and_what_its_columns_are():
    manifest = parse(MANIFEST)
    assert manifest.name == ModelName("grocery-fraud", "coupon_abuse")
    assert (manifest.events, manifest.outputs, manifest.method) == (("transaction",), ("low", "high"), "transform")
    assert (manifest.ttl_ms, manifest.deadline_ms, manifest.weight) == (2 * 86_400_000, 250, 2.0)
    assert list(manifest.feature_types.items()) == [
        ("amount", "number"),
        ("spend_30d", "number"),
        ("usual", "number"),
        ("Unit Bid", "number"),
        ("channel", "text"),
    ]
    month_ms = 30 * 86_400_000
    assert manifest.aggregates == (
        Aggregate("count", "transaction", "", month_ms),
        Aggregate("sum", "transaction", "amount", month_ms),
    )
    assert manifest.stored_outputs == (StoredOutput(ModelName("ads", "bid"), "score"),)


def test_what_is_left_out_has_a_default():
    manifest = parse("on = 'search'\n[features]\na = '1'")
    assert (manifest.events, manifest.outputs, manifest.method) == (("search",), ("score",), "predict_proba")
    assert (manifest.ttl_ms, manifest.deadline_ms, manifest.weight) == (30 * 86_400_000, 1000, 1.0)
    assert parse("on = 'any'\nttl = 'never'\n[features]\na = '1'").events == SCHEMA.types
    assert parse("on = 'any'\nttl = 'never'\n[features]\na = '1'").ttl_ms == 0


def test_the_version_is_the_hash_of_model_and_manifest():
    manifest = parse(MANIFEST)
    version = manifest.version("ab" * 32, ("no", "yes"))
    assert version.version == hashlib.sha256(b"ab" * 32 + b"\n" + MANIFEST).hexdigest()
    assert version.features == ("amount", "spend_30d", "usual", "Unit Bid", "channel")
    assert (version.blob, version.labels, version.deadline_ms) == ("ab" * 32, ("no", "yes"), 250)
    assert version.version != manifest.version("cd" * 32).version
    assert version.version != parse(MANIFEST + b"\n").version("ab" * 32).version


def test_every_mistake_has_a_line_with_its_place():
    found = problems("""
        on = ["transactoin"]
        outptu = "score"
        method = "predict_prob"
        ttl = 3
        deadline = "11m"
        weight = true
        output = ["a b", "c"]
        [features]
        first = "event.amout + event.chanel"
        second = "first * 2"
        third = 3
        fourth = "fifth"
        fifth = "log(1, 2)"
    """)
    assert found == [
        "unknown key 'outptu', did you mean 'output'?",
        "on: unknown event type 'transactoin', did you mean 'transaction'?",
        "output 'a b' must be 1 to 63 of a-z, A-Z, 0-9 and '_', not starting with a digit",
        "method 'predict_prob' is not one of predict_proba, predict, transform, decision_function, score_samples, "
        "did you mean 'predict_proba'?",
        "ttl must be a duration in quotes such as '30d', not 3",
        "deadline '11m' must be more than 0 and at most 10m",
        "weight must be a number from 0.001 to 1000, not True",
        "feature 'first': column 1: unknown event field 'amout', did you mean 'amount'?",
        "feature 'first': column 15: unknown event field 'chanel', did you mean 'channel'?",
        "feature 'third': must be an expression in quotes, not 3",
        "feature 'fourth': column 1: feature 'fifth' is not defined above; a feature may use only the ones above it",
        "feature 'fifth': column 1: log takes 1 argument(s), 2 given",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[features]\na = '1'", "on is missing"),
        ("every = '15m'\non = ['search']\n[features]\na = '1'", "either on (event types) or every or at"),
        ("every = '15m'\nat = '06:00'\n[features]\na = '1'", "either every = "),
        ("all = true\n[features]\na = '1'", "either every = "),
        ("every = 15\n[features]\na = '1'", "every must be a duration"),
        ("every = '1h'\nall = 'yes'\n[features]\na = '1'", "all must be true or false"),
        ("every = '1h'\nzone = 'UTC'\n[features]\na = '1'", "zone says something only beside at"),
        ("every = '1h'\ngrace = '5m'\n[features]\na = '1'", "grace says something only beside by"),
        ("every = '1h'\nby = 'moon'\n[features]\na = '1'", "by 'moon' is not one of clock, event"),
        ("at = '06:00'\nby = 'event'\n[features]\na = '1'", "by says something only beside every"),
        ("at = '6:00'\n[features]\na = '1'", "at must be a time of day"),
        ("at = '24:00'\n[features]\na = '1'", "at must be a time of day"),
        ("at = '06:00'\nzone = '../x'\n[features]\na = '1'", "time zone '../x' is not known"),
        ("every = '1h'\n[features]\na = '1 + event.amount'", "event.amount has no value in an interval model"),
        ("every = '1h'\n[features]\na = 'hour(event.time)'", "event.time has no value in an interval model"),
        ("on = []\n[features]\na = '1'", "on must be an event type"),
        ("on = ['search', 'search']\n[features]\na = '1'", "the same one twice"),
        ("on = [1]\n[features]\na = '1'", "on must be an event type"),
        ("on = 'search'", "[features] is missing"),
        ("on = 'search'\nfeatures = 1", "[features] is missing"),
        ("on = 'search'\n[features]", "[features] is missing"),
        ("on = 'search'\noutput = []\n[features]\na = '1'", "output must be"),
        ("on = 'search'\nweight = nan\n[features]\na = '1'", "weight must be"),
        ("on = 'search'\nweight = 0x" + "f" * 9000 + "\n[features]\na = '1'", "a number far too large"),
        ("on = 'search'\n[features]\na." + "b." * 25 + "c = '1'", "expression in quotes, not a table"),
        ("on = " + "[" * 300 + "]" * 300 + "\n[features]\na = '1'", "not a list"),
        ("on = 'search'\nttl = '0d'\n[features]\na = '1'", "ttl '0d' must be"),
        ("on = 'search'\nmethod = ['predict']\n[features]\na = '1'", "method"),
        ("on = 'search'\n[features]\na = 'a + 1'", "feature 'a' is not defined above"),
        ("on = 'search'\n[features]\n'' = '1'", "name must be printable"),
        ("on = 'search'\n[features]\na.b = '1'", "feature 'a': must be an expression in quotes"),
        ("on = 'search'\n[features]\na = '1'\na = '2'", "not TOML"),
        ("on = ", "not TOML"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"a" * (MANIFEST_BYTES_MAX + 1), "longer than"),
        ("a = " + "[" * 5000, "nested too deeply"),
        (
            "on = 'search'\n[features]\n" + "\n".join(f"a{i} = '1'" for i in range(FEATURES_PER_MODEL_MAX + 1)),
            "the most is",
        ),
        ("on = 'search'\n[features]\na = '1'\noutput = " + "9" * 5000, "not TOML"),
    ],
)
def test_mistakes(text, expected):
    assert any(expected in problem for problem in problems(text))


@pytest.mark.parametrize("line", ["log_rows = 0.1", "ttl = '30d'", "shared_with = ['ads']", "method = 'predict'"])
def test_a_key_of_the_manifest_below_the_features_is_told_where_it_belongs(line):
    (found,) = problems(f"on = 'search'\n[features]\na = '1'\n{line}")
    assert found.startswith(f"feature '{line.split()[0]}': ")
    assert found.endswith("; if the manifest's own key is meant, write it above [features]")


@pytest.mark.parametrize("part", ["a", '"\\"x"', "'.'", '"a b" \t'])
@pytest.mark.parametrize("key", ["{} = 1", "[{}]", "[[{}]]", "a = {{ {} = 1 }}", "a = {{b=1,{} = 1}}"])
def test_a_key_that_would_take_all_memory_is_refused_before_it_is_parsed(part, key):
    assert problems(key.format(".".join([part] * 20_000)))[0].startswith("a dotted name of more than 32 parts")


def test_names_of_tenants_and_models_are_checked():
    good = "on = 'search'\n[features]\na = '1'"
    assert "tenant name 'Ads'" in problems(good, tenant="Ads")[0]
    assert "model name '../x'" in problems(good, model="../x")[0]
    assert is_name("a" * 63)
    assert not any(is_name(name) for name in ("", "a" * 64, "-a", "_a", "a.b", "é", "a\n"))


def test_the_mistakes_told_are_bounded():
    unknown = "on = 'search'\n[features]\n" + "\n".join(f"a{i} = 'b{i} + c{i}'" for i in range(200))
    found = problems(unknown)
    assert len(found) == 101
    assert found[-1] == "there may be more mistakes; mend these first"
    one = problems("on = 'search'\n[features]\na = '" + " + ".join(f"b{i}" for i in range(25)) + "'")
    assert len(one) == 20


VALUES = st.recursive(
    st.text(max_size=12) | st.integers() | st.floats() | st.booleans() | st.just("transaction") | st.just("1h"),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


def toml(value: object) -> str:
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08x}" if not "\ud800" <= c <= "\udfff" else "?" for c in value) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value).lower()


KEYS = st.sampled_from(["on", "every", "output", "method", "ttl", "deadline", "weight", "memory_mb", "overload"])


def told(call: Callable[[], object]) -> tuple[str, ...]:
    try:
        call()
    except ManifestError as error:
        return error.problems or ("a ManifestError without problems",)
    return ()


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS | st.text(max_size=5), VALUES, max_size=8), st.dictionaries(st.text(max_size=5), VALUES))
def test_whatever_the_values_only_a_manifest_error_comes_out(values, features):
    lines = [f"{toml(key)} = {toml(value)}" for key, value in values.items()]
    features_lines = [f"{toml(key)} = {toml(value)}" for key, value in features.items()]
    for call in (
        lambda: parse("\n".join([*lines, "[features]", *features_lines])),
        lambda: parse_tenant(FILE, "ads", "\n".join(lines).encode(), TenantCaps()),
    ):
        assert all(problem.startswith(FILE + ": ") and problem.isprintable() for problem in told(call))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_the_bytes_only_a_manifest_error_comes_out(text):
    with pytest.raises(ManifestError):
        parse(text)


def test_tenant_settings_have_defaults():
    assert parse_tenant("ads/tenant.toml", "ads", b"", TenantCaps()) == TenantSettings("ads")


def test_tenant_settings_are_cut_to_the_operators_caps_and_the_tenant_is_told():
    text = b"weight = 50\nmemory_mb = 100\nrows_queued_max = 9000\noverload = 'shed_newest'"
    settings_of_ads = parse_tenant("tenant.toml", "ads", text, TenantCaps(4.0, 2048, 500))
    assert settings_of_ads == TenantSettings(
        tenant="ads",
        weight=4.0,
        memory_mb=100,
        rows_queued_max=500,
        overload="shed_newest",
        asked={"weight": 50, "memory_mb": 100, "rows_queued_max": 9000},
    )
    assert settings_of_ads.capped == (
        "tenant.toml: weight is cut to the operator's 4",
        "tenant.toml: rows_queued_max is cut to the operator's 500",
    )


def test_defaults_of_tenant_settings_are_under_the_caps_too():
    small = parse_tenant("ads/tenant.toml", "ads", b"", TenantCaps(0.5, 256, 10))
    assert small == TenantSettings("ads", 0.5, 256, 10)


def test_what_waits_is_bounded_by_the_tenant_and_capped_by_the_operator():
    text = b"rows_waiting_max = 500000\nmb_waiting_max = 16\nage_waiting_max = '2h'"
    caps = TenantCaps(rows_waiting_max=100_000, mb_waiting_max=32, age_waiting_ms_max=3_600_000)
    found = parse_tenant("tenant.toml", "ads", text, caps)
    assert (found.rows_waiting_max, found.mb_waiting_max, found.age_waiting_max) == (100_000, 16, 3_600_000)
    assert found.capped == (
        "tenant.toml: rows_waiting_max is cut to the operator's 100000",
        "tenant.toml: age_waiting_max is cut to the operator's 3600000 ms",
    )
    assert parse_tenant("tenant.toml", "ads", b"", caps).age_waiting_max == 3_600_000, "none is more than an hour"
    assert parse_tenant("tenant.toml", "ads", b"age_waiting_max = 'never'", TenantCaps()).age_waiting_max == 0


def test_a_quota_stands_in_place_of_the_caps_and_a_tenant_may_ask_for_less():
    text = b"weight = 50\nrows_s_max = 20\nmodels_max = 9"
    asked = parse_tenant("tenant.toml", "ads", text, TenantCaps(4.0, 2048, rows_s_max=100, models_max=5))
    assert (asked.weight, asked.rows_s_max, asked.models_max) == (4.0, 20.0, 5)
    quota = {"weight": 8.0, "rows_s_max": 10.0, "models_max": 12, "memory_mb": 4096, "stored_bytes_max": 48}
    granted = asked.granted(quota)
    assert (granted.weight, granted.rows_s_max, granted.models_max) == (8.0, 10.0, 9), "less than was granted is fine"
    assert (granted.memory_mb, granted.stored_bytes_max) == (4096, 48), "what it has not asked for is what was granted"
    assert granted.rows_queued_max == asked.rows_queued_max
    assert "tenant.toml: rows_s_max is cut to the operator's 10" in granted.capped
    assert not any("models_max" in line for line in granted.capped)
    assert asked.granted({"rows_s_max": 0.0}).rows_s_max == 20.0, "any number was granted"
    assert parse_tenant("tenant.toml", "ads", b"rows_s_max = 0", TenantCaps(rows_s_max=7)).rows_s_max == 7.0


limits = st.fixed_dictionaries(
    {},
    optional={
        "weight": st.floats(0.001, 1000),
        "memory_mb": st.integers(64, 4096),
        "rows_s_max": st.one_of(st.just(0.0), st.floats(0.1, 1e6)),
        "models_max": st.integers(0, 64),
        "stored_bytes_max": st.integers(0, 4096),
    },
)


@given(limits, limits, limits)
def test_whatever_a_tenant_asks_for_it_has_no_more_than_was_granted(asked, caps, quota):
    named = {{"weight": "weight_max", "memory_mb": "memory_mb_max"}.get(name, name): cap for name, cap in caps.items()}
    capped = TenantSettings("ads", asked=asked).under(TenantCaps(**named).limits())
    granted = capped.granted(quota)
    for name, most in (TenantCaps(**named).limits() | quota).items():
        has, wanted = getattr(granted, name), asked.get(name)
        unbounded = name in ("rows_s_max", "age_waiting_max")
        assert has <= most or (unbounded and not most)
        assert not (unbounded and most) or has > 0
        if name in asked and (wanted <= most or (unbounded and not most)) and (wanted or not unbounded):
            assert has == wanted, "less than was granted is what it asked for"
    assert granted.granted(quota) == granted
    assert granted.under(TenantCaps(**named).limits()) == capped, "a quota that is taken back leaves nothing behind"


def test_a_models_own_overload_policy_is_read():
    assert parse("on = ['transaction']\n[features]\nx = 'event.amount'").overload is None
    latest = parse("on = ['transaction']\noverload = 'latest_per_customer'\n[features]\nx = 'event.amount'")
    assert latest.overload == "latest_per_customer"
    problems = told(lambda: parse("on = ['transaction']\noverload = 'newest'\n[features]\nx = 'event.amount'"))
    assert any("overload 'newest' is not one of" in problem for problem in problems)


def test_mistakes_in_tenant_settings_are_all_told():
    with pytest.raises(ManifestError) as caught:
        parse_tenant(
            "ads/tenant.toml",
            "ads",
            b"wieght = 1\nweight = 0\nmemory_mb = 1.5\nrows_queued_max = 0\noverload = 'shed_olds'",
            TenantCaps(),
        )
    assert caught.value.problems == (
        "ads/tenant.toml: unknown key 'wieght', did you mean 'weight'?",
        "ads/tenant.toml: weight must be a number from 0.001 to 1000, not 0",
        "ads/tenant.toml: memory_mb must be a whole number from 64 to 1048576, not 1.5",
        "ads/tenant.toml: rows_queued_max must be a whole number from 1 to 65536, not 0",
        "ads/tenant.toml: overload 'shed_olds' is not one of shed_oldest, shed_newest, latest_per_customer,"
        " did you mean 'shed_oldest'?",
    )


@pytest.mark.parametrize(
    ("head", "schedule"),
    [
        ("every = '15m'", Schedule(900_000)),
        ("every = '15m'\nby = 'clock'\nall = true", Schedule(900_000, whole=True)),
        ("every = '1w'\nby = 'event'\ngrace = '2h'", Schedule(604_800_000, by_event=True, grace_ms=7_200_000)),
        ("session = '30m'", Schedule(1_800_000, by_event=True, gap_ms=1_800_000)),
        (
            "session = '1h'\nevery = '5m'\ngrace = '2m'",
            Schedule(300_000, by_event=True, grace_ms=120_000, gap_ms=3_600_000),
        ),
        ("at = '06:30'", Schedule(at_ms=23_400_000)),
        ("at = '00:00'\nzone = 'Europe/Berlin'\nall = false", Schedule(zone="Europe/Berlin")),
    ],
)
def test_an_interval_model_says_when_it_runs(head, schedule):
    manifest = parse(head + "\n[features]\na = \"sum(transaction.amount, '1d')\"\nb = 'seconds_since(search)'")
    assert manifest.schedule == schedule
    assert manifest.events == ()
    assert manifest.version("0" * 64).schedule == schedule
