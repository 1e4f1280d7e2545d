"""(P) The features that tenants share: `<tenant>/features.toml`, parsed, joined and checked together.

    [features.spend_30d]
    version     = 2
    expression  = "sum(transaction.amount, '30d')"
    description = "Spent within thirty days, in EUR"
    shared_with = ["ads"]                               # beside its owner; without it: all tenants
    earlier     = { 1 = "sum(transaction.amount, '28d')" }

What a version means never changes; a model that names no version uses the newest. Shared features may use each other,
also over tenants: each is parsed after those it uses, so cycles show as a feature that is asked for while it is being
parsed. What is in force is the same for equal texts, in whatever order they came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from node.kernel.errors import ManifestError, NotFound
from node.kernel.limits import (
    EXPRESSION_BYTES_MAX,
    SHARED_FEATURE_CHAIN_MAX,
    SHARED_FEATURE_VERSIONS_MAX,
    SHARED_FEATURES_PER_TENANT_MAX,
)
from node.kernel.types import Aggregate, EventSchema, StoredOutput
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
from tenants.manifest import MORE_PROBLEMS, PROBLEMS_MAX, Manifest, Reader, is_output
from tenants.shared_names import FEATURES_FILE, Resolver, SharedName, SharedValue
from tenants.wording import shown, suggestion


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=1, le=999_999_999)]
    expression: Annotated[str, Meta(max_length=EXPRESSION_BYTES_MAX)]
    description: Annotated[str, Meta(min_length=1, max_length=500)]
    shared_with: list[str] | None = None
    earlier: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Offer:
    """One entry of a features.toml: a feature with all its versions. `shared_with` None: with all tenants."""

    owner: str
    newest: SharedName
    texts: Mapping[int, str]
    description: str
    shared_with: tuple[str, ...] | None

    def is_for(self, tenant: str) -> bool:
        return self.shared_with is None or tenant == self.owner or tenant in self.shared_with


@dataclass(frozen=True, slots=True)
class SharedFeature:
    """One version of a shared feature."""

    name: SharedName
    offer: Offer
    expression: Node
    place: int
    """In the order in which all features can be computed."""

    @property
    def is_newest(self) -> bool:
        return self.name == self.offer.newest

    @property
    def uses(self) -> tuple[SharedValue, ...]:
        return tuple(node for node in walk(self.expression) if isinstance(node, SharedValue))


@dataclass(frozen=True, slots=True)
class Use:
    """That a model or a shared feature (`by`, `in_file`: it is one) of a tenant names a shared feature."""

    by: str
    tenant: str
    value: SharedValue
    in_file: bool = False


@dataclass(frozen=True, slots=True)
class Definitions:
    """All that is shared. `files` are the texts by tenant; `features` has each after those it uses.

    `problems` has the lines for each tenant with features that are left out.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    offers: Mapping[SharedName, Offer] = field(default_factory=dict)
    """By name without a version."""
    features: Mapping[SharedName, SharedFeature] = field(default_factory=dict)
    problems: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def find(self, name: SharedName) -> SharedFeature | None:
        offer = self.offers.get(name.newest)
        return None if offer is None else self.features.get(name if name.version else offer.newest)

    def resolver(self, tenant: str) -> Resolver:
        """What the tenant's own expressions see."""

        def resolve(name: SharedName) -> SharedValue:
            feature = self.features.get(offered(self.offers, name, tenant))
            if feature is None:
                raise NotFound(f"{name} is refused; see {FEATURES_FILE} of its tenant")
            return SharedValue(name, feature.expression.type)

        return resolve

    def below(self, values: Iterable[SharedValue]) -> list[SharedFeature]:
        """The features named and all they use, each after those it uses; what is not there any more is left out."""
        wanted: set[SharedName] = set()
        waiting = list(values)
        while waiting:
            feature = self.find(waiting.pop().feature)
            if feature is not None and feature.name not in wanted:
                wanted.add(feature.name)
                waiting += feature.uses
        return sorted((self.features[name] for name in wanted), key=lambda feature: feature.place)

    def aggregates(self, manifest: Manifest) -> frozenset[Aggregate]:
        """What the model needs of the customer's row, also through shared features."""
        nodes = self._nodes(manifest)
        return frozenset(manifest.aggregates) | {node.aggregate for node in nodes if isinstance(node, AggregateValue)}

    def aggregates_of(self, owner: str) -> frozenset[Aggregate]:
        """Those of all features that the tenant shares, whether anybody uses them or not."""
        own = [feature for feature in self.features.values() if feature.offer.owner == owner]
        nodes = [node for feature in own for node in walk(feature.expression)]
        return frozenset(node.aggregate for node in nodes if isinstance(node, AggregateValue))

    def stored_outputs(self, manifest: Manifest) -> frozenset[StoredOutput]:
        """Other models' outputs that it uses, also through shared features; names as in expressions."""
        nodes = self._nodes(manifest)
        return frozenset(manifest.stored_outputs) | {node.output for node in nodes if isinstance(node, StoredValue)}

    def _nodes(self, manifest: Manifest) -> list[Node]:
        values = manifest.shared_values
        return [node for feature in self.below(values) for node in walk(feature.expression)] if values else []

    def uses(self, manifests: Iterable[Manifest]) -> list[Use]:
        """By whom each shared feature is named: by the models given, and by shared features."""
        found = [
            Use(str(manifest.name), manifest.name.tenant, value)
            for manifest in manifests
            for value in manifest.shared_values
        ]
        for feature in self.features.values():
            owner = feature.offer.owner
            found += [Use(str(feature.name), owner, value, in_file=True) for value in feature.uses]
        return found


