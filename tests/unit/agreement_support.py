"""A cluster of registries: the catalog is the real reducer, the nodes are real registries with directories made up."""

from __future__ import annotations

from node.cluster_models import agreed_models
from node.kernel.types import AgreedModels, AgreedVersion, EventSchema, ModelName, ModelVersion
from replication import catalog as catalogs
from replication.catalog import Catalog
from replication.commands import (
    Command,
    ForgetVersion,
    HoldBlob,
    JoinNode,
    PutFeatures,
    PutTenant,
    PutVersion,
    QuarantineVersion,
    RetireVersion,
)
from replication.rollout import rollout
from tenants import registry
from tenants.agreement import TrialReport, encode_report
from tenants.manifest import Manifest, TenantCaps, TenantSettings, parse_manifest, parse_tenant
from tenants.registry import (
    Action,
    Agreed,
    FeaturesSeen,
    GoLive,
    NotPublished,
    PairGone,
    PairSeen,
    Published,
    Retire,
    Shared,
    Snapshot,
    TenantSeen,
    TrialPassed,
    WriteStatus,
    publications,
    status,
)
from tenants.registry_file import decode, encode
from tenants.transitions import apply

SCHEMA = EventSchema(("transaction", "search"), {"amount": "number", "shop": "text"})
NARROW = EventSchema(("transaction",), {"amount": "number"})
REPORT = TrialReport(300e-6, 1e-6, 1000, "LogisticRegression", ("no", "yes"), ("a note",))
BID, FRAUD = ModelName("ads", "bid"), ModelName("grocery", "fraud")
NODES = ("one", "two", "three")
Pair = tuple[bytes, int]


def manifest(*features: str) -> bytes:
    lines = "\n".join(f'f{index} = "{feature}"' for index, feature in enumerate(features or ("event.amount",)))
    return f'on = ["transaction"]\n[features]\n{lines}\n'.encode()


def blob(number: int) -> str:
    return f"{number:064x}"


def parsed(name: ModelName, text: bytes) -> Manifest:
    return parse_manifest("m.toml", name.tenant, name.model, text, SCHEMA)


def version_of(name: ModelName, pair: Pair) -> str:
    return parsed(name, pair[0]).version(blob(pair[1])).version


def agreed_version(name: ModelName, pair: Pair, state: str = "live", here: bool = True) -> AgreedVersion:
    text, number = pair
    report = encode_report(REPORT)
    return AgreedVersion(name, version_of(name, pair), blob(number), text.decode(), report, state, here)  # type: ignore[arg-type]


class Cluster:
    """The catalog, and what a leader and a publisher do with it."""

    def __init__(self) -> None:
        self.catalog = Catalog()
        for name in NODES:
            address = f"{name}:1"
            self.propose(JoinNode(revision=self.revision, name=name, raft_address=address, http_address=address))

    @property
    def revision(self) -> int:
        return self.catalog.revision

    def propose(self, command: Command) -> str:
        problem = catalogs.problem(self.catalog, command)
        self.catalog = catalogs.apply(self.catalog, command)
        return problem

    def publish(self, publication: registry.Publication) -> str:
        match publication:
            case registry.PutTenant(tenant, text):
                return self.propose(PutTenant(revision=self.revision, name=tenant, settings=text))
            case registry.PutFeatures(tenant, text):
                return self.propose(PutFeatures(revision=self.revision, tenant=tenant, text=text))
            case registry.PutVersion(name, version, digest, text, report, stages):
                return self.propose(
                    PutVersion(
                        revision=self.revision, tenant=name.tenant, model=name.model, version=version, blob=digest,
                        manifest=text, report=encode_report(report), stages=stages,
                    )
                )  # fmt: skip
            case registry.Withdraw(name, _):
                return self.withdraw(name)
            case registry.Quarantine(name, version, reason):
                fallback = self.catalog.models[str(name)].fallback
                return self.propose(
                    QuarantineVersion(
                        revision=self.revision, tenant=name.tenant, model=name.model, version=version, reason=reason,
                        fall_back_to="" if fallback is None else fallback.version,
                    )
                )  # fmt: skip

    def withdraw(self, name: ModelName) -> str:
        known = self.catalog.models.get(str(name))
        versions = known.versions.values() if known is not None else ()
        for version in sorted(versions, key=lambda one: one.state != "passed"):
            tenant, model, key = name.tenant, name.model, version.version
            problem = self.propose(RetireVersion(revision=self.revision, tenant=tenant, model=model, version=key))
            problem = problem or self.propose(
                ForgetVersion(revision=self.revision, tenant=tenant, model=model, version=key)
            )
            if problem:
                return problem
        return ""

    def roll_out(self) -> None:
        for digest, held in self.catalog.holders.items():
            for node in NODES:
                if node not in held:
                    self.propose(HoldBlob(revision=self.revision, node=node, incarnation=1, blob=digest, held=True))
        while commands := rollout(self.catalog, NODES):
            for command in commands:
                assert self.propose(command) == ""

    def told(self, node: str) -> AgreedModels:
        return agreed_models(self.catalog, node)


