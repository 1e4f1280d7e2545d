"""What the config file may say: one frozen struct a table, each field with its bounds, default and trade-off.

No field holds a secret: passwords are named by file or environment variable and read when used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta

from node.kernel import limits
from node.kernel.errors import ConfigError

if TYPE_CHECKING:
    from ssl import SSLContext

    from node.kernel.types import EventSchema

Name: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")]
Topic: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,249}\Z")]
TopicTemplate: TypeAlias = Annotated[str, Meta(pattern=r"^(\{application\})?[A-Za-z0-9._-]{1,249}\Z")]
HostPort: TypeAlias = Annotated[str, Meta(pattern=r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}\Z")]
ClusterAddress: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,120}:[0-9]{1,5}\Z")]
ClusterAddressOrNone: TypeAlias = Annotated[str, Meta(pattern=r"^([A-Za-z0-9._-]{1,120}:[0-9]{1,5})?\Z")]
StoreUrl: TypeAlias = Annotated[str, Meta(pattern=r"^([a-z][a-z0-9+.-]{0,31}://[^\x00-\x20\x7f]{1,1024})?\Z")]
Rack: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,100}\Z")]
Identifier: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}\Z")]
JsonPath: TypeAlias = Annotated[str, Meta(pattern=r"^[^.]+(\.[^.]+){0,15}\Z", max_length=512)]
FilePath: TypeAlias = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]{1,4096}\Z")]
Text: TypeAlias = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]{0,1024}\Z")]
DottedName: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z_][\w.]*\.[A-Za-z_]\w*\Z")]
EventTypeText: TypeAlias = Annotated[str, Meta(min_length=1, max_length=limits.EVENT_TYPE_BYTES_MAX)]
SandboxLayer: TypeAlias = Literal["cgroup", "resource_limits", "own_user", "no_new_privileges", "landlock", "seccomp"]

PATTERN_WORDS = {
    get_args(alias)[1].pattern: words
    for alias, words in (
        (Name, "letters, digits, '.', '_' and '-', at most 100"),
        (Topic, "a Kafka topic name (letters, digits, '.', '_' and '-', at most 249)"),
        (TopicTemplate, "a Kafka topic name, which may begin with {application}"),
        (HostPort, 'host:port, such as "127.0.0.1:9092"'),
        (ClusterAddress, 'host:port, the host a name or an IPv4 address, such as "10.0.0.1:7100"'),
        (ClusterAddressOrNone, 'host:port, the host a name or an IPv4 address, such as "10.0.0.1:7100", or ""'),
        (StoreUrl, 'a URL such as "s3://bucket/prefix" or "file:///folder", or ""'),
        (Rack, "letters, digits, '.', '_' and '-', at most 100, or \"\""),
        (Identifier, "a name of letters, digits and '_' that does not begin with a digit"),
        (JsonPath, 'a path of keys joined by dots, such as "basket.amount"'),
        (FilePath, "a path of 1 to 4096 characters"),
        (Text, "a text of at most 1024 characters, none of them control characters"),
        (DottedName, 'a dotted name, such as "package.module.Name"'),
    )
}
"""What a text that must match a pattern may be, in words for the operator."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file."""


class NodeSection(Section, frozen=True):
    name: Annotated[Name, Meta(description="Names this node in logs, dead letters and `status`.")] = "headrace"
    data_dir: Annotated[
        FilePath,
        Meta(
            description="Holds the RocksDB of each partition; a fast local disk pays. Losing it loses no customer's "
            "state, only the time to rebuild it from the changelog. A relative path starts at the config file's folder."
        ),
    ] = "data"
    log_format: Annotated[
        Literal["json", "console"], Meta(description="`json` for machines: one object a line; `console` for eyes.")
    ] = "json"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="`debug` says something each cycle and costs throughput."),
    ] = "info"


