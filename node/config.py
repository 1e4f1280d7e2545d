"""The operator's one TOML file, checked whole at start.

The annotations in `node.config_sections` check the file, word the mistakes and make the README's reference
table (`config_reference`). Every mistake is one line that says where, what is there and what is allowed,
and all of them are found in one go.
"""

from __future__ import annotations

import difflib
import keyword
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from node.config_cluster import cluster_problems
from node.config_sections import (
    OPTIONAL_SECTIONS,
    PATTERN_WORDS,
    SECTIONS,
    ClusterSection,
    Config,
    CycleSection,
    EventsSection,
    Expression,
    FieldSection,
    HttpSection,
    Identifier,
    KafkaSection,
    NodeSection,
    Section,
    StateSection,
    TenantsSection,
    Topic,
)
from node.kernel import limits
from node.kernel.errors import ConfigError, printable

__all__ = [
    "ClusterSection",
    "Config",
    "CycleSection",
    "EventsSection",
    "FieldSection",
    "HttpSection",
    "KafkaSection",
    "NodeSection",
    "StateSection",
    "TenantsSection",
    "config_reference",
    "load_config",
    "parse_config",
]

CONFIG_BYTES_MAX = limits.MIB
REFERENCE_MARKER = "<!-- config reference -->"
"""Stands in the README before and after the text of `config_reference`."""
PROFILE_REFERENCE = (
    "| `[profile] <name>` | an aggregate expression | none | Profile values that manifests share as `profile.<name>`, "
    'such as `spend_total = "sum(transaction.amount)"`: each is a slot in every customer\'s row. |'
)


def load_config(path: Path | str, secrets: bool = True) -> Config:
    """Read and check the file, its paths made absolute.

    Without `secrets` none has to be there: systemd takes its credentials away from a unit that is stopped.
    Raises ConfigError with one line for each mistake, about the file's text or what it names on this machine.
    """
    path = Path(path)
    config = parse_config(_read(path), path.resolve().parent)
    problems = [*_file_problems(config), *(_secret_problems(config) if secrets else ())]
    if problems:
        raise ConfigError([printable(problem) for problem in problems])
    return config


