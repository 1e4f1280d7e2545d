"""Every mistake in the config file is told, each in one line: where, what is there, what is allowed."""

from __future__ import annotations

import os
import string
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from node.config import REFERENCE_MARKER, Config, config_reference, load_config, parse_config
from node.config_sections import OPTIONAL_SECTIONS, SECTIONS, ClusterSection, Section
from node.kernel.errors import ConfigError

ROOT = Path(__file__).parents[2]

GOOD = """
[events]
types = ["search", "transaction"]
[events.fields]
amount = "number"
sku = { path = "basket.sku", type = "text" }
[profile]
spend = "sum(transaction.amount)"
"""


def parse(text: str) -> Config:
    return parse_config(text, Path("/folder"))


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert all("\n" not in problem for problem in caught.value.problems)
    return list(caught.value.problems)


def problem(section: str, line: str) -> str:
    """The one mistake that a line in a section of an otherwise good file makes."""
    text = GOOD.replace("[events]\n", f"[events]\n{line}\n") if section == "events" else f"{GOOD}\n[{section}]\n{line}"
    (only,) = problems(text)
    return only


def test_a_small_file_is_enough() -> None:
    config = parse(GOOD)
    assert config.events.types == ("search", "transaction")
    assert config.events.fields["amount"].path == "amount"
    assert config.node.data_dir == "/folder/data"
    assert config.tenants.directory == "/folder/tenants"
    schema = config.schema()
    assert schema.types == ("search", "transaction")
    assert dict(schema.fields) == {"amount": "number", "sku": "text"}
    assert dict(schema.profile) == {"spend": "sum(transaction.amount)"}


def test_topics_follow_the_application_unless_named() -> None:
    kafka = parse(
        f'{GOOD}[kafka]\napplication = "shop"\nchangelog_topic = "log"\ninferences_topic = "{{application}}x"'
    ).kafka
    assert (kafka.inferences_topic, kafka.changelog_topic) == ("shopx", "log")
    assert kafka.dead_letters_topic == "shop.dead-letters"