class KafkaSection(Section, frozen=True):
    bootstrap: Annotated[
        tuple[HostPort, ...],
        Meta(min_length=1, max_length=64, description="Brokers asked first; two or more survive the loss of one."),
    ] = ("127.0.0.1:9092",)
    topics: Annotated[
        tuple[Topic, ...],
        Meta(
            min_length=1,
            max_length=64,
            description="Source topics. They must be partitioned alike by customer: partition N of all of them is one "
            "unit of work and state. The list may change in any way: one that is left out for a while goes on where it "
            "was left, and triggers that wait keep their topic's name.",
        ),
    ] = ("events",)
    application: Annotated[
        Name,
        Meta(
            description="Prefix of transactional ids and topics, and the consumer group's name. Another application "
            "on the same cluster needs another one; a new one starts with empty state."
        ),
    ] = "headrace"
    inferences_topic: Annotated[TopicTemplate, Meta(description="Where inferences go, keyed by customer.")] = (
        "{application}.inferences"
    )
    changelog_topic: Annotated[
        TopicTemplate,
        Meta(
            description="The log that state is rebuilt from: with a retention or compaction of its own it is refused."
        ),
    ] = "{application}.changelog"
    dead_letters_topic: Annotated[
        TopicTemplate, Meta(description="Records that could not be used, whole, with the reason in the headers.")
    ] = "{application}.dead-letters"
    rows_topic: Annotated[
        TopicTemplate,
        Meta(
            description="Training data: the rows that models with `log_rows` were fed, with their outputs, until the "
            "topic's retention deletes them."
        ),
    ] = "{application}.rows"
    rows_retention_h: Annotated[
        int,
        Meta(
            ge=1,
            le=87_600,
            description="How long the rows topic that the node creates keeps rows; of one that is there, the broker's "
            "setting holds.",
        ),
    ] = 168
    rows_retention_mb: Annotated[
        int,
        Meta(
            ge=64,
            le=16_777_216,
            description="The most that each partition of the rows topic that the node creates takes on disk: the "
            "oldest rows go first.",
        ),
    ] = 4096
    transactions: Annotated[
        Literal["auto", "required", "off"],
        Meta(
            description="`required` refuses brokers without transactions; `auto` takes at-least-once from them and "
            "says so; `off` saves some milliseconds a commit and may repeat inferences after a crash."
        ),
    ] = "auto"
    compression: Annotated[
        Literal["lz4", "zstd", "snappy", "gzip", "none"],
        Meta(description="Of what the node writes: `lz4` is cheapest in CPU, `zstd` in disk and network."),
    ] = "lz4"
    create_topics: Annotated[
        bool, Meta(description="Create the node's own topics if missing; false where topics are made by somebody else.")
    ] = True
    replication_factor: Annotated[
        int,
        Meta(ge=1, le=32, description="Of topics the node creates. 1 loses state with the broker's disk; 3 is usual."),
    ] = 1
    partitions: Annotated[
        Literal["all"] | tuple[Annotated[int, Meta(ge=0, le=999_999)], ...],
        Meta(description="Partitions this node owns; a list splits them by hand among nodes, never twice the same."),
    ] = "all"
    on_source_reset: Annotated[
        Literal["wait", "earliest", "latest"],
        Meta(
            description="When the next offset is gone (retention, or the topic made again): `wait` for the operator, "
            "or go on from the earliest or latest event there is."
        ),
    ] = "wait"
    security_protocol: Annotated[
        Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"],
        Meta(description="PLAINTEXT and SASL_PLAINTEXT show all traffic to the network."),
    ] = "PLAINTEXT"
    ssl_ca_file: Annotated[
        Text, Meta(description="PEM file of the authorities that sign the brokers; '' takes the system's.")
    ] = ""
    sasl_mechanism: Annotated[
        Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"],
        Meta(description="Needed with SASL_*. PLAIN sends the password itself: only inside SSL."),
    ] = ""
    sasl_username: Annotated[Text, Meta(description="Needed with SASL_*.")] = ""
    sasl_password_file: Annotated[
        Text,
        Meta(
            description="File that holds the password, readable by the node's user; a systemd credential is gone while "
            "the unit is stopped."
        ),
    ] = ""
    sasl_password_env: Annotated[
        Text, Meta(description="Environment variable that holds the password; visible to root in /proc.")
    ] = ""

    def __post_init__(self) -> None:
        for name in ("inferences_topic", "changelog_topic", "dead_letters_topic", "rows_topic"):
            topic = getattr(self, name).replace("{application}", self.application)
            msgspec.structs.force_setattr(self, name, topic)

    def ssl_context(self) -> SSLContext:
        """What brokers' certificates are checked by. Raises ConfigError when ssl_ca_file is gone or holds none."""
        import ssl  # takes a while, and few configs need it

        try:
            return ssl.create_default_context(cafile=self.ssl_ca_file or None)
        except OSError as error:
            where = f"[kafka] ssl_ca_file is {self.ssl_ca_file}: {error.strerror}"
            raise ConfigError([f"{where}; allowed: a file of PEM certificates that the node can read"]) from error

    def sasl_password(self) -> str | None:
        """The password, read now; None without SASL. Raises ConfigError when its file or variable is gone."""
        if not self.security_protocol.startswith("SASL"):
            return None
        if self.sasl_password_env:
            password = os.environ.get(self.sasl_password_env)
            if password is None:
                raise ConfigError(
                    [f"[kafka] sasl_password_env is {self.sasl_password_env}; allowed: a variable that is set"]
                )
            return password
        try:
            return Path(self.sasl_password_file).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            where = f"[kafka] sasl_password_file is {self.sasl_password_file}"
            raise ConfigError([f"{where}; allowed: a UTF-8 file that the node can read"]) from error