def parse_config(text: str, folder: Path) -> Config:
    """Check the text alone; relative paths are taken from `folder`. Raises ConfigError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"the file is not TOML: {error}"]) from error
    problems: list[str] = []
    tables = _tables(document, problems)
    sections = {name: _section(name, kind, tables.get(name), problems) for name, kind in SECTIONS.items()}
    profile = _profile(tables.get("profile", {}), problems)
    problems.extend(_cross_problems(sections))
    problems.extend(_cluster_problems(sections, given="cluster" in tables))
    if problems:
        raise ConfigError([printable(problem) for problem in problems])
    built: dict[str, Any] = {
        name: kind(**sections[name])
        for name, kind in SECTIONS.items()
        if name in tables or name not in OPTIONAL_SECTIONS
    }
    config = Config(**built, profile=profile)
    return _with_absolute_paths(config, folder)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError([f"the file can't be read: {error.strerror}"]) from error
    if len(data) > CONFIG_BYTES_MAX:
        raise ConfigError([f"the file is larger than {CONFIG_BYTES_MAX} bytes"])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError([f"the file is not UTF-8: {error.reason} at byte {error.start}"]) from error


def _tables(document: Mapping[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
    names = [*SECTIONS, "profile"]
    tables = {}
    for name, table in document.items():
        if name not in names:
            problems.append(f"[{name}] is not a table of the config; {_suggestion(name, names)}")
        elif not isinstance(table, dict):
            problems.append(f"{name} is {_shown(table)}; allowed: a table, [{name}]")
        else:
            tables[name] = table
    if "events" not in document:
        problems.append("[events] is missing; needed: at least `types`")
    return tables


def _section(name: str, kind: type[Section], table: dict[str, Any] | None, problems: list[str]) -> dict[str, Any]:
    """The values of the table that are right; each that is not adds a line to `problems`."""
    if table is None:
        return {}
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            problems.append(f"[{name}] {key} is not known; {_unknown(key, list(fields))}")
        elif (name, key) == ("events", "fields"):
            values[key] = _event_fields(value, problems)
        else:
            problem = _value_problem(f"[{name}] {key}", value, fields[key].type)
            if problem:
                problems.append(problem)
            else:
                values[key] = msgspec.convert(value, fields[key].type)
    problems.extend(
        f"[{name}] {key} is missing; allowed: {allowed(field.type)}"
        for key, field in fields.items()
        if field.required and key not in table
    )
    return values


def _value_problem(where: str, value: Any, kind: Any) -> str:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        element = re.search(r"`\$\[(\d+)\]`$", str(error))
        if element:
            where, value = f"{where}[{element[1]}]", value[int(element[1])]
        return f"{where} is {_shown(value)}; allowed: {allowed(kind)}"
    return ""


def _event_fields(value: Any, problems: list[str]) -> dict[str, FieldSection]:
    where = "[events.fields]"
    if not isinstance(value, dict) or len(value) > limits.EVENT_FIELDS_MAX:
        problems.append(f"{where} is {_shown(value)}; allowed: a table of at most {limits.EVENT_FIELDS_MAX} fields")
        return {}
    fields = {}
    for name, declared in value.items():
        problem = _identifier_problem(f"{where} {name}", name)
        if name == "time":
            problem = f"{where} time is taken: every event has event.time; give the field another name"
        table = {"path": name, "type": declared} if isinstance(declared, str) else declared
        if not isinstance(table, dict):
            problem = (
                problem or f'{where} {name} is {_shown(declared)}; allowed: a type, or {{ path = "…", type = "…" }}'
            )
        if problem:
            problems.append(problem)
            continue
        mistakes: list[str] = []
        values = _section(f"events.fields.{name}", FieldSection, {"path": name, **table}, mistakes)
        problems.extend(mistakes)
        if not mistakes:
            fields[name] = FieldSection(**values)
    return fields


def _profile(table: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    for name, expression in table.items():
        where = f"[profile] {name}"
        problem = _identifier_problem(where, name) or _value_problem(where, expression, Expression)
        if problem:
            problems.append(problem)
    return dict(table)


def _identifier_problem(where: str, name: str) -> str:
    if keyword.iskeyword(name) or _value_problem(where, name, Identifier):
        return f"{where} can't be named in a manifest; allowed: {allowed(Identifier)}, not a word of Python"
    return ""


def _cross_problems(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Mistakes between fields that are each right alone; a field that was wrong stands at its default."""
    kafka = KafkaSection(**sections["kafka"])
    yield from _topic_problems(kafka)
    yield from _security_problems(kafka)
    if isinstance(kafka.partitions, tuple):
        yield from _list_problems("[kafka] partitions", kafka.partitions)
        if not kafka.partitions:
            yield '[kafka] partitions is []; allowed: "all", or a list of at least one partition'
    yield from _port_problems(kafka.bootstrap)
    events = sections["events"]
    types = events.get("types", ())
    yield from _list_problems("[events] types", types)
    for name in types:
        if keyword.iskeyword(name):
            yield f"[events] types has {_shown(name)}, a word of Python that no manifest can name"
    yield from _type_text_problems(types, events.get("type_texts", {}))
    yield from _path_problems(EventsSection(**{"types": ("any",), **events}))


def _cluster_problems(sections: Mapping[str, Mapping[str, Any]], given: bool) -> Iterator[str]:
    """Only once each field that is needed is there and right: the rest says nothing without them."""
    needed = {field.name for field in msgspec.structs.fields(ClusterSection) if field.required}
    if given and needed <= sections["cluster"].keys():
        node, kafka = NodeSection(**sections["node"]), KafkaSection(**sections["kafka"])
        http = HttpSection(**sections["http"])
        yield from cluster_problems(ClusterSection(**sections["cluster"]), node.name, kafka, http)


def _type_text_problems(types: Sequence[str], texts: Mapping[str, str]) -> Iterator[str]:
    for name in texts:
        if types and name not in types:
            yield f"[events] type_texts has {_shown(name)}, which is not in types; {_suggestion(name, types)}"
    yield from _list_problems(
        "[events] types and type_texts together", [texts.get(name, name) for name in dict.fromkeys(types)]
    )


