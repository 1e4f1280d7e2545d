"""A tenant's two files, parsed and checked: `<model>.toml` and `tenant.toml`.

Every mistake is collected, each as one line with the file, the feature and the column, so that a tenant mends
a file in one go. Nothing here reads a disk: the bytes come from the watcher.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast, get_args

from node.kernel.errors import ManifestError
from node.kernel.limits import (
    CALL_DEADLINE_MS_MAX,
    FEATURES_PER_MODEL_MAX,
    MANIFEST_BYTES_MAX,
    MEMORY_MB_MAX,
    MEMORY_MB_MIN,
    MODELS_PER_TENANT_MAX,
    OUTPUTS_PER_MODEL_MAX,
    ROWS_PER_SECOND_MAX,
    ROWS_QUEUED_PER_MODEL_MAX,
    STORED_BYTES_MAX,
    WAITING_AGE_MS_MAX,
    WAITING_MB_MAX,
    WAITING_ROWS_MAX,
    WEIGHT_MAX,
    WEIGHT_MIN,
    WINDOW_BYTES_MAX,
    WINDOW_MS_MAX,
)
from node.kernel.types import (
    Aggregate,
    Backfill,
    EventSchema,
    FieldType,
    ModelName,
    ModelVersion,
    OverloadPolicy,
    Schedule,
    StoredOutput,
    session_newest,
)
from tenants.backfill_manifest import parse_backfill
from tenants.expression import (
    AggregateValue,
    ExpressionError,
    Node,
    Scope,
    StoredValue,
    evaluate_profile,
    parse_expression,
    walk,
)
from tenants.interval_manifest import INTERVAL_KEYS, is_interval, read_schedule, refuse_event_fields
from tenants.shared_names import Resolver, SharedValue, nothing_shared
from tenants.stage import Stage, parse_rollout
from tenants.wording import one_line, parse_duration, shown, suggestion

METHODS: Final = ("predict_proba", "predict", "transform", "decision_function", "score_samples")
"""What a model may be called by. predict_proba with one output named gives its last column."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_OUTPUT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_FEATURE_BYTES_MAX: Final = 128
PROBLEMS_MAX: Final = 100
"""Of one file."""
MORE_PROBLEMS: Final = "there may be more mistakes; mend these first"
_MODEL_KEYS: Final = (
    *("on", *INTERVAL_KEYS),
    *("output", "method", "ttl", "deadline", "weight", "overload", "features", "shared_with", "rollout", "log_rows"),
    "backfill",
)
_KEY_PARTS_MAX: Final = 32
_KEY_PART: Final = r"""(?:[A-Za-z0-9_-]++|"(?:[^"\\\n]|\\.){0,256}+"|'[^'\n]{0,256}+')"""
_LONG_KEY: Final = re.compile(rf"(?<![A-Za-z0-9_-]){_KEY_PART}(?:[ \t]*+\.[ \t]*+{_KEY_PART}){{{_KEY_PARTS_MAX}}}")
"""tomllib keeps every prefix of a dotted key: one of 200 KB takes all the memory there is."""

TENANT_LIMITS: Final = (
    *("weight", "memory_mb", "rows_queued_max", "rows_waiting_max", "mb_waiting_max", "age_waiting_max"),
    *("rows_s_max", "models_max", "stored_bytes_max", "window_bytes_max"),
)
"""What a tenant may set and an operator may cap, as it is called in `tenant.toml`."""
_TENANT_KEYS: Final = (*TENANT_LIMITS, "overload")
_NO_LIMIT: Final = {"age_waiting_max", "rows_s_max"}
"""Where 0 means none."""
_FRACTIONS: Final = {"weight", "rows_s_max"}
"""The others are whole numbers."""
_TENANT_FILE: Final = "tenant.toml"
SLOT_BYTES: Final = 8