class CycleSection(Section, frozen=True):
    events_max: Annotated[
        int,
        Meta(
            ge=1,
            le=limits.POLL_EVENTS_MAX,
            description="Events of one micro-batch, fewer where customers' rows are wide: at most 4 million slots of "
            "them. More is cheaper an event and slower for each.",
        ),
    ] = 4096
    bytes_max: Annotated[
        int,
        Meta(
            ge=limits.EVENT_BYTES_MAX, le=limits.POLL_BYTES_MAX, description="Bytes of one micro-batch: bounds memory."
        ),
    ] = 8 * limits.MIB
    wait_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=limits.CYCLE_WAIT_MS_MAX,
            description="How long a poll waits for the first event: longer is less idle CPU, slower to notice a stop.",
        ),
    ] = 20
    commit_interval_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=limits.CYCLE_WAIT_MS_MAX,
            description="Time between commits: an inference is readable only after one, and each costs a transaction.",
        ),
    ] = 100
    inference_deadline_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=limits.CYCLE_WAIT_MS_MAX,
            description="How long a commit waits for models. A later result goes through the sequence log: longer "
            "saves that writing, shorter keeps slow models from delaying quick ones.",
        ),
    ] = 50
    start_from: Annotated[
        Literal["earliest", "latest"],
        Meta(description="Where a partition without progress starts: all that is retained, or only what comes."),
    ] = "earliest"


class FieldSection(Section, frozen=True):
    path: Annotated[JsonPath, Meta(description="Keys joined by dots.")]
    type: Literal["number", "text", "boolean"]


class EventsSection(Section, frozen=True):
    types: Annotated[
        tuple[Identifier, ...],
        Meta(
            min_length=1,
            max_length=limits.EVENT_TYPES_MAX,
            description="Event types that manifests may name. The list may change in any way: models that name one "
            "that is gone are refused, but triggers that wait are still answered and keep its name.",
        ),
    ]
    type_texts: Annotated[
        dict[Identifier, EventTypeText],
        Meta(
            max_length=limits.EVENT_TYPES_MAX,
            description="What events hold for a type where that is not its name: "
            '`type_texts = { order_placed = "order.placed" }`.',
        ),
    ] = {}
    type: Annotated[JsonPath, Meta(description="Path of the event's type, a text.")] = "type"
    time: Annotated[
        JsonPath, Meta(description="Path of the event's time; the Kafka timestamp where an event has none.")
    ] = "time"
    time_unit: Annotated[
        Literal["ms", "s", "iso8601"],
        Meta(description="Numbers since 1970, or texts such as 2026-01-31T12:00:00Z (costs a little more)."),
    ] = "ms"
    customer: Annotated[JsonPath, Meta(description="Path of the customer's id, a text or an integer.")] = "customer"
    unknown_types: Annotated[
        Literal["ignore", "dead_letter"],
        Meta(description="`ignore` counts events of other types; `dead_letter` keeps each, for topics that are ours."),
    ] = "ignore"
    fields: Annotated[
        dict[str, FieldSection],
        Meta(
            max_length=limits.EVENT_FIELDS_MAX,
            description='Fields that manifests may name: `amount = "number"`, or with another path '
            '`amount = { path = "basket.amount", type = "number" }`. What is not here is skipped unread: no window or '
            "filter that uses it takes in an event.",
        ),
    ] = {}


