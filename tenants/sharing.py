"""(P) What models are to each other: whose outputs they may use, and what others use of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from node.kernel.types import ModelName, StoredOutput
from tenants.definitions import Definitions, SharedFeature
from tenants.expression import StoredValue, expression_name, walk
from tenants.manifest import Manifest
from tenants.model_graph import ring_problem
from tenants.shared_names import FEATURES_FILE


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The models that a manifest is put among: those that run, and those that are to, as `wished`."""

    live: Mapping[ModelName, Manifest]
    wished: Mapping[ModelName, Manifest]
    definitions: Definitions


def problems(manifest: Manifest, among: Neighbours) -> list[str]:
    """Why the model can't run among the others in place of what is there under its name, a line for each reason."""
    file, name = f"{manifest.name.model}.toml", manifest.name
    found = [f"{file}: {line}" for line in _withheld(manifest, among)]
    found += [f"{file}: {line}" for line in _losses(manifest, among)]
    others = [other for other in among.wished.values() if other.name != name]
    reason = ring_problem([*others, manifest], among.definitions)
    return [*found, f"{file}: {reason}; leave one of these uses out"] if reason else found


def _withheld(manifest: Manifest, among: Neighbours) -> Iterable[str]:
    """Outputs it uses that are not shared with its tenant, or with the owner of the shared feature it has them by."""
    own = ((output, manifest.name.tenant, str(output)) for output in manifest.stored_outputs)
    shared = among.definitions.below(manifest.shared_values)
    return _kept_from([*own, *(use for feature in shared for use in _uses_of(feature))], among)


def withheld_features(definitions: Definitions, tenant: str, among: Neighbours) -> list[str]:
    """A line for each output that the tenant's shared features use and that is not shared with it."""
    own = [feature for feature in definitions.features.values() if feature.offer.owner == tenant]
    lines = _kept_from([use for feature in own for use in _uses_of(feature)], among)
    return [f"{FEATURES_FILE}: {line}" for line in lines]


def _uses_of(feature: SharedFeature) -> Iterable[tuple[StoredOutput, str, str]]:
    """Each output that it uses itself, who answers for that, and how it is told."""
    for node in walk(feature.expression):
        if isinstance(node, StoredValue):
            yield node.output, feature.offer.owner, f"{feature.name} uses {node.output}, which"


def _kept_from(uses: Iterable[tuple[StoredOutput, str, str]], among: Neighbours) -> Iterable[str]:
    givers = {expression_name(name): giver for name, giver in {**among.live, **among.wished}.items()}
    for output, tenant, told in uses:
        giver = givers.get(output.name)
        if giver is not None and not _may_use(tenant, giver):
            yield f"{told} is not shared with tenant {tenant}; ask tenant {giver.name.tenant}"


def _may_use(tenant: str, giver: Manifest) -> bool:
    return giver.shared_with is None or tenant == giver.name.tenant or tenant in giver.shared_with


def _losses(manifest: Manifest, among: Neighbours) -> Iterable[str]:
    """What other models use of the present version and this one would not give them."""
    running = among.live.get(manifest.name)
    if running is None:
        return
    for output, users in sorted(_users(running, among).items()):
        if output.output not in manifest.outputs:
            yield f"{output} is used by {_names(users)}, so it can't be left out"
            continue
        losing = [user for user in users if any(not _may_use(one, manifest) for one in _answering(user, output, among))]
        if losing:
            yield f"{output} is used by {_names(losing)}, so it can't be kept from them"


def _users(running: Manifest, among: Neighbours) -> dict[StoredOutput, list[Manifest]]:
    """Of each output of a live model, the other live models that use it."""
    spoken, found = expression_name(running.name), dict[StoredOutput, list[Manifest]]()
    for other in among.live.values():
        if other.name == running.name:
            continue
        for output in among.definitions.stored_outputs(other):
            if output.name == spoken and output.output in running.outputs:
                found.setdefault(output, []).append(other)
    return found


def _answering(user: Manifest, output: StoredOutput, among: Neighbours) -> Iterable[str]:
    """The tenants that the output has to be shared with so that the model may go on using it."""
    if output in user.stored_outputs:
        yield user.name.tenant
    for feature in among.definitions.below(user.shared_values):
        yield from (owner for used, owner, *_ in _uses_of(feature) if used == output)


def _names(users: Iterable[Manifest]) -> str:
    return ", ".join(sorted(str(user.name) for user in users))


def kept_for(name: ModelName, among: Neighbours) -> str:
    """The other tenants' models, and its own tenant's, that use the live model's outputs; '' when it may go."""
    running = among.live.get(name)
    if running is None:
        return ""
    users = {user.name: user for used in _users(running, among).values() for user in used}
    return _names(users.values())