NOTHING_SHARED: Final = Definitions()


def offered(offers: Mapping[SharedName, Offer], name: SharedName, tenant: str) -> SharedName:
    """The name with its version. Raises NotFound when the tenant may not use such a thing, or there is none."""
    offer = offers.get(name.newest)
    if offer is None:
        named = [other.name for other in offers if other.tenant == name.tenant]
        others = named or [f"{other.tenant}.{other.name}" for other in offers]
        raise NotFound(f"no tenant shares {name.newest}" + suggestion(name.name, others))
    if not offer.is_for(tenant):
        raise NotFound(f"{name.newest} is not shared with tenant {tenant}; ask tenant {offer.owner}")
    if name.version and name.version not in offer.texts:
        there = ", ".join(f"v{version}" for version in sorted(offer.texts))
        raise NotFound(f"{name} is not there; of this feature there is {there}")
    return name if name.version else offer.newest


def compile_definitions(files: Mapping[str, str], schema: EventSchema, new: str = "") -> Definitions:
    """All features of these texts that can be taken; those that can't are in `problems`.

    Raises ConfigError when the operator's profile is wrong, and ManifestError once the text of the tenant `new`, which
    is to be taken, has PROBLEMS_MAX mistakes.
    """
    if not any(files.values()):
        return Definitions({tenant: text for tenant, text in files.items() if text})
    return _Loader({tenant: text for tenant, text in sorted(files.items()) if text}, schema, new).load_all()


def replaced(
    before: Definitions, tenant: str, text: str, models: Iterable[Manifest], schema: EventSchema
) -> Definitions:
    """With another file of one tenant, '' for none; `models` are those in use.

    Raises ManifestError with a line for each mistake in it, and for each thing that somebody uses and would lose.
    """
    after = compile_definitions({**before.files, tenant: text}, schema, tenant)
    problems = list(after.problems.get(tenant, ()))
    problems += _changed_meanings(before, after, tenant)
    if not problems:
        problems += _losses(after, tenant, before.uses(models))
    if not problems:
        for other, lines in after.problems.items():
            fresh = [line for line in lines if line not in before.problems.get(other, ())]
            problems += [f"{FEATURES_FILE}: with it, tenant {other} could not go on: {line}" for line in fresh]
    if problems:
        raise ManifestError(problems)
    return after


def _changed_meanings(before: Definitions, after: Definitions, tenant: str) -> list[str]:
    """A version that says something else: who trained a model on it must be able to rely on it."""
    return [
        f"{FEATURES_FILE}: {feature.name.name}: version {name.version} would mean something else than before; give what"
        f" is new the version {feature.offer.newest.version + 1 if feature.is_newest else 'after the newest'}, and keep"
        " this one under earlier while others use it"
        for name, feature in after.features.items()
        if feature.offer.owner == tenant and name in before.features and _differs(before.features[name], feature)
    ]


def _differs(one: SharedFeature, other: SharedFeature) -> bool:
    return one.expression != other.expression


def _losses(after: Definitions, tenant: str, uses: Iterable[Use]) -> list[str]:
    """A line for each feature of the tenant that somebody uses, and that is not there for them any more as it was."""
    losers: dict[tuple[SharedName, str], list[str]] = {}
    for use in uses:
        name, own_file = use.value.feature, use.in_file and use.tenant == tenant
        if own_file or name.tenant != tenant.replace("-", "_"):
            continue
        try:
            kind = after.resolver(use.tenant)(name).type
        except NotFound as error:
            losers.setdefault((name, str(error)), []).append(use.by)
            continue
        if kind != use.value.type:
            losers.setdefault((name, f"it would be a {kind}, no {use.value.type}"), []).append(use.by)
    return [
        f"{FEATURES_FILE}: {name} is used by {', '.join(sorted(set(users)))}, so what is in force stays: {why}"
        for (name, why), users in sorted(losers.items())
    ]