def is_name(text: str) -> bool:
    """Whether a tenant or model may be called so: [a-z0-9][a-z0-9_-]{0,62}."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Feature:
    name: str
    expression: Node


@dataclass(frozen=True, slots=True)
class Manifest:
    """One model's manifest as its tenant wrote it (`text`), and what it says.

    `ttl_ms` 0 means never. Names in `features` are those of the model's columns, in order.
    """

    name: ModelName
    text: bytes
    events: tuple[str, ...]
    outputs: tuple[str, ...]
    method: str
    ttl_ms: int
    deadline_ms: int
    weight: float
    features: tuple[Feature, ...]
    overload: OverloadPolicy | None = None
    """None: its tenant's."""
    schedule: Schedule | None = None
    """Of an interval model, which has no `events`."""
    shared_with: tuple[str, ...] | None = None
    """The tenants that may use its outputs, beside its own; None: all."""

    rollout: tuple[Stage, ...] = ()
    """What a version goes through before it takes the live one's place; (): nothing."""
    log_rows: float = 0.0
    """The share of customers whose rows are kept, with the outputs, as training data."""
    backfill: Backfill | None = None
    """The history that its windows are filled from; None: they begin when it comes."""
    aggregates: tuple[Aggregate, ...] = field(init=False, compare=False, repr=False)
    """What the features need of the customer's row, sorted, each once; shared features need more."""
    stored_outputs: tuple[StoredOutput, ...] = field(init=False, compare=False, repr=False)
    """Other models' outputs it uses, sorted; names as in expressions ('-' is '_')."""
    shared_values: tuple[SharedValue, ...] = field(init=False, compare=False, repr=False)
    """The shared features it names, sorted."""

    def __post_init__(self) -> None:
        """Keep what is asked of all models for each pair of files."""
        nodes = [node for feature in self.features for node in walk(feature.expression)]
        outputs = {node.output for node in nodes if isinstance(node, StoredValue)}
        shared = {node for node in nodes if isinstance(node, SharedValue)}
        object.__setattr__(self, "aggregates", self._aggregates(nodes))
        object.__setattr__(self, "stored_outputs", tuple(sorted(outputs)))
        object.__setattr__(self, "shared_values", tuple(sorted(shared, key=lambda value: value.feature)))

    @property
    def stored_bytes(self) -> int:
        """What its newest outputs take in each customer's row: a slot each, one for the time, one for the version."""
        return (2 + len(self.outputs)) * SLOT_BYTES

    def _aggregates(self, nodes: Iterable[Node]) -> tuple[Aggregate, ...]:
        asked = {node.aggregate for node in nodes if isinstance(node, AggregateValue)}
        if self.schedule is not None and self.schedule.gap_ms:
            asked.add(session_newest(self.schedule.gap_ms))
        return tuple(sorted(asked))

    @property
    def feature_types(self) -> Mapping[str, FieldType]:
        return {feature.name: feature.expression.type for feature in self.features}

    def version(self, blob_sha256: str, labels: tuple[str, ...] = ()) -> ModelVersion:
        """This manifest with one model file: the version is the sha256 of the file's hash and the manifest."""
        digest = hashlib.sha256(blob_sha256.encode() + b"\n" + self.text)
        return ModelVersion(
            name=self.name,
            version=digest.hexdigest(),
            blob=blob_sha256,
            events=self.events,
            features=tuple(feature.name for feature in self.features),
            outputs=self.outputs,
            method=self.method,
            ttl_ms=self.ttl_ms,
            deadline_ms=self.deadline_ms,
            labels=labels,
            weight=self.weight,
            schedule=self.schedule,
            log_rows=self.log_rows,
            backfill=self.backfill,
        )