def _topic_problems(kafka: KafkaSection) -> Iterator[str]:
    yield from _list_problems("[kafka] topics", kafka.topics)
    users = dict.fromkeys(kafka.topics, "topics")
    for name in ("inferences_topic", "changelog_topic", "dead_letters_topic", "rows_topic"):
        topic = getattr(kafka, name)
        if topic in (".", "..") or _value_problem("", topic, Topic):
            yield f"[kafka] {name} is {_shown(topic)}; allowed: {allowed(Topic)}"
        if topic in users:
            yield f"[kafka] {name} is {_shown(topic)}, which is also in {users[topic]}; allowed: a topic of its own"
        users[topic] = name


def _list_problems(where: str, values: Sequence[Any]) -> Iterator[str]:
    for value in dict.fromkeys(values):
        if values.count(value) > 1:
            yield f"{where} has {_shown(value)} {values.count(value)} times; allowed: once"


def _port_problems(bootstrap: Sequence[str]) -> Iterator[str]:
    for index, broker in enumerate(bootstrap):
        if not 1 <= int(broker.rpartition(":")[2]) <= 65_535:
            yield f"[kafka] bootstrap[{index}] is {_shown(broker)}; allowed: a port from 1 to 65535"


def _security_problems(kafka: KafkaSection) -> Iterator[str]:
    names = ("sasl_mechanism", "sasl_username", "sasl_password_file", "sasl_password_env")
    given = [name for name in names if getattr(kafka, name)]
    if not kafka.security_protocol.startswith("SASL"):
        for name in given:
            yield f"[kafka] {name} is set, but security_protocol is {kafka.security_protocol}; allowed: with SASL_*"
        return
    for name in ("sasl_mechanism", "sasl_username"):
        if name not in given:
            yield f"[kafka] {name} is missing; needed with security_protocol {kafka.security_protocol}"
    if ("sasl_password_file" in given) == ("sasl_password_env" in given):
        yield "[kafka] sasl_password_file and sasl_password_env: exactly one is needed with SASL_*"


def _path_problems(events: EventsSection) -> Iterator[str]:
    """Each path is read once, and none goes through a value that another reads."""
    readers = {f"[events] {name}": getattr(events, name) for name in ("type", "time", "customer")}
    readers |= {f"[events.fields] {name}": field.path for name, field in events.fields.items()}
    seen: dict[str, str] = {}
    for where, path in readers.items():
        if path in seen:
            yield f"{where} has the path {_shown(path)}, which {seen[path]} reads already; allowed: each path once"
        seen[path] = where
    for where, path in readers.items():
        keys = path.split(".")
        for length in range(1, len(keys)):
            parent = ".".join(keys[:length])
            if parent in seen:
                yield f"{where} has the path {_shown(path)}, but {seen[parent]} reads {_shown(parent)} as one value"


def _with_absolute_paths(config: Config, folder: Path) -> Config:
    def absolute(path: str) -> str:
        return str((folder / os.path.expanduser(path)).resolve()) if path else ""

    replace = msgspec.structs.replace
    kafka, cluster = config.kafka, config.cluster
    return replace(
        config,
        node=replace(config.node, data_dir=absolute(config.node.data_dir)),
        tenants=replace(config.tenants, directory=absolute(config.tenants.directory)),
        kafka=replace(
            kafka, ssl_ca_file=absolute(kafka.ssl_ca_file), sasl_password_file=absolute(kafka.sasl_password_file)
        ),
        cluster=replace(cluster, secret_file=absolute(cluster.secret_file)) if cluster is not None else None,
    )


def _file_problems(config: Config) -> Iterator[str]:
    yield from _directory_problems("[node] data_dir", Path(config.node.data_dir))
    yield from _directory_problems("[tenants] directory", Path(config.tenants.directory), made=False)
    data, tenants = Path(config.node.data_dir), Path(config.tenants.directory)
    if data == tenants or data in tenants.parents or tenants in data.parents:
        yield f"[tenants] directory is {tenants} and [node] data_dir is {data}; allowed: neither inside the other"
    if config.kafka.ssl_ca_file:
        yield from problems_of(config.kafka.ssl_context)


