"""The feature expression language: text -> typed tree, by way of `ast`, never evaluated as code.

    numbers, 'text', True, False        + - * / // % ** and unary -       == != < <= > >= (chained too)
    x in ('a', 'b'), x not in […]       and, or, not                      a if condition else b
    abs log log1p exp sqrt round floor ceil (x)    min max coalesce (a, b, …)    clip(x, low, high)
    is_missing(x)    hour(t) weekday(t): of a time in seconds, UTC, Monday is 0
    event.<field>, event.time (seconds), event.type (text); event['odd-name'] for any other name
    count(<type>, '1h', where=…); sum mean min max std last first distinct (<type>.<field>, '30d', where=…);
    session='30m' in place of a window: of the session, of events at most that apart; with neither: for ever;
    the type `any` is every type; 'odd-type' in quotes is a type too
    seconds_since(<type>)    profile.<name>    models.<tenant>.<model>.<output>    features defined above
    features.<tenant>.<name>, features.<tenant>.<name>.v2: what a tenant shares (tenants.shared_names)
    tables.<table>[key].<column>: of the row with that key; the column's default, else missing, where there is none

Types are number, text and boolean. A boolean serves as the number 0 or 1; a number is never a condition.
Texts are compared with ==, != and `in` only. `where` sees the fields of the event, and literals.

Missing values: arithmetic and functions with a missing argument give missing; so does any result that is
not a finite number (x / 0, log(0), an overflow). A comparison or `in` with a missing operand is False, also
`!=` and `not in`. A missing boolean counts as False in a condition. `is_missing` and `coalesce` see them.

In `models.<tenant>.<model>` a '-' of a name is written '_' (or the name is quoted: models['a-b']); both
give the same `StoredOutput`, whose names hold '_'. `expression_name` does it to a model's real name.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias, cast

from node.kernel.errors import ConfigError, HeadraceError, NotFound
from node.kernel.limits import EXPRESSION_BYTES_MAX, EXPRESSION_DEPTH_MAX, WINDOW_MS_MAX
from node.kernel.types import (
    ANY_EVENT,
    EVENT_TIME,
    Aggregate,
    AggregateFunction,
    EventSchema,
    FieldType,
    ModelName,
    StoredOutput,
)
from tenants.shared_names import Resolver, SharedName, SharedValue, nothing_shared
from tenants.table_lookup import LookupMistake, lookup_of, names_table
from tenants.wording import one_line, parse_duration, shown, suggestion

EVENT_TYPE: Final = "type"
"""The pseudo-field `event.type`: the name of the event's type, as text."""

BUILT_IN_PROFILE: Final[Mapping[str, Aggregate]] = {
    "events": Aggregate("count", ANY_EVENT),
    "first_seen": Aggregate("min", ANY_EVENT, EVENT_TIME),
    "last_seen": Aggregate("max", ANY_EVENT, EVENT_TIME),
}


@dataclass(frozen=True, slots=True)
class Literal:
    value: float | str
    type: FieldType


@dataclass(frozen=True, slots=True)
class EventField:
    """A field of the event at hand; EVENT_TIME and EVENT_TYPE are always there."""

    field: str
    type: FieldType


@dataclass(frozen=True, slots=True)
class AggregateValue:
    aggregate: Aggregate
    type: FieldType = "number"


@dataclass(frozen=True, slots=True)
class StoredValue:
    output: StoredOutput
    type: FieldType = "number"


@dataclass(frozen=True, slots=True)
class TableValue:
    """`column` of the row of `table` whose key is `key`'s value."""

    table: str
    column: str
    key: Node
    type: FieldType


@dataclass(frozen=True, slots=True)
class FeatureValue:
    """A feature defined above in the same manifest. A name, so that a chain of doublings stays small."""

    name: str
    type: FieldType


