"""(P) What models are to each other: whose outputs they may use, and what others use of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from node.kernel.types import ModelName, StoredOutput
from tenants.definitions import Definitions
from tenants.expression import expression_name
from tenants.manifest import Manifest
from tenants.model_graph import ring_problem


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
    """Outputs it uses that are not shared with its tenant; of its own file only: a shared feature's owner answers for
    what that uses."""
    givers = {expression_name(name): giver for name, giver in {**among.live, **among.wished}.items()}
    for output in manifest.stored_outputs:
        giver = givers.get(output.name)
        if giver is not None and not _may_use(manifest.name.tenant, giver):
            yield f"{output} is not shared with tenant {manifest.name.tenant}; ask tenant {giver.name.tenant}"


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
        losing = [user for user in users if not _may_use(user.name.tenant, manifest) and _names_it(user, output)]
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


def _names_it(manifest: Manifest, output: StoredOutput) -> bool:
    return output in manifest.stored_outputs


def _names(users: Iterable[Manifest]) -> str:
    return ", ".join(sorted(str(user.name) for user in users))


def kept_for(name: ModelName, among: Neighbours) -> str:
    """The other tenants' models, and its own tenant's, that use the live model's outputs; '' when it may go."""
    running = among.live.get(name)
    if running is None:
        return ""
    users = {user.name: user for used in _users(running, among).values() for user in used}
    return _names(users.values())