@pytest.mark.parametrize(
    ("section", "line", "expected"),
    [
        (
            "cycle",
            'commit_interval_ms = "fast"',
            '[cycle] commit_interval_ms is "fast"; allowed: an integer from 1 to 10000',
        ),
        ("cycle", "events_max = 0", "[cycle] events_max is 0; allowed: an integer from 1 to 65536"),
        ("cycle", "events_max = true", "[cycle] events_max is true; allowed: an integer from 1 to 65536"),
        ("cycle", "events_max = 1.5", "[cycle] events_max is 1.5; allowed: an integer from 1 to 65536"),
        ("cycle", "evnts_max = 5", "[cycle] evnts_max is not known; did you mean events_max?"),
        ("kafka", "commit_interval_ms = 5", "[kafka] commit_interval_ms is not known; it belongs in [cycle]"),
        ("http", "zzz = 5", "[http] zzz is not known; allowed: host, port"),
        ("htp", "port = 5", "[htp] is not a table of the config; did you mean http?"),
        ("kafka", 'compression = "lz5"', '[kafka] compression is "lz5"; allowed: "gzip" or "lz4" or "none" or'),
        ("kafka", "create_topics = 1", "[kafka] create_topics is 1; allowed: true or false"),
        ("kafka", "topics = []", "[kafka] topics is []; allowed: a list of 1 to 64, each a Kafka topic name"),
        ("kafka", 'topics = "events"', '[kafka] topics is "events"; allowed: a list of 1 to 64, each'),
        ("kafka", 'topics = ["a", "b c"]', '[kafka] topics[1] is "b c"; allowed: a list'),
        ("kafka", 'topics = ["a", "b", "a"]', '[kafka] topics has "a" 2 times; allowed: once'),
        ("kafka", 'topics = ["a\\n"]', r'[kafka] topics[0] is "a\n"; allowed: a list'),
        (
            "kafka",
            'topics = ["headrace.inferences"]',
            '[kafka] inferences_topic is "headrace.inferences", which is also',
        ),
        (
            "kafka",
            'changelog_topic = "x"\ndead_letters_topic = "x"',
            '[kafka] dead_letters_topic is "x", which is also in changelog_topic',
        ),
        ("kafka", 'changelog_topic = ".."', '[kafka] changelog_topic is ".."; allowed: a Kafka topic name'),
        (
            "kafka",
            'bootstrap = ["localhost"]',
            '[kafka] bootstrap[0] is "localhost"; allowed: a list of 1 to 64, each host:port',
        ),
        (
            "kafka",
            'bootstrap = ["a:1", "b:70000"]',
            '[kafka] bootstrap[1] is "b:70000"; allowed: a port from 1 to 65535',
        ),
        (
            "kafka",
            'partitions = "some"',
            '[kafka] partitions is "some"; allowed: "all", or a list, each an integer from 0',
        ),
        ("kafka", "partitions = []", '[kafka] partitions is []; allowed: "all", or a list of at least one partition'),
        ("kafka", "partitions = [1, 1]", "[kafka] partitions has 1 2 times; allowed: once"),
        ("kafka", "partitions = [1, -1]", "[kafka] partitions[1] is -1; allowed"),
        ("kafka", 'sasl_username = "u"', "[kafka] sasl_username is set, but security_protocol is PLAINTEXT"),
        ("node", 'data_dir = ""', '[node] data_dir is ""; allowed: a path'),
        ("node", 'data_dir = "a\\u0000"', '[node] data_dir is "a\\u0000"; allowed: a path'),
        ("node", 'log_level = "loud"', '[node] log_level is "loud"; allowed: "debug" or "error" or'),
        ("tenants", "weight_max = 0", "[tenants] weight_max is 0; allowed: a number above 0 to 1000"),
        ("tenants", "weight_max = nan", "[tenants] weight_max is nan; allowed: a number above 0 to 1000"),
        ("tenants", 'allow = ["torch"]', '[tenants] allow[0] is "torch"; allowed: a list, each'),
        ("tenants", 'allow_globals = ["os"]', '[tenants] allow_globals[0] is "os"; allowed: a list'),
        (
            "events",
            'type_texts = { serch = "a.b" }',
            '[events] type_texts has "serch", which is not in types; did you mean',
        ),
        ("events", 'type_texts = { search = "" }', '[events] type_texts is {"search":""}; allowed: a table of a name'),
        (
            "events",
            'type_texts = { search = "transaction" }',
            '[events] types and type_texts together has "transaction" 2',
        ),
        ("events", "time = 5", "[events] time is 5; allowed: a path of keys joined by dots"),
        ("events", 'time = "a..b"', '[events] time is "a..b"; allowed: a path of keys joined by dots'),
        ("events", 'time = "type"', '[events] time has the path "type", which [events] type reads already'),
        (
            "events",
            'time = "basket"',
            '[events.fields] sku has the path "basket.sku", but [events] time reads "basket"',
        ),
        ("events.fields.time", 'path = "t"\ntype = "number"', "[events.fields] time is taken"),
        ("events.fields.if", 'type = "number"', "[events.fields] if can't be named in a manifest"),
        (
            "events.fields.price",
            'type = "numbr"',
            '[events.fields.price] type is "numbr"; allowed: "boolean" or "number" or "text"',
        ),
        (
            "events.fields.price",
            'path = "p"',
            '[events.fields.price] type is missing; allowed: "boolean" or "number" or "text"',
        ),
        (
            "events.fields.price",
            'path = "amount"\ntype = "text"',
            '[events.fields] price has the path "amount", which [events.fields] amount',
        ),
        ("events.fields.price", 'type = "text"\nx = 1', "[events.fields.price] x is not known; allowed: path, type"),
    ],
)
def test_one_mistake_is_one_line(section: str, line: str, expected: str) -> None:
    assert problem(section, line).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["[events] is missing; needed: at least `types`"]),
        ("[events]", ["[events] types is missing; allowed: a list of 1 to 256, each a name"]),
        ("events = 3", ["events is 3; allowed: a table, [events]"]),
        ('[events]\ntypes = ["if"]', ['[events] types has "if", a word of Python']),
        ('[events]\ntypes = ["*"]', ['[events] types[0] is "*"; allowed']),
        ('[events]\ntypes = ["a", "a"]', ['[events] types has "a" 2 times']),
        ('[events]\ntypes = ["a"]\nfields = 3', ["[events.fields] is 3; allowed: a table"]),
        ('[events]\ntypes = ["a"]\n[events.fields]\nx = 3', ["[events.fields] x is 3; allowed: a type, or"]),
        ('[events]\ntypes = ["a"]\n[profile]\nx = 3\ny = ""', ["[profile] x is 3", '[profile] y is ""']),
        ("[events", ["the file is not TOML: "]),
        ("a = 1\na = 2", ["the file is not TOML: "]),
    ],
)
def test_mistakes_of_the_whole_file(text: str, expected: list[str]) -> None:
    found = problems(text)
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