class _Loader:
    """Parses each feature once, after those it uses. `new` is the tenant whose file is to be taken: with more mistakes
    than anybody reads it is refused at once, as ManifestError, since guessing what was meant costs time."""

    def __init__(self, files: Mapping[str, str], schema: EventSchema, new: str) -> None:
        self._files = files
        self._new = new
        self._schema = schema
        self._profile = evaluate_profile(schema)
        self._problems: dict[str, list[str]] = {}
        self._offers: dict[SharedName, Offer] = {}
        self._features: dict[SharedName, SharedFeature] = {}
        self._refused: set[SharedName] = set()
        self._loading: list[SharedName] = []

    def load_all(self) -> Definitions:
        for tenant, text in self._files.items():
            self._read(tenant, text)
        for offer in sorted(self._offers.values(), key=lambda offer: offer.newest):
            for version in sorted(offer.texts):
                self._load(SharedName(offer.newest.tenant, offer.newest.name, version))
        problems = {tenant: tuple(lines) for tenant, lines in self._problems.items()}
        return Definitions(self._files, self._offers, self._features, problems)

    def _problem(self, tenant: str, line: str) -> None:
        found = self._problems.setdefault(tenant, [])
        found.append(f"{FEATURES_FILE}: {line}")
        if tenant == self._new and len(found) >= PROBLEMS_MAX:
            raise ManifestError([*found, f"{FEATURES_FILE}: {MORE_PROBLEMS}"])

    def _read(self, tenant: str, text: str) -> None:
        try:
            reader = Reader(FEATURES_FILE, text.encode(), ("features",))
            reader.finish()
        except ManifestError as error:
            self._problems[tenant] = list(error.problems)
            return
        spoken = tenant.replace("-", "_")
        taken = [offer.owner for name, offer in self._offers.items() if name.tenant == spoken]
        table = reader.values.get("features", {})
        if taken:
            self._problem(tenant, f"expressions can't tell {tenant} from {taken[0]}, as '-' reads as '_'; rename one")
        elif not isinstance(table, dict) or len(table) > SHARED_FEATURES_PER_TENANT_MAX:
            self._problem(tenant, f"[features] must be at most {SHARED_FEATURES_PER_TENANT_MAX} tables")
        else:
            for name, entry in table.items():
                self._read_entry(tenant, SharedName(spoken, name), entry)

    def _read_entry(self, tenant: str, name: SharedName, raw: object) -> None:
        place = f"feature {shown(name.name)}"
        try:
            entry = msgspec.convert(raw, _Entry)
        except msgspec.ValidationError as error:
            self._problem(tenant, f"{place}: {error}")
            return
        earlier = {int(key): text for key, text in entry.earlier.items() if key.isascii() and key.isdigit()}
        if not is_output(name.name):
            self._problem(tenant, f"{place}: must be 1 to 63 of a-z, A-Z, 0-9 and '_', not starting with a digit")
        elif len(earlier) < len(entry.earlier) or not all(0 < version < entry.version for version in earlier):
            self._problem(tenant, f"{place}: earlier takes versions from 1 to {entry.version - 1}")
        elif len(earlier) >= SHARED_FEATURE_VERSIONS_MAX:
            self._problem(tenant, f"{place}: has more than {SHARED_FEATURE_VERSIONS_MAX} versions; drop unused ones")
        else:
            newest = SharedName(name.tenant, name.name, entry.version)
            shared_with = None if entry.shared_with is None else tuple(sorted(set(entry.shared_with)))
            texts = {**earlier, entry.version: entry.expression}
            self._offers[name] = Offer(tenant, newest, texts, entry.description, shared_with)

    def _load(self, name: SharedName) -> SharedFeature | None:
        if name in self._features or name in self._refused:
            return self._features.get(name)
        offer = self._offers[name.newest]
        self._loading.append(name)
        try:
            text = offer.texts[name.version]
            node = parse_expression(text, Scope(self._schema, self._profile, shared=self._resolver(offer.owner)))
        except ExpressionError as error:
            self._refused.add(name)
            version = "" if name == offer.newest else f" version {name.version}"
            for problem in error.problems:
                self._problem(offer.owner, f"feature {shown(name.name)}{version}: {problem}")
            return None
        finally:
            self._loading.pop()
        feature = self._features[name] = SharedFeature(name, offer, node, len(self._features))
        return feature

    def _resolver(self, tenant: str) -> Resolver:
        def resolve(asked: SharedName) -> SharedValue:
            name = offered(self._offers, asked, tenant)
            if name in self._loading:
                ring = [*self._loading[self._loading.index(name) :], name]
                raise NotFound(f"{asked} needs itself: {' -> '.join(map(str, ring))}")
            if len(self._loading) >= SHARED_FEATURE_CHAIN_MAX and name not in self._features:
                raise NotFound(f"{asked} is at the end of a chain of more than {SHARED_FEATURE_CHAIN_MAX} features")
            feature = self._load(name)
            if feature is None:
                raise NotFound(f"{asked} is refused; see {FEATURES_FILE} of its tenant")
            return SharedValue(asked, feature.expression.type)

        return resolve