@dataclass(frozen=True, slots=True)
class Membership:
    """`item in values`; a text compared with a literal is one too. False for a missing item, negated or not."""

    item: Node
    values: frozenset[float] | frozenset[str]
    negated: bool = False
    type: FieldType = "boolean"


@dataclass(frozen=True, slots=True)
class Operation:
    """An operator or function by its name in the language; `if` takes (condition, then, otherwise)."""

    name: str
    arguments: tuple[Node, ...]
    type: FieldType


Node: TypeAlias = (
    Literal
    | EventField
    | AggregateValue
    | StoredValue
    | TableValue
    | FeatureValue
    | SharedValue
    | Membership
    | Operation
)


def children(node: Node) -> tuple[Node, ...]:
    if isinstance(node, Operation):
        return node.arguments
    if isinstance(node, TableValue):
        return (node.key,)
    return (node.item,) if isinstance(node, Membership) else ()


def walk(node: Node) -> Iterable[Node]:
    """The node and all below it."""
    yield node
    for child in children(node):
        yield from walk(child)


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake; `column` counts characters of the expression from 1."""

    column: int
    message: str

    def __str__(self) -> str:
        return f"column {self.column}: {self.message}"


class ExpressionError(HeadraceError):
    """An expression can't be taken. `problems` is empty only where a feature it uses is already refused."""

    def __init__(self, text: str, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)) or "uses a feature that is refused")
        self.text = text
        self.problems = tuple(problems)


class _Rejected(HeadraceError):
    """Unwinds to the nearest place where parsing can go on; the problem itself is already noted."""


def expression_name(name: ModelName) -> ModelName:
    """A model's name as expressions know it: '-' becomes '_'."""
    return ModelName(name.tenant.replace("-", "_"), name.model.replace("-", "_"))


@dataclass(frozen=True, slots=True)
class Scope:
    """The names an expression may use.

    `features` maps each feature above to its type, None where that one is itself refused; `later` holds
    those that are not defined yet, for the message.
    """

    schema: EventSchema
    profile: Mapping[str, Aggregate] = field(default_factory=dict)
    features: Mapping[str, FieldType | None] = field(default_factory=dict)
    later: Collection[str] = ()
    shared: Resolver = nothing_shared


def parse_expression(text: str, scope: Scope) -> Node:
    """The typed tree of one feature. Raises ExpressionError, with every mistake found, and nothing else."""
    return _Parser(text, scope).parse()


def parse_filter(text: str, schema: EventSchema) -> Node:
    """The boolean tree of an `Aggregate.where`. Raises ExpressionError."""
    return _Parser(text, Scope(schema)).parse_filter()


def evaluate_profile(schema: EventSchema) -> dict[str, Aggregate]:
    """The aggregate behind each `profile.<name>`: the built-in ones and the operator's. Raises ConfigError."""
    profile = dict(BUILT_IN_PROFILE)
    problems: list[str] = []
    for name, text in schema.profile.items():
        if name in BUILT_IN_PROFILE:
            problems.append(f"profile {shown(name)}: this name is built in; choose another")
            continue
        try:
            node = parse_expression(text, Scope(schema))
        except ExpressionError as error:
            problems += [f"profile {shown(name)}: {problem}" for problem in error.problems]
            continue
        if isinstance(node, AggregateValue):
            profile[name] = node.aggregate
        else:
            problems.append(f"profile {shown(name)}: must be one aggregate, such as sum(<type>.<field>, '30d')")
    if problems:
        raise ConfigError(problems)
    return profile