def test_all_mistakes_are_told_at_once() -> None:
    text = (
        f'{GOOD}\n[kafka]\nbootstrap = ["x"]\ncompresion = "lz4"\n[http]\nport = -1\n[cycle]\nwait_ms = 0\n[tenant]\n'
    )
    places = [line.split(" is ")[0] for line in problems(text)]
    assert sorted(places) == sorted(
        ["[tenant]", "[kafka] bootstrap[0]", "[kafka] compresion", "[http] port", "[cycle] wait_ms"]
    )


SASL = '[kafka]\nsecurity_protocol = "SASL_SSL"\nsasl_mechanism = "PLAIN"\nsasl_username = "node"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "headrace.toml"
    path.write_text(text)
    return path


def load_problems(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return list(caught.value.problems)


def test_paths_start_at_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, f'{GOOD}[node]\ndata_dir = "state"\n[tenants]\ndirectory = "{tmp_path}/models"')
    monkeypatch.chdir(tmp_path)
    config = load_config("headrace.toml")
    assert (config.node.data_dir, config.tenants.directory) == (f"{tmp_path}/state", f"{tmp_path}/models")


def test_folders_must_be_folders_apart_from_each_other(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = write(tmp_path, f'{GOOD}[node]\ndata_dir = "file/data"\n[tenants]\ndirectory = "file"')
    where = [line.split("; allowed: ") for line in load_problems(path)]
    assert [place.split(" is ")[0] for place, _ in where] == [
        "[node] data_dir", "[tenants] directory", "[tenants] directory"
    ]  # fmt: skip
    assert where[-1][1] == "neither inside the other"


@pytest.mark.parametrize("name", ["/proc/1/nothing/data", "/dev/null/data", "a" * 300])
def test_a_folder_that_cannot_be_made_is_a_mistake(tmp_path: Path, name: str) -> None:
    (line,) = load_problems(write(tmp_path, f'{GOOD}[node]\ndata_dir = "{name}"'))
    assert line.startswith("[node] data_dir is ")


def test_a_watched_folder_may_be_a_mount_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "mounts"
    place.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _mode: path != place)  # root may write anywhere
    load_config(write(tmp_path, f'{GOOD}[tenants]\ndirectory = "mounts/models"'))
    for section, name in (("tenants", 'directory = "mounts"'), ("node", 'data_dir = "mounts/data"')):
        (only,) = load_problems(write(tmp_path, f"{GOOD}[{section}]\n{name}"))
        assert only.startswith(f"[{section}] {name.split()[0]} is ")


def test_the_password_stays_out_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("hunter2\n")
    monkeypatch.setenv("KAFKA_PASSWORD", "hunter2")
    for line in ('sasl_password_file = "secret"', 'sasl_password_env = "KAFKA_PASSWORD"'):
        config = load_config(write(tmp_path, f"{GOOD}{SASL}{line}"))
        assert config.kafka.sasl_password() == "hunter2"
        assert "hunter2" not in repr(config)
        assert b"hunter2" not in msgspec.json.encode(config)
    assert parse(GOOD).kafka.sasl_password() is None