class Node:
    """One node's registry with its directory, and a checker of what the pool is told."""

    def __init__(self, name: str, cluster: Cluster) -> None:
        self.name, self.cluster = name, cluster
        self.directory: dict[ModelName, Pair] = {}
        self.tenant_files: dict[str, str] = {}
        self.feature_files: dict[str, str] = {}
        self.snapshot = Snapshot(shared=Shared())
        self.pool: dict[ModelName, str] = {}
        self.tenants: dict[str, TenantSettings] = {}
        self.told = -1
        self.time_ms = 0
        self.hear()

    def __call__(self, event: registry.Event) -> tuple[Action, ...]:
        before = self.snapshot
        self.snapshot, actions = apply(before, event, SCHEMA)
        assert (self.snapshot is before) == (self.snapshot.number == before.number)
        for action in actions:
            match action:
                case GoLive(version, _):
                    self.pool[version.name] = version.version
                case Retire(version) if self.pool.get(version.name) == version.version:
                    del self.pool[version.name]
                case registry.ConfigureTenant(configured):
                    self.tenants[configured.tenant] = configured
                case WriteStatus(name) if name in self.snapshot.models:
                    assert status(self.snapshot, name)["state"]
                case _:
                    pass
        assert {version.name: version.version for version, _ in self.snapshot.live} == self.pool
        assert self.snapshot.tenants == self.tenants
        assert all("problems" in status(self.snapshot, name) for name in self.snapshot.models)
        return actions

    def hear(self) -> None:
        told = self.cluster.told(self.name)
        configured = {
            tenant: parse_tenant("t", tenant, text.encode(), TenantCaps()) for tenant, text in told.tenants.items()
        }
        self(Agreed(told, configured, self.time_ms))
        self.told = told.revision

    def look(self, at_start: bool = False) -> None:
        """What the watcher does: every pair that changed, then what is gone."""
        self.time_ms += 1
        if not self.directory and not self.tenant_files:
            return  # an empty directory says nothing
        for tenant in sorted({name.tenant for name in self.directory} | self.tenant_files.keys()):
            text = self.tenant_files.get(tenant, "")
            self(TenantSeen(parse_tenant("t", tenant, text.encode(), TenantCaps()), text, at_start))
        assert self.snapshot.shared is not None
        for tenant in sorted(self.feature_files.keys() | self.snapshot.shared.taken_features.keys()):
            self(FeaturesSeen(tenant, self.feature_files.get(tenant, ""), at_start))
        for name, (text_, number) in sorted(self.directory.items()):
            self(PairSeen(name, text_, blob(number), self.time_ms, at_start))
        assert self.snapshot.shared is not None
        for name in sorted(self.snapshot.watched - self.directory.keys() - self.snapshot.shared.gone):
            self(PairGone(name))

    def try_all(self) -> None:
        for name, entry in sorted(self.snapshot.models.items()):
            if entry.newest is not None and entry.newest.state == "candidate":
                self(TrialPassed(name, entry.newest.version, REPORT, self.time_ms))

    def publish(self) -> None:
        for publication in publications(self.snapshot):
            if publication in publications(self.snapshot):
                problem = self.cluster.publish(publication)
                self.hear()
                self(NotPublished(publication, problem) if problem else Published(publication))

    def restart(self, disk_lost: bool = False) -> None:
        kept = encode(self.snapshot)
        self.snapshot = Snapshot(shared=Shared())
        if not disk_lost:
            self.snapshot, problems = decode(kept, SCHEMA, in_cluster=True)
            assert problems == ()
        self.pool, self.tenants = {}, {}
        self.hear()
        self.look(at_start=True)

    def state(self, name: ModelName) -> object:
        return status(self.snapshot, name)["state"]


def settle(cluster: Cluster, nodes: list[Node]) -> None:
    """Until nobody has anything to say; it must come to that."""
    for _ in range(12):
        before = cluster.revision
        for node in nodes:
            node.look()
            node.try_all()
            node.publish()
        cluster.roll_out()
        for node in nodes:
            node.hear()
        if cluster.revision == before and not any(publications(node.snapshot) for node in nodes):
            return
    raise AssertionError("the nodes never stop to change what was agreed")


def started() -> tuple[Cluster, list[Node]]:
    cluster = Cluster()
    return cluster, [Node(name, cluster) for name in NODES]


def plan_of(node: Node) -> list[tuple[ModelVersion, bytes]]:
    return [(version, manifest_.text) for version, manifest_ in node.snapshot.live]