_ARITHMETIC: Final[Mapping[type[ast.operator], str]] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
}
_COMPARISONS: Final[Mapping[type[ast.cmpop], str]] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_ARGUMENTS_MAX: Final = 64
_PROBLEMS_MAX: Final = 20
"""Nobody reads more at once, and each guess at what was meant costs time."""
_FUNCTIONS: Final[Mapping[str, tuple[int, int]]] = {
    **dict.fromkeys(
        ("abs", "log", "log1p", "exp", "sqrt", "round", "floor", "ceil", "hour", "weekday", "is_missing"), (1, 1)
    ),
    **dict.fromkeys(("min", "max", "coalesce"), (2, _ARGUMENTS_MAX)),
    "clip": (3, 3),
}
_FIELD_AGGREGATES: Final = frozenset({"sum", "mean", "min", "max", "std", "last", "first", "distinct"})
_AGGREGATES: Final = _FIELD_AGGREGATES | {"count", "seconds_since"}
_ROOTS: Final = ("event", "profile", "models", "features", "tables")
_CALLABLE: Final = _AGGREGATES | set(_FUNCTIONS)


class _Parser:
    """Walks one `ast` tree. A mistake is noted and unwinds to `_each`, which goes on with the siblings."""

    def __init__(self, text: str, scope: Scope) -> None:
        self._text = text
        self._scope = scope
        self._problems: list[Problem] = []
        self._source = b""
        self._indent = 0
        self._depth = 0
        self._filtering = False

    def parse(self) -> Node:
        try:
            return self._node(self._tree())
        except _Rejected:
            raise ExpressionError(self._text, self._problems) from None

    def parse_filter(self) -> Node:
        try:
            return self._condition_of_filter(self._tree())
        except _Rejected:
            raise ExpressionError(self._text, self._problems) from None

    def _tree(self) -> ast.expr:
        # Newlines become blanks so that a TOML multi-line string works and columns still count characters.
        flat = re.sub(r"[\r\n\t\f]", " ", self._text)
        stripped = flat.lstrip(" ")
        self._indent = indent = len(flat) - len(stripped)
        try:
            self._source = stripped.encode()
            if len(self._source) > EXPRESSION_BYTES_MAX:
                raise self._noted(1, f"longer than {EXPRESSION_BYTES_MAX} bytes; name parts of it as features above")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(stripped, mode="eval").body
        except SyntaxError as error:
            raise self._noted(indent + max(error.offset or 1, 1), f"not an expression: {one_line(error.msg)}") from None
        except (RecursionError, MemoryError):
            raise self._noted(
                1, f"nested deeper than {EXPRESSION_DEPTH_MAX}; name parts of it as features above"
            ) from None
        except ValueError:
            raise self._noted(1, "holds characters that no expression can") from None

    def _noted(self, column: int, message: str) -> _Rejected:
        self._problems.append(Problem(column, message))
        if len(self._problems) >= _PROBLEMS_MAX:
            raise ExpressionError(self._text, self._problems)
        return _Rejected(message)

    def _mistake(self, node: ast.expr, message: str) -> _Rejected:
        # ast counts UTF-8 bytes; people count characters.
        column = len(self._source[: node.col_offset].decode(errors="replace"))
        return self._noted(self._indent + column + 1, message)

    def _node(self, node: ast.expr) -> Node:
        if self._depth >= EXPRESSION_DEPTH_MAX:
            raise self._mistake(
                node, f"nested deeper than {EXPRESSION_DEPTH_MAX}; name a part of it as a feature above"
            )
        self._depth += 1
        try:
            return self._dispatch(node)
        finally:
            self._depth -= 1

    def _dispatch(self, node: ast.expr) -> Node:
        match node:
            case ast.Constant():
                return self._literal(node)
            case ast.Name():
                return self._name(node)
            case ast.Attribute() | ast.Subscript():
                return self._attribute(node)
            case ast.UnaryOp():
                return self._unary(node)
            case ast.BinOp():
                return self._binary(node)
            case ast.Compare():
                return self._comparison(node)
            case ast.BoolOp():
                name = "and" if isinstance(node.op, ast.And) else "or"
                return Operation(name, self._conditions(node.values), "boolean")
            case ast.IfExp():
                return self._conditional(node)
            case ast.Call():
                return self._call(node)
        raise self._mistake(node, f"{type(node).__name__} is not part of the expression language")

    def _each(self, nodes: Iterable[ast.expr]) -> list[Node]:
        """All nodes, or _Rejected after every one of them had its mistakes noted."""
        parsed: list[Node] = []
        rejected: _Rejected | None = None
        for node in nodes:
            try:
                parsed.append(self._node(node))
            except _Rejected as error:
                rejected = error
        if rejected is not None:
            raise rejected
        return parsed

    def _numbers(self, nodes: Sequence[ast.expr], what: str) -> tuple[Node, ...]:
        parsed = self._each(nodes)
        for source, node in zip(nodes, parsed, strict=True):
            if node.type == "text":
                raise self._mistake(source, f"{what} takes numbers, this is text")
        return tuple(parsed)

    def _conditions(self, nodes: Sequence[ast.expr]) -> tuple[Node, ...]:
        parsed = self._each(nodes)
        for source, node in zip(nodes, parsed, strict=True):
            self._require_boolean(source, node)
        return tuple(parsed)

    def _require_boolean(self, source: ast.expr, node: Node) -> None:
        if node.type != "boolean":
            raise self._mistake(
                source, f"a condition must be boolean, this is a {node.type}; compare it with something"
            )

    def _common_type(self, nodes: Sequence[ast.expr], parsed: Sequence[Node], what: str) -> FieldType:
        for source, node in zip(nodes, parsed, strict=True):
            if (node.type == "text") != (parsed[0].type == "text"):
                raise self._mistake(source, f"{what} must be of one type: {parsed[0].type} there, {node.type} here")
        kinds = {node.type for node in parsed}
        return kinds.pop() if len(kinds) == 1 else "number"

    def _literal(self, node: ast.Constant) -> Literal:
        value = node.value
        if isinstance(value, bool):
            return Literal(float(value), "boolean")
        if isinstance(value, int | float):
            try:
                number = float(value)
            except OverflowError:
                number = float("inf")
            if number == float("inf"):
                raise self._mistake(node, "this number is too large")
            return Literal(number, "number")
        if isinstance(value, str):
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise self._mistake(node, "this text holds half a character (a lone surrogate)")
            return Literal(value, "text")
        kind = "None" if value is None else type(value).__name__
        raise self._mistake(
            node, f"{kind} is not part of the expression language; literals are numbers, texts, True and False"
        )

    def _name(self, node: ast.Name) -> Node:
        name = node.id
        scope = self._scope
        if self._filtering:
            raise self._mistake(node, f"where= may use only event.<field> and literals, not {shown(name)}")
        if name in scope.features:
            kind = scope.features[name]
            if kind is None:
                raise _Rejected(name)
            return FeatureValue(name, kind)
        if name in scope.later:
            raise self._mistake(
                node, f"feature {shown(name)} is not defined above; a feature may use only the ones above it"
            )
        if name in _ROOTS:
            raise self._mistake(node, f"{name} needs a name after it: {name}.<name>")
        if name in scope.schema.types:
            raise self._mistake(
                node, f"{shown(name)} is an event type; use it in an aggregate, such as count({name}, '1h')"
            )
        if name in scope.schema.fields:
            raise self._mistake(node, f"unknown feature {shown(name)}, did you mean event.{name}?")
        raise self._mistake(node, f"unknown feature {shown(name)}" + suggestion(name, scope.features))

    def _path(self, node: ast.expr) -> tuple[ast.expr, list[str]]:
        """`a.b['c']` -> the node of a, and [b, c]."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute | ast.Subscript):
            if isinstance(node, ast.Attribute):
                parts.append(node.attr)
            elif isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
                parts.append(node.slice.value)
            else:
                raise self._mistake(node.slice, "[…] takes a name in quotes")
            node = node.value
        return node, parts[::-1]

    def _table_value(self, node: ast.expr) -> TableValue:
        if self._filtering:
            raise self._mistake(node, "where= may use only event.<field> and literals")
        try:
            found = lookup_of(node, self._scope.schema.tables)
        except LookupMistake as mistake:
            raise self._mistake(mistake.node, str(mistake)) from None
        key, wanted = self._node(found.key), found.schema.key_type
        if (key.type == "text") != (wanted == "text"):
            raise self._mistake(found.key, f"the key of table {found.table} is a {wanted}, this is a {key.type}")
        return TableValue(found.table, found.column, key, found.schema.columns[found.column].type)

    def _attribute(self, node: ast.expr) -> Node:
        if names_table(node):
            return self._table_value(node)
        root, parts = self._path(node)
        name = root.id if isinstance(root, ast.Name) else ""
        if self._filtering and name != "event":
            raise self._mistake(node, "where= may use only event.<field> and literals")
        if name == "event":
            return self._event_field(node, parts)
        if name == "profile":
            return self._profile(node, parts)
        if name == "models":
            return self._stored(node, parts)
        if name == "features":
            return self._shared(node, parts)
        if name in self._scope.schema.types or name == "any":
            raise self._mistake(
                node, f"a field of {shown(name)} stands in an aggregate, such as sum({name}.<field>, '1h')"
            )
        if not name:
            raise self._mistake(node, "only event, profile, models, features and tables have names in them")
        raise self._mistake(node, f"unknown name {shown(name)}" + suggestion(name, _ROOTS))

    def _event_field(self, node: ast.expr, parts: list[str]) -> EventField:
        name = parts[0]
        if len(parts) > 1:
            raise self._mistake(node, f"event field {shown(name)} has no names in it")
        if name == EVENT_TIME:
            return EventField(name, "number")
        if name == EVENT_TYPE:
            return EventField(name, "text")
        fields = self._scope.schema.fields
        if name not in fields:
            raise self._mistake(
                node, f"unknown event field {shown(name)}" + suggestion(name, [*fields, EVENT_TIME, EVENT_TYPE])
            )
        return EventField(name, fields[name])

    def _profile(self, node: ast.expr, parts: list[str]) -> AggregateValue:
        name = parts[0]
        if len(parts) > 1:
            raise self._mistake(node, f"profile value {shown(name)} has no names in it")
        if name not in self._scope.profile:
            raise self._mistake(node, f"unknown profile value {shown(name)}" + suggestion(name, self._scope.profile))
        return self._aggregate_value(self._scope.profile[name])

    def _stored(self, node: ast.expr, parts: list[str]) -> StoredValue:
        if len(parts) != 3 or not all(parts):
            raise self._mistake(node, "another model's output is models.<tenant>.<model>.<output>")
        tenant, model, output = parts
        return StoredValue(StoredOutput(expression_name(ModelName(tenant, model)), output))

    def _shared(self, node: ast.expr, parts: list[str]) -> SharedValue:
        try:
            return self._scope.shared(SharedName.of(parts))
        except NotFound as error:
            raise self._mistake(node, str(error)) from None

    def _unary(self, node: ast.UnaryOp) -> Node:
        if isinstance(node.op, ast.Not):
            return Operation("not", self._conditions([node.operand]), "boolean")
        if isinstance(node.op, ast.USub):
            return Operation("negate", self._numbers([node.operand], "-"), "number")
        raise self._mistake(node, "this operator is not part of the expression language")

    def _binary(self, node: ast.BinOp) -> Node:
        name = _ARITHMETIC.get(type(node.op))
        if name is None:
            raise self._mistake(node, "this operator is not part of the expression language; use + - * / // % **")
        return Operation(name, self._numbers([node.left, node.right], name), "number")

    def _comparison(self, node: ast.Compare) -> Node:
        """`a < b < c` is `a < b and b < c`."""
        lefts = [node.left, *node.comparators[:-1]]
        pairs: list[Node] = []
        rejected: _Rejected | None = None
        for left, operator, right in zip(lefts, node.ops, node.comparators, strict=True):
            try:
                pairs.append(self._pair(left, operator, right))
            except _Rejected as error:
                rejected = error
        if rejected is not None:
            raise rejected
        return pairs[0] if len(pairs) == 1 else Operation("and", tuple(pairs), "boolean")

    def _pair(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Node:
        if isinstance(operator, ast.In | ast.NotIn):
            return self._membership(left, right, negated=isinstance(operator, ast.NotIn))
        name = _COMPARISONS.get(type(operator))
        if name is None:
            raise self._mistake(left, "`is` is not part of the expression language; use == or is_missing(x)")
        first, second = self._each([left, right])
        if self._common_type([left, right], [first, second], "what is compared") != "text":
            return Operation(name, (first, second), "boolean")
        if name not in ("==", "!="):
            raise self._mistake(left, f"texts can be compared with ==, != and in, not with {name}")
        if isinstance(first, Literal):
            first, second = second, first
        if isinstance(second, Literal):
            return Membership(first, frozenset({str(second.value)}), negated=name == "!=")
        return Operation(name, (first, second), "boolean")

    def _membership(self, left: ast.expr, right: ast.expr, *, negated: bool) -> Membership:
        if not isinstance(right, ast.Tuple | ast.List) or not right.elts:
            raise self._mistake(right, "`in` takes a list of literals, such as ('web', 'app')")
        item, *values = self._each([left, *right.elts])
        literals: list[float | str] = []
        for source, value in zip(right.elts, values, strict=True):
            if isinstance(value, Operation) and value.name == "negate" and isinstance(value.arguments[0], Literal):
                literals.append(-float(value.arguments[0].value))
            elif isinstance(value, Literal):
                literals.append(value.value)
            else:
                raise self._mistake(source, "`in` takes literals only; compare other values with ==")
        self._common_type([left, *right.elts], [item, *values], "what is compared")
        return Membership(item, cast("frozenset[float] | frozenset[str]", frozenset(literals)), negated)

    def _conditional(self, node: ast.IfExp) -> Node:
        then, condition, otherwise = self._each([node.body, node.test, node.orelse])
        self._require_boolean(node.test, condition)
        kind = self._common_type([node.body, node.orelse], [then, otherwise], "both results of an if")
        return Operation("if", (condition, then, otherwise), kind)

    def _call(self, node: ast.Call) -> Node:
        if not isinstance(node.func, ast.Name):
            raise self._mistake(node, "only the functions of the expression language can be called")
        name = node.func.id
        if name not in _CALLABLE:
            raise self._mistake(node, f"unknown function {shown(name)}" + suggestion(name, _CALLABLE))
        if name not in _FUNCTIONS or self._names_event_field(node.args):
            return self._aggregate(node, name)
        if node.keywords:
            raise self._mistake(node, f"{name} takes no named arguments")
        return self._function(node, name)

    def _names_event_field(self, arguments: Sequence[ast.expr]) -> bool:
        """Whether min or max is the aggregate: its first argument is `<type>.<field>`."""
        if not arguments or not isinstance(arguments[0], ast.Attribute | ast.Subscript):
            return False
        root: ast.expr = arguments[0]
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        return isinstance(root, ast.Constant) or (isinstance(root, ast.Name) and root.id not in _ROOTS)

    def _function(self, node: ast.Call, name: str) -> Node:
        least, most = _FUNCTIONS[name]
        if not least <= len(node.args) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise self._mistake(node, f"{name} takes {wanted} argument(s), {len(node.args)} given")
        if name == "coalesce":
            arguments = self._each(node.args)
            return Operation(name, tuple(arguments), self._common_type(node.args, arguments, "arguments of coalesce"))
        if name == "is_missing":
            return Operation(name, tuple(self._each(node.args)), "boolean")
        return Operation(name, self._numbers(node.args, name), "number")

    def _aggregate(self, node: ast.Call, name: str) -> Node:
        if self._filtering:
            raise self._mistake(node, "where= may use only event.<field> and literals, not an aggregate")
        if name not in _AGGREGATES:
            raise self._mistake(node, f"{name} takes values, not fields of an event type; write event.<field>")
        if not node.args:
            raise self._mistake(
                node, f"{name} takes an event type" + (" and field" if name in _FIELD_AGGREGATES else "")
            )
        if name == "seconds_since":
            if len(node.args) > 1 or node.keywords:
                raise self._mistake(node, "seconds_since takes an event type and nothing else")
            return AggregateValue(Aggregate("since", self._event_name(node.args[0])))
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        windows = [*node.args[1:], *(value for key, value in options.items() if key == "session")]
        if len(windows) > 1 or not options.keys() <= {"session", "where"} or len(options) < len(node.keywords):
            said = f"{name} takes what to aggregate, a window such as '1h' or session='30m', and where=…; nothing else"
            raise self._mistake(node, said)
        event, name_of_field = self._subject(node.args[0], name)
        window_ms = self._window(windows[0]) * (-1 if "session" in options else 1) if windows else 0
        where = self._where(options["where"]) if "where" in options else ""
        return self._aggregate_value(Aggregate(cast("AggregateFunction", name), event, name_of_field, window_ms, where))

    def _aggregate_value(self, aggregate: Aggregate) -> AggregateValue:
        keeps_type = aggregate.function in ("first", "last", "min", "max")
        boolean = keeps_type and self._scope.schema.fields.get(aggregate.field) == "boolean"
        return AggregateValue(aggregate, "boolean" if boolean and aggregate.field != EVENT_TIME else "number")

    def _event_name(self, node: ast.expr) -> str:
        types = self._scope.schema.types
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
        elif isinstance(node, ast.Name):
            name = node.id
            if name == "any":
                return ANY_EVENT
        else:
            raise self._mistake(node, "an event type is expected here" + suggestion("", types))
        if name not in types:
            raise self._mistake(node, f"unknown event type {shown(name)}" + suggestion(name, [*types, "any"]))
        return name

    def _subject(self, node: ast.expr, function: str) -> tuple[str, str]:
        """`<type>` of count, `<type>.<field>` of the others -> (event, field)."""
        if function == "count":
            return self._event_name(node), ""
        root, parts = self._path(node)
        if len(parts) != 1 or (isinstance(root, ast.Name) and root.id in _ROOTS):
            example = f"{next(iter(self._scope.schema.types), 'any')}.<field>"
            raise self._mistake(node, f"{function} takes <type>.<field>, such as {function}({example}, '1h')")
        event, name = self._event_name(root), parts[0]
        fields = self._scope.schema.fields
        kind = "number" if name == EVENT_TIME else fields.get(name)
        if kind is None:
            raise self._mistake(node, f"unknown event field {shown(name)}" + suggestion(name, [*fields, EVENT_TIME]))
        if function == "distinct" and kind == "boolean":
            raise self._mistake(node, f"distinct takes text and number fields, {shown(name)} is boolean")
        if function != "distinct" and kind == "text":
            raise self._mistake(node, f"{function} takes number and boolean fields, {shown(name)} is text")
        return event, name

    def _window(self, node: ast.expr) -> int:
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            raise self._mistake(node, "a window is a text such as '1h'")
        try:
            return parse_duration(node.value, WINDOW_MS_MAX)
        except ValueError as error:
            raise self._mistake(node, f"window {error}") from None

    def _where(self, node: ast.expr) -> str:
        self._condition_of_filter(node)
        canonical = ast.unparse(node)
        if len(canonical.encode()) > EXPRESSION_BYTES_MAX:
            raise self._mistake(node, f"where= is longer than {EXPRESSION_BYTES_MAX} bytes")
        return canonical

    def _condition_of_filter(self, node: ast.expr) -> Node:
        self._filtering = True
        try:
            condition = self._node(node)
        finally:
            self._filtering = False
        self._require_boolean(node, condition)
        return condition