def test_a_password_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    assert "KAFKA_NO_SUCH" not in os.environ
    for line in ('sasl_password_file = "none"', 'sasl_password_env = "KAFKA_NO_SUCH"'):
        (problem,) = load_problems(write(tmp_path, f"{GOOD}{SASL}{line}"))
        assert problem.startswith(f"[kafka] {line.split()[0]} is ")
    for lines in (SASL, f'{SASL}sasl_password_file = "a"\nsasl_password_env = "b"\n'):
        assert any("exactly one is needed" in line for line in problems(GOOD + lines))
    missing = problems(f'{GOOD}[kafka]\nsecurity_protocol = "SASL_SSL"\nsasl_password_env = "b"')
    assert [line.split(";")[0] for line in missing] == [
        "[kafka] sasl_mechanism is missing", "[kafka] sasl_username is missing"
    ]  # fmt: skip


@pytest.mark.parametrize("protocol", ["SSL", "PLAINTEXT"])
def test_authorities_must_be_certificates(tmp_path: Path, protocol: str) -> None:
    text = f'{GOOD}[kafka]\nsecurity_protocol = "{protocol}"\nssl_ca_file = "ca.pem"'
    for content in (None, "", "no PEM\n"):
        if content is not None:
            (tmp_path / "ca.pem").write_text(content)
        (problem,) = load_problems(write(tmp_path, text))
        assert problem.startswith(f"[kafka] ssl_ca_file is {tmp_path}/ca.pem: ")
        assert problem.endswith("; allowed: a file of PEM certificates that the node can read")
    (tmp_path / "ca.pem").write_text(certificate())
    assert load_config(write(tmp_path, text)).kafka.ssl_context().cert_store_stats()["x509_ca"] == 1


def certificate() -> str:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shop")])
    from_time, to_time = datetime(2020, 1, 1, tzinfo=UTC), datetime(2120, 1, 1, tzinfo=UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), 7, from_time, to_time)
    signed = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, SHA256())
    return signed.public_bytes(Encoding.PEM).decode()