class StateSection(Section, frozen=True):
    row_cache_mb: Annotated[
        int,
        Meta(
            ge=0,
            le=limits.ROW_CACHE_BYTES_MAX // limits.MIB,
            description="Rows each partition keeps decoded; saves the RocksDB read of a customer seen again.",
        ),
    ] = 64
    block_cache_mb: Annotated[
        int, Meta(ge=1, le=1_048_576, description="RocksDB's read cache, shared by all partitions.")
    ] = 256
    write_buffer_mb: Annotated[
        int, Meta(ge=1, le=65_536, description="RocksDB's memtables, all partitions together: more is fewer flushes.")
    ] = 128
    flush_interval_s: Annotated[
        int,
        Meta(
            ge=1,
            le=86_400,
            description="Time between flushes to disk: a restart folds the changelog since the last one again.",
        ),
    ] = 60


class TenantsSection(Section, frozen=True):
    directory: Annotated[
        FilePath,
        Meta(
            description="Watched for tenants' models; needs to be writable for status files. It is never made: while "
            "it is missing, which may be a mount, no model is taken. A relative path starts at the config file's "
            "folder."
        ),
    ] = "tenants"
    settle_ms: Annotated[
        int, Meta(ge=0, le=60_000, description="A pair not renamed in counts as whole when unchanged for this long.")
    ] = 500
    rescan_s: Annotated[
        int, Meta(ge=1, le=3600, description="Full rescan: finds what file-system notifications missed.")
    ] = 10
    workers_parallel: Annotated[
        int,
        Meta(
            ge=0, le=1024, description="Batches that compute at once, a short one besides; 0: one less than the cores."
        ),
    ] = 0
    quantum_ms: Annotated[
        int, Meta(ge=1, le=1000, description="Model CPU time a turn: shorter is fairer, longer makes larger batches.")
    ] = limits.QUANTUM_MS
    memory_mb_max: Annotated[
        int, Meta(ge=128, le=1_048_576, description="Address space of one tenant's worker; caps their own setting.")
    ] = 2048
    weight_max: Annotated[float, Meta(gt=0, le=1000, description="Largest share weight a tenant may give itself.")] = (
        10.0
    )
    rows_queued_max: Annotated[
        int,
        Meta(
            ge=1,
            le=limits.ROWS_QUEUED_PER_MODEL_MAX,
            description="Rows waiting for one model in memory; the rest waits in its sequence log on disk.",
        ),
    ] = 16_384
    rows_waiting_max: Annotated[
        int,
        Meta(
            ge=1,
            le=limits.WAITING_ROWS_MAX,
            description="Triggers that one tenant may have waiting in the sequence log of each partition; caps their "
            "own setting. More rides out a longer outage of a model, and takes longer to catch up.",
        ),
    ] = 262_144
    mb_waiting_max: Annotated[
        int,
        Meta(
            ge=1,
            le=limits.WAITING_MB_MAX,
            description="MB they may take in each partition, uncompressed: on disk up to twice that.",
        ),
    ] = 256
    age_waiting_s_max: Annotated[
        int,
        Meta(
            ge=0,
            le=limits.WAITING_AGE_MS_MAX // 1000,
            description="A trigger that has waited for longer is shed; 0: however long.",
        ),
    ] = 0
    rows_s_max: Annotated[
        float,
        Meta(
            ge=0,
            le=limits.ROWS_PER_SECOND_MAX,
            description="Rows a second that one tenant's models get on a node; more wait in its sequence log. 0: as "
            "many as its share of CPU time gives. `headrace quota` sets this and others for one tenant.",
        ),
    ] = 0.0
    models_max: Annotated[
        int, Meta(ge=0, le=limits.MODELS_PER_TENANT_MAX, description="Models that one tenant may have.")
    ] = limits.MODELS_PER_TENANT_MAX
    stored_bytes_max: Annotated[
        int,
        Meta(
            ge=0,
            le=limits.STORED_BYTES_MAX,
            description="Of each customer's row, for the outputs of one tenant's models: 16 a model and 8 an output. "
            "Times the customers, that is what they take on disk and in every standby.",
        ),
    ] = 4096
    window_bytes_max: Annotated[
        int,
        Meta(
            ge=0,
            le=limits.WINDOW_BYTES_MAX,
            description="Of each customer's row, for the windows that one tenant's models and shared features ask for: "
            "a count over 30 days takes 128. A row has room for 32768, and keeps up to as much again for what live "
            "versions would fall back to. Windows take memory, disk and CPU time for each customer.",
        ),
    ] = 4096
    allow: Annotated[
        tuple[Literal["xgboost", "lightgbm"], ...],
        Meta(description="Further libraries whose models may load: each widens what a model file can reach."),
    ] = ()
    allow_globals: Annotated[
        tuple[DottedName, ...],
        Meta(
            max_length=1000,
            description="Single classes and functions a model file may name beside the built-in list, written "
            "`package.module.Name`: each is code a tenant can call.",
        ),
    ] = ()
    sandbox_required: Annotated[
        tuple[SandboxLayer, ...],
        Meta(
            description="Start only if these layers work here; otherwise a missing one is a warning. "
            "`headrace sandbox-report` says which do."
        ),
    ] = ()