@dataclass(frozen=True, slots=True)
class TenantCaps:
    """The most the operator lets any tenant ask for. `age_waiting_ms_max` 0: as long as they like."""

    weight_max: float = 10.0
    memory_mb_max: int = 4096
    rows_queued_max: int = ROWS_QUEUED_PER_MODEL_MAX
    rows_waiting_max: int = WAITING_ROWS_MAX
    mb_waiting_max: int = WAITING_MB_MAX
    age_waiting_ms_max: int = 0
    rows_s_max: float = 0.0
    models_max: int = MODELS_PER_TENANT_MAX
    stored_bytes_max: int = STORED_BYTES_MAX
    window_bytes_max: int = WINDOW_BYTES_MAX

    def limits(self) -> Mapping[str, float]:
        """By the names of TENANT_LIMITS."""
        return {
            "weight": self.weight_max,
            "memory_mb": self.memory_mb_max,
            "rows_queued_max": self.rows_queued_max,
            "rows_waiting_max": self.rows_waiting_max,
            "mb_waiting_max": self.mb_waiting_max,
            "age_waiting_max": self.age_waiting_ms_max,
            "rows_s_max": self.rows_s_max,
            "models_max": self.models_max,
            "stored_bytes_max": self.stored_bytes_max,
            "window_bytes_max": self.window_bytes_max,
        }


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """`tenant.toml` after the operator's caps and quota.

    `age_waiting_max` is in ms; 0 is no limit for it and `rows_s_max` (rows a second of all its models on one node).
    What waits is bounded in each partition, `stored_bytes_max` and `window_bytes_max` are of each customer's row.
    `asked` is what the tenant has set itself, as it wrote it.
    """

    tenant: str
    weight: float = 1.0
    memory_mb: int = 1024
    rows_queued_max: int = 8192
    rows_waiting_max: int = 65_536
    mb_waiting_max: int = 64
    age_waiting_max: int = 0
    rows_s_max: float = 0.0
    models_max: int = MODELS_PER_TENANT_MAX
    stored_bytes_max: int = STORED_BYTES_MAX
    window_bytes_max: int = WINDOW_BYTES_MAX
    overload: OverloadPolicy = "shed_oldest"
    asked: Mapping[str, float] = field(default_factory=dict)

    def limits(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in TENANT_LIMITS}

    @property
    def capped(self) -> tuple[str, ...]:
        """A line for each value that the tenant has set and that was cut to what the operator allows."""
        return tuple(
            f"{_TENANT_FILE}: {name} is cut to the operator's {given:.15g}{' ms' if name == 'age_waiting_max' else ''}"
            for name, given in self.limits().items()
            if name in self.asked and self.asked[name] != given
        )

    def under(self, most: Mapping[str, float]) -> TenantSettings:
        """With each of the limits named in `most` as the tenant asked for it, or as by default, and at most that."""
        usual = TenantSettings(self.tenant).limits()
        return self._with({name: _least(name, self.asked.get(name, usual[name]), cap) for name, cap in most.items()})

    def granted(self, quota: Mapping[str, float]) -> TenantSettings:
        """Under an operator's quota for this tenant, in place of the caps for all: what the tenant has not asked for is
        what it was granted."""
        return self._with({name: _least(name, self.asked.get(name, grant), grant) for name, grant in quota.items()})

    def _with(self, limits: Mapping[str, float]) -> TenantSettings:
        typed = {name: value if name in _FRACTIONS else int(value) for name, value in limits.items()}
        return replace(self, **typed)  # type: ignore[arg-type]


def _least(name: str, asked: float, most: float) -> float:
    if name in _NO_LIMIT:
        return min((value for value in (asked, most) if value), default=0)
    return min(asked, most)


class _Reader:
    """One TOML file with the mistakes found in it so far."""

    def __init__(self, file: str, text: bytes, keys: tuple[str, ...]) -> None:
        self._file = file
        self.problems: list[str] = []
        self.values = self._load(text)
        for key in self.values:
            if key not in keys:
                self.problem(f"unknown key {shown(key)}" + suggestion(key, keys))

    def _load(self, text: bytes) -> dict[str, Any]:
        """The parsed file. Raises ManifestError at once: a file that is no TOML has no other mistakes."""
        if len(text) > MANIFEST_BYTES_MAX:
            raise ManifestError([f"{self._file}: longer than {MANIFEST_BYTES_MAX} bytes"])
        try:
            decoded = text.decode()
            if _LONG_KEY.search(decoded):
                raise ManifestError(
                    [f"{self._file}: a dotted name of more than {_KEY_PARTS_MAX} parts; quote the name"]
                )
            return tomllib.loads(decoded)
        except UnicodeDecodeError as error:
            raise ManifestError([f"{self._file}: not UTF-8 at byte {error.start}; save it as UTF-8"]) from None
        except RecursionError:
            raise ManifestError([f"{self._file}: nested too deeply"]) from None
        except ValueError as error:
            raise ManifestError([f"{self._file}: not TOML: {one_line(str(error))}"]) from None

    def problem(self, message: str) -> None:
        """Notes a mistake. Raises ManifestError when there are more than anybody reads: guessing costs time."""
        self.problems.append(f"{self._file}: {message}")
        if len(self.problems) >= PROBLEMS_MAX:
            raise ManifestError([*self.problems, f"{self._file}: {MORE_PROBLEMS}"])

    def finish(self) -> None:
        if self.problems:
            raise ManifestError(self.problems)

    def number(self, key: str, default: float, least: float, most: float) -> float:
        value = self.values.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
            return float(value)
        self.problem(f"{key} must be a number from {least:g} to {most:g}, not {shown(value)}")
        return default

    def whole(self, key: str, default: int, least: int, most: int) -> int:
        value = self.values.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        self.problem(f"{key} must be a whole number from {least} to {most}, not {shown(value)}")
        return default

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of `choices`; the first is the default."""
        value = self.values.get(key, choices[0])
        if value in choices:
            return cast("str", value)
        self.problem(f"{key} {shown(value)} is not one of {', '.join(choices)}" + _near(value, choices))
        return choices[0]

    def duration(self, key: str, default: str, ms_max: int, *, milliseconds: bool = False) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            self.problem(f"{key} must be a duration in quotes such as '{default}', not {shown(value)}")
            return 0
        try:
            return parse_duration(value, ms_max, milliseconds=milliseconds)
        except ValueError as error:
            self.problem(f"{key} {error}")
            return 0

    def texts(self, key: str, default: list[str], what: str) -> tuple[str, ...]:
        """A text or a list of texts, each once, at least one; () after a mistake."""
        value = self.values.get(key, default)
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not listed or not all(isinstance(item, str) for item in listed):
            self.problem(f"{key} must be {what} or a list of them, not {shown(value)}")
            return ()
        if len(set(listed)) < len(listed):
            self.problem(f"{key} names the same one twice")
            return ()
        return tuple(listed)

    def tenants(self, key: str) -> tuple[str, ...] | None:
        """A list of tenants' names, which may be empty; None without it."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) and is_name(item) for item in value):
            self.problem(f"{key} must be a list of tenants, such as ['ads', 'fraud'], not {shown(value)}")
            return ()
        return tuple(sorted(set(value)))