CLUSTER = """
[node]
name = "n1"
[cluster]
listen = "127.0.0.1:7100"
peers = { n1 = "127.0.0.1:7100", n2 = "127.0.0.1:7200" }
peer_listen = "127.0.0.1:7101"
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "lease_ms = 100", "[cluster] lease_ms is 100; allowed: an integer from 200 to 60000"),
        ("", "standbys = 5", "[cluster] standbys is 5; allowed: an integer from 0 to 4"),
        ("", 'rack = "a b"', '[cluster] rack is "a b"; allowed: letters'),
        ("", "weight = 0", "[cluster] weight is 0; allowed: a number from 0.001 to 1000"),
        ("", 'snapshot_url = "/folder"', '[cluster] snapshot_url is "/folder"; allowed: a URL such as'),
        ("", 'snapshot_url = "s3://key:word@bucket"', "[cluster] snapshot_url names a user; allowed: a URL without"),
        ("", 'snapshot_url = "s3://[bucket"', "[cluster] snapshot_url can't be read as a URL"),
        ("", 'peer_address = "peer"', '[cluster] peer_address is "peer"; allowed: host:port'),
        ("", 'peer_address = "0.0.0.0:1"', '[cluster] peer_address is "0.0.0.0:1"; allowed: an address that other'),
        ("", 'peer_address = "n1.shop:7101"', "[cluster] secret_file or secret_env is needed, since peer_address is"),
        ('n2 = "127.0.0.1:7200"', 'n2 = "10.0.0.2:7200"', "[cluster] secret_file or secret_env is needed, since peers"),
        ("", 'secret_file = "a"\nsecret_env = "b"', "[cluster] secret_file and secret_env: at most one may be set"),
        ("n1 = ", "n3 = ", '[cluster] peers has n3, n2, not this node; allowed: with "n1", the [node] name'),
        ("7200", "7100", '[cluster] peers has "127.0.0.1:7100" 2 times; allowed: an address of its own'),
        ("7200", "0", '[cluster] peers.n2 is "127.0.0.1:0"; allowed: a port from 1 to 65535'),
        ("7101", "7100", '[cluster] peer_listen is "127.0.0.1:7100", which is also listen; allowed'),
        (
            "127.0.0.1:7101",
            "localhost:7100",
            '[cluster] peer_listen is "localhost:7100", which is also listen; allowed',
        ),
        ("7101", "8080", '[http] port is 8080, and [cluster] peer_listen is "127.0.0.1:8080"; allowed: a port of its'),
        ("[node]", "[http]\nport = 7100\n[node]", '[http] port is 7100, and [cluster] listen is "127.0.0.1:7100"; all'),
        (
            "[node]",
            '[http]\nport = 7101\nhost = "0.0.0.0"\n[node]',
            '[http] port is 7101, and [cluster] peer_listen is "127.0.0.1:7101"; allowed: a port of its own',
        ),
        ("7101", "66666", '[cluster] peer_listen is "127.0.0.1:66666"; allowed: a port from 1 to 65535'),
        (
            '{ n1 = "127.0.0.1:7100", n2 = "127.0.0.1:7200" }',
            "{}",
            "[cluster] peers is {}; allowed: a table of 1 to 15",
        ),
        ('n2 = "127.0.0.1:7200"', '"n 2" = "127.0.0.1:7200"', "[cluster] peers is {"),
        ("peers", "# peers", "[cluster] peers is missing; allowed: a table of 1 to 15"),
        ("7101", "bad", "[cluster] peer_listen is"),
        ("[node]", "[kafka]\npartitions = [0]\n[node]", "[kafka] partitions is a list; allowed with [cluster]"),
        ("[node]", '[kafka]\ntransactions = "off"\n[node]', '[kafka] transactions is "off"; allowed with [cluster]'),
    ],
)
def test_one_mistake_of_a_cluster_is_one_line(old: str, new: str, expected: str) -> None:
    text = CLUSTER.replace(old, new) if old else CLUSTER + new
    assert text != CLUSTER
    (only,) = problems(GOOD + text)
    assert only.startswith(expected)


@pytest.mark.parametrize("http", ['host = "127.0.0.2"\nport = 7101', "port = 0", 'host = "::1"\nport = 7101'])
def test_a_port_may_be_taken_of_addresses_apart(http: str) -> None:
    assert parse(f"{GOOD}{CLUSTER}[http]\n{http}").cluster is not None


def test_a_node_of_a_cluster_takes_no_broker_that_cannot_fence() -> None:
    assert parse(GOOD).transactions == "auto"
    assert parse(GOOD + CLUSTER).transactions == "required"


def test_all_mistakes_of_a_cluster_are_told_at_once() -> None:
    text = CLUSTER.replace("127.0.0.1:7101", "0.0.0.0:7101").replace('name = "n1"', 'name = "n3"')
    found = problems(f'{GOOD}[kafka]\ntransactions = "off"\n{text}lease_ms = 1\nzone = "a"\n')
    assert len(found) == 6
    places = ["lease_ms", "zone", "peer_address", "peers has", "secret_file", "transactions"]
    assert all(any(place in line for line in found) for place in places)


def test_the_secret_stays_out_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = b"\xff sixteen or more"
    (tmp_path / "secret").write_bytes(secret + b"\n")
    monkeypatch.setenv("CLUSTER_SECRET", os.fsdecode(secret))
    for line in ('secret_file = "secret"', 'secret_env = "CLUSTER_SECRET"'):
        config = load_config(write(tmp_path, f"{GOOD}{CLUSTER}{line}"))
        assert config.cluster is not None
        assert config.cluster.secret() == secret
        assert b"sixteen" not in msgspec.json.encode(config)
        assert "sixteen" not in repr(config)
    plain = parse(GOOD + CLUSTER).cluster
    assert plain is not None
    assert plain.secret() is None


def test_a_secret_that_is_gone_or_short_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short").write_text("fifteen bytes..")
    monkeypatch.setenv("CLUSTER_SHORT", "")
    assert "CLUSTER_NO_SUCH" not in os.environ
    for line, expected in (
        ('secret_file = "none"', "none; allowed: a file that the node can read"),
        ('secret_env = "CLUSTER_NO_SUCH"', "CLUSTER_NO_SUCH; allowed: a variable that is set"),
        ('secret_file = "short"', "short, which holds 15 bytes; allowed: a secret of 16 to 4096"),
        ('secret_env = "CLUSTER_SHORT"', "CLUSTER_SHORT, which holds 0 bytes; allowed: a secret of 16"),
    ):
        (problem,) = load_problems(write(tmp_path, f"{GOOD}{CLUSTER}{line}"))
        assert problem.startswith(f"[cluster] {line.split()[0]} is ")
        assert expected in problem


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert load_problems(tmp_path / "none.toml") == ["the file can't be read: No such file or directory"]
    assert "Is a directory" in load_problems(tmp_path)[0]
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'x = "\xff"')
    assert "is not UTF-8" in load_problems(latin)[0]
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * 1_100_000)
    assert "larger than 1048576 bytes" in load_problems(large)[0]


FIELDS = [(name, field) for name, kind in SECTIONS.items() for field in msgspec.structs.fields(kind)]


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=[f"{section}.{field.name}" for section, field in FIELDS])
def test_every_field_has_a_trade_off_and_a_default_within_its_bounds(section: str, field: Any) -> None:
    info = msgspec.inspect.type_info(field.type)
    assert isinstance(info, msgspec.inspect.Metadata)
    description = (info.extra_json_schema or {})["description"]
    assert description.endswith(".")
    assert f"| `[{section}] {field.name}` |" in config_reference()
    if not field.required and field.default is not msgspec.NODEFAULT and not isinstance(field.default, str):
        msgspec.convert(field.default, field.type, strict=True)


def test_the_defaults_of_the_file_and_of_the_structs_are_the_same() -> None:
    config = parse(GOOD)
    for name, kind in SECTIONS.items():
        if name not in ("events", "node", "tenants", *OPTIONAL_SECTIONS):
            assert getattr(config, name) == kind()
    assert config.cluster is None
    cluster = parse(GOOD + CLUSTER).cluster
    assert cluster == ClusterSection(
        listen="127.0.0.1:7100", peers={"n1": "127.0.0.1:7100", "n2": "127.0.0.1:7200"}, peer_listen="127.0.0.1:7101"
    )


def test_the_reference_is_a_table_of_four_columns() -> None:
    lines = config_reference().splitlines()
    assert len(lines) == len(FIELDS) + 3
    assert {line.replace(r"\|", "").count("|") for line in lines} == {5}


def test_the_readme_holds_the_reference() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    assert text.split(REFERENCE_MARKER)[1].strip() == config_reference().strip()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.datetimes() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
keys = st.sampled_from([field.name for _, field in FIELDS]) | st.text(alphabet=string.printable, max_size=6)
documents = st.dictionaries(
    st.sampled_from([*SECTIONS, "profile"]) | st.text(max_size=5),
    st.dictionaries(keys, values, max_size=6) | values,
    max_size=5,
)


@given(documents)
def test_no_document_breaks_the_check(document: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tomllib, "loads", lambda text: document)
        config = parsed("")
    if isinstance(config, Config):
        assert all(isinstance(getattr(config, name), Section) for name in SECTIONS if name not in OPTIONAL_SECTIONS)
    else:
        assert config
        assert all(line.isprintable() for line in config)


def parsed(text: str) -> Config | tuple[str, ...]:
    try:
        return parse(text)
    except ConfigError as error:
        return error.problems