class HttpSection(Section, frozen=True):
    host: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=255,
            description="Address to listen on. There is no login: beyond loopback, put a proxy in front.",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535, description="0 takes a free one, said in the log.")] = 8080


class TablesSection(Section, frozen=True):
    upload_mb_max: Annotated[
        int, Meta(ge=1, le=65_536, description="Of one table's file that is uploaded; it is on disk twice meanwhile.")
    ] = 4096
    build_memory_mb: Annotated[
        int,
        Meta(
            ge=128,
            le=1_048_576,
            description="Memory of the process that checks and builds an uploaded file: a few times the file's "
            "largest column. A version in use takes none but the page cache.",
        ),
    ] = 4096


class ClusterSection(Section, frozen=True):
    """How this node and others are one cluster. `headrace check` says what the fields must be together."""

    listen: Annotated[
        ClusterAddress,
        Meta(
            description="Where this node listens for Raft. Whoever has the secret and reaches it can run code here: "
            "keep it on a private link."
        ),
    ]
    peers: Annotated[
        dict[Name, ClusterAddress],
        Meta(
            min_length=1,
            max_length=limits.CLUSTER_NODES_MAX,
            description="Name and Raft address of every founding member, this node included; a node that joins later "
            "lists the members there are and itself. Read once, by an empty `data_dir`: then `join` and `leave` say.",
        ),
    ]
    peer_listen: Annotated[
        ClusterAddress,
        Meta(description="Where this node listens for other nodes' requests, signed with the secret, not encrypted."),
    ]
    peer_address: Annotated[
        ClusterAddressOrNone,
        Meta(description="What other nodes reach `peer_listen` by; '' where that is the same, so not with 0.0.0.0."),
    ] = ""
    secret_file: Annotated[
        Text,
        Meta(
            description="File that holds the secret all nodes share, 16 bytes or more, readable only by the node. "
            "Needed unless all addresses are loopback ones."
        ),
    ] = ""
    secret_env: Annotated[
        Text, Meta(description="Environment variable that holds the secret; visible to root in /proc.")
    ] = ""
    rack: Annotated[
        Rack, Meta(description="What fails together has one name: owner and standby are kept in different racks.")
    ] = ""
    weight: Annotated[
        float,
        Meta(
            ge=limits.WEIGHT_MIN,
            le=limits.WEIGHT_MAX,
            description="Share of partitions beside the other nodes': 2 takes twice as many as 1.",
        ),
    ] = 1.0
    standbys: Annotated[
        int,
        Meta(
            ge=0,
            le=limits.STANDBY_COUNT_MAX,
            description="Copies of a partition beside its owner's: each costs a fold of every frame, and saves the "
            "restore when that many nodes are gone. The first node's value holds for the cluster.",
        ),
    ] = 1
    lease_ms: Annotated[
        int,
        Meta(
            ge=limits.LEASE_MS_MIN,
            le=limits.LEASE_MS_MAX,
            description="An owner that has not heard from a quorum for so long stops; others take over a little "
            "later, or at once when its process is seen to have ended. Shorter fails over sooner, and also when a "
            "machine only stalls. The first node's value holds.",
        ),
    ] = 1000
    snapshot_holders_min: Annotated[
        int,
        Meta(
            ge=1,
            le=limits.NODES_MAX,
            description="The changelog is cut only behind a snapshot that so many nodes have verified: more keeps more "
            "of it, and over the number of nodes keeps all of it. The first node's value holds.",
        ),
    ] = 2
    snapshot_url: Annotated[
        StoreUrl,
        Meta(
            description="Store that snapshots are also kept in, any that fsspec knows: outlives all disks, costs the "
            "upload of each changed file. Its credentials come from the environment, not from here."
        ),
    ] = ""
    snapshot_interval_s: Annotated[
        int,
        Meta(
            ge=1,
            le=86_400,
            description="Time between snapshots of a partition: shorter keeps less changelog and restores sooner, "
            "and copies more.",
        ),
    ] = 300

    def secret(self) -> bytes | None:
        """The secret, read now; None without one. Raises ConfigError when its file or variable is gone or short."""
        if self.secret_env:
            text = os.environ.get(self.secret_env)
            if text is None:
                raise ConfigError([f"[cluster] secret_env is {self.secret_env}; allowed: a variable that is set"])
            return _long_enough("secret_env", self.secret_env, os.fsencode(text))
        if not self.secret_file:
            return None
        try:
            content = Path(self.secret_file).read_bytes().rstrip(b"\r\n")
        except OSError as error:
            where = f"[cluster] secret_file is {self.secret_file}"
            raise ConfigError([f"{where}; allowed: a file that the node can read"]) from error
        return _long_enough("secret_file", self.secret_file, content)