def _near(value: object, choices: tuple[str, ...]) -> str:
    hint = suggestion(value, choices) if isinstance(value, str) else ""
    return hint if hint.startswith(",") else ""


Reader = _Reader
"""For other files of a tenant's."""


def is_output(text: str) -> bool:
    """Whether an output or shared feature may be called so: [A-Za-z_][A-Za-z0-9_]{0,62}."""
    return _OUTPUT.fullmatch(text) is not None


def parse_manifest(
    file: str, tenant: str, model: str, text: bytes, schema: EventSchema, shared: Resolver = nothing_shared
) -> Manifest:
    """The manifest of one model. `file` is its name in messages, `shared` knows the features that its tenant may use.

    Raises ManifestError with every mistake; ConfigError when the operator's own profile is wrong, which a
    node has found out at its start.
    """
    reader = _Reader(file, text, _MODEL_KEYS)
    for kind, name in (("tenant", tenant), ("model", model)):
        if not is_name(name):
            reader.problem(
                f"the {kind} name {shown(name)} must be 1 to 63 of a-z, 0-9, '_' and '-', first a letter or digit"
            )
    interval = is_interval(reader.values)
    manifest = Manifest(
        name=ModelName(tenant, model),
        text=text,
        events=() if interval else _events(reader, schema),
        outputs=_outputs(reader),
        method=reader.choice("method", METHODS),
        ttl_ms=0 if reader.values.get("ttl") == "never" else reader.duration("ttl", "30d", WINDOW_MS_MAX),
        deadline_ms=reader.duration("deadline", "1s", CALL_DEADLINE_MS_MAX, milliseconds=True),
        weight=reader.number("weight", 1.0, WEIGHT_MIN, WEIGHT_MAX),
        features=_features(reader, schema, shared),
        overload=_overload(reader) if "overload" in reader.values else None,
        schedule=read_schedule(reader) if interval else None,
        shared_with=reader.tenants("shared_with"),
        rollout=parse_rollout(reader.values["rollout"], reader.problem) if "rollout" in reader.values else (),
        log_rows=reader.number("log_rows", 0.0, 0.0, 1.0),
        backfill=parse_backfill(reader.values["backfill"], reader.problem) if "backfill" in reader.values else None,
    )
    if interval:
        if manifest.rollout:
            reader.problem("rollout is for models that events trigger; leave it out of an interval model")
        refuse_event_fields(reader, ((feature.name, feature.expression) for feature in manifest.features))
    reader.finish()
    return manifest


def _events(reader: _Reader, schema: EventSchema) -> tuple[str, ...]:
    if "on" not in reader.values:
        reader.problem(
            "on is missing; name the event types that trigger the model, such as "
            + _types_example(schema)
            + ', or the interval that it runs by, such as every = "15m"'
        )
        return ()
    events = reader.texts("on", [], "an event type")
    if events == ("any",) and "any" not in schema.types:
        return schema.types
    for event in events:
        if event not in schema.types:
            reader.problem(f"on: unknown event type {shown(event)}" + suggestion(event, [*schema.types, "any"]))
    return events


def _types_example(schema: EventSchema) -> str:
    return f'on = ["{next(iter(schema.types), "any")}"]'