def _directory_problems(where: str, path: Path, made: bool = True) -> Iterator[str]:
    """A folder that is `made` at start may be missing if its nearest existing parent is writable; another one is
    awaited, as it may just not be mounted."""
    try:
        existing = nearest_existing(path)
    except OSError as error:
        yield f"{where} is {path}: {error.strerror}; allowed: a folder that the node can write"
        return
    if not existing.is_dir():
        yield f"{where} is {path}, but {existing} is not a folder; allowed: a folder that the node can write"
    elif (made or existing == path) and not os.access(existing, os.W_OK | os.X_OK):
        yield f"{where} is {path}, but {existing} is not writable; allowed: a folder that the node can write"


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest of its parents that is there. Raises OSError when that can't be told."""
    return next(place for place in (path, *path.parents) if place.exists() or place == place.parent)


def _secret_problems(config: Config) -> Iterator[str]:
    readers: list[Callable[[], object]] = [config.kafka.sasl_password]
    if config.cluster is not None:
        readers.append(config.cluster.secret)
    for read in readers:
        yield from problems_of(read)


def problems_of(read: Callable[[], object]) -> Sequence[str]:
    """What a ConfigError says that it raises."""
    try:
        read()
    except ConfigError as error:
        return error.problems
    return ()


def allowed(kind: Any) -> str:
    """What a value of an annotated type may be, in words."""
    return _allowed(msgspec.inspect.type_info(kind))


def _allowed(kind: msgspec.inspect.Type) -> str:
    match kind:
        case msgspec.inspect.Metadata(type=inner):
            return _allowed(inner)
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            noun = "an integer" if isinstance(kind, msgspec.inspect.IntType) else "a number"
            low = f"above {kind.gt}" if kind.gt is not None else f"from {kind.ge}"
            return f"{noun} {low} to {kind.le}"
        case msgspec.inspect.StrType():
            if kind.pattern:
                return PATTERN_WORDS.get(kind.pattern, f"a text that matches {kind.pattern}")
            return f"a text of {kind.min_length or 0} to {kind.max_length} characters"
        case msgspec.inspect.LiteralType():
            return " or ".join(f'"{value}"' for value in sorted(kind.values, key=str))
        case msgspec.inspect.VarTupleType():
            size = f" of {kind.min_length} to {kind.max_length}" if kind.min_length else ""
            return f"a list{size}, each {_allowed(kind.item_type)}"
        case msgspec.inspect.UnionType():
            return ", or ".join(_allowed(member) for member in kind.types)
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            if isinstance(value, msgspec.inspect.StructType):
                return "a table"
            size = f"{kind.min_length} to {kind.max_length} entries, " if kind.min_length else ""
            return f"a table of {size}{_allowed(key)}, to {_allowed(value)}"
        case _:
            raise TypeError(f"no words for {kind}: config fields are numbers, texts, booleans, choices, lists, tables")


def _unknown(key: str, known: Sequence[str]) -> str:
    for section, kind in SECTIONS.items():
        if key in kind.__struct_fields__:
            return f"it belongs in [{section}]"
    return _suggestion(key, known)


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(known)}"


def _shown(value: Any) -> str:
    try:
        text = repr(value) if isinstance(value, float) else msgspec.json.encode(value).decode()
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def config_reference() -> str:
    """A Markdown table of every field: where, what is allowed, default, trade-off."""
    lines = ["| field | allowed | default | trade-off |", "| --- | --- | --- | --- |"]
    for name, kind in SECTIONS.items():
        for field in msgspec.structs.fields(kind):
            info = msgspec.inspect.type_info(field.type)
            extra = info.extra_json_schema or {} if isinstance(info, msgspec.inspect.Metadata) else {}
            default = "needed" if field.required else f"`{_shown(_default(field))}`"
            cells = [f"`[{name}] {field.name}`", allowed(field.type), default, extra.get("description", "")]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    lines.append(PROFILE_REFERENCE)
    return "\n".join(lines) + "\n"


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default_factory() if field.default is msgspec.NODEFAULT else field.default