def _long_enough(field: str, value: str, secret: bytes) -> bytes:
    if limits.CLUSTER_SECRET_BYTES_MIN <= len(secret) <= limits.CLUSTER_SECRET_BYTES_MAX:
        return secret
    size = f"{limits.CLUSTER_SECRET_BYTES_MIN} to {limits.CLUSTER_SECRET_BYTES_MAX}"
    raise ConfigError([f"[cluster] {field} is {value}, which holds {len(secret)} bytes; allowed: a secret of {size}"])


Expression: TypeAlias = Annotated[str, Meta(min_length=1, max_length=limits.EXPRESSION_BYTES_MAX)]


class Config(Section, frozen=True):
    """The whole file. `load_config` checks it; build one by hand only in tests."""

    events: EventsSection
    node: NodeSection = NodeSection()
    kafka: KafkaSection = KafkaSection()
    cycle: CycleSection = CycleSection()
    profile: dict[str, Expression] = {}
    state: StateSection = StateSection()
    tenants: TenantsSection = TenantsSection()
    tables: TablesSection = TablesSection()
    http: HttpSection = HttpSection()
    cluster: ClusterSection | None = None
    """None: a node on its own."""

    @property
    def transactions(self) -> Literal["auto", "required", "off"]:
        """As configured, but `required` in a cluster: without them nothing fences an owner that was replaced."""
        return self.kafka.transactions if self.cluster is None else "required"

    def schema(self) -> EventSchema:
        """What manifests may name of the events."""
        from node.kernel.types import EventSchema  # here, because it brings numpy: `headrace check` starts without

        fields = {name: field.type for name, field in self.events.fields.items()}
        return EventSchema(self.events.types, fields, self.profile)


SECTIONS: dict[str, type[Section]] = {
    "node": NodeSection,
    "kafka": KafkaSection,
    "cycle": CycleSection,
    "events": EventsSection,
    "state": StateSection,
    "tenants": TenantsSection,
    "tables": TablesSection,
    "http": HttpSection,
    "cluster": ClusterSection,
}
OPTIONAL_SECTIONS = ("cluster",)
"""Tables whose absence means something, so that their needed fields are needed only in them."""