def _outputs(reader: _Reader) -> tuple[str, ...]:
    outputs = reader.texts("output", ["score"], "a name")
    if len(outputs) > OUTPUTS_PER_MODEL_MAX:
        reader.problem(f"output names {len(outputs)} outputs; the most is {OUTPUTS_PER_MODEL_MAX}")
    for output in outputs:
        if not _OUTPUT.fullmatch(output):
            reader.problem(
                f"output {shown(output)} must be 1 to 63 of a-z, A-Z, 0-9 and '_', not starting with a digit"
            )
    return outputs


def _features(reader: _Reader, schema: EventSchema, shared: Resolver) -> tuple[Feature, ...]:
    table = reader.values.get("features")
    if not isinstance(table, dict) or not table:
        reader.problem('[features] is missing or empty; give each column of the model a line: name = "expression"')
        return ()
    if len(table) > FEATURES_PER_MODEL_MAX:
        reader.problem(f"[features] has {len(table)} features; the most is {FEATURES_PER_MODEL_MAX}")
        return ()
    profile = evaluate_profile(schema)
    types: dict[str, FieldType | None] = {}
    features: list[Feature] = []
    for name, text in table.items():
        node = _expression(reader, name, text, Scope(schema, profile, types, table.keys() - types.keys(), shared))
        types[name] = node.type if node is not None else None
        if node is not None:
            features.append(Feature(name, node))
    return tuple(features)


def _expression(reader: _Reader, name: str, text: object, scope: Scope) -> Node | None:
    place = f"feature {shown(name)}"
    hint = "; if the manifest's own key is meant, write it above [features]" if name in _MODEL_KEYS else ""
    if not name.strip() or not name.isprintable() or len(name.encode()) > _FEATURE_BYTES_MAX:
        reader.problem(f"{place}: a feature's name must be printable and at most {_FEATURE_BYTES_MAX} bytes")
    if not isinstance(text, str):
        reader.problem(f"{place}: must be an expression in quotes, not {shown(text)}{hint}")
        return None
    try:
        return parse_expression(text, scope)
    except ExpressionError as error:
        for problem in error.problems:
            reader.problem(f"{place}: {problem}{hint}")
        return None


def _overload(reader: _Reader) -> OverloadPolicy:
    return cast("OverloadPolicy", reader.choice("overload", get_args(OverloadPolicy)))


def parse_tenant(file: str, tenant: str, text: bytes, caps: TenantCaps) -> TenantSettings:
    """A tenant's settings under the operator's caps; empty text gives the defaults. Raises ManifestError.

    A value above its cap is cut to it and told in `capped`: a cap that the operator lowers must not make a
    tenant lose its other settings.
    """
    reader = _Reader(file, text, _TENANT_KEYS)
    if not is_name(tenant):
        reader.problem(f"the tenant name {shown(tenant)} must be 1 to 63 of a-z, 0-9, '_' and '-'")
    limits = _limits(reader)
    overload = _overload(reader)
    reader.finish()
    return TenantSettings(tenant, overload=overload, asked=limits).under(caps.limits())


def _limits(reader: _Reader) -> dict[str, float]:
    """Those of TENANT_LIMITS that the file sets; its mistakes are noted in the reader."""
    most = {
        "memory_mb": (MEMORY_MB_MIN, MEMORY_MB_MAX),
        "rows_queued_max": (1, ROWS_QUEUED_PER_MODEL_MAX),
        "rows_waiting_max": (1, WAITING_ROWS_MAX),
        "mb_waiting_max": (1, WAITING_MB_MAX),
        "models_max": (0, MODELS_PER_TENANT_MAX),
        "stored_bytes_max": (0, STORED_BYTES_MAX),
        "window_bytes_max": (0, WINDOW_BYTES_MAX),
    }
    found: dict[str, float] = {}
    for name in TENANT_LIMITS:
        if name not in reader.values:
            continue
        if name == "age_waiting_max":
            never = reader.values[name] == "never"
            found[name] = 0 if never else reader.duration(name, "1h", WAITING_AGE_MS_MAX, milliseconds=True)
        elif name == "weight":
            found[name] = reader.number(name, 1.0, WEIGHT_MIN, WEIGHT_MAX)
        elif name == "rows_s_max":
            found[name] = reader.number(name, 0.0, 0.0, ROWS_PER_SECOND_MAX)
        else:
            least, highest = most[name]
            found[name] = reader.whole(name, least, least, highest)
    return found
