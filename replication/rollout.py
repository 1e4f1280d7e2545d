"""(P) Which model versions may go live now, and which old ones may go: what the Raft leader proposes next.

A version that passed its trial goes live, or to the first of its stages beside the live one, once every node that is
there has its file, so that all go over to it at one place of the log and none has to serve without it. A node that is
away does not hold the others up: it learns what is live when it comes back, and says until it has the file that it
lacks it. What leads from one stage to the next is not decided here (see `node.cluster_models`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from typing import TypeAlias

from node.kernel.limits import ROLLOUT_COMMANDS_MAX, VERSIONS_RETIRED_MAX
from replication.catalog import ENDED, Catalog, Model, Version
from replication.commands import ForgetVersion, GoLive, StageVersion

RolloutCommand: TypeAlias = GoLive | StageVersion | ForgetVersion


def rollout(catalog: Catalog, fresh: Collection[str]) -> list[RolloutCommand]:
    """The leader's next commands for models: one a model and ROLLOUT_COMMANDS_MAX at most, all valid together.

    `fresh` are the nodes that must have a file: those that `ownership.living` gives, which a leader of a moment ago
    says of every member. Without any, nothing goes live. The same catalog and nodes give the same answer,
    so it need be asked only when the catalog's revision or the nodes have changed.
    """
    members = tuple(sorted(name for name in fresh if name in catalog.nodes))
    return list(islice(_commands(catalog, members), ROLLOUT_COMMANDS_MAX))


def _commands(catalog: Catalog, members: tuple[str, ...]) -> Iterator[RolloutCommand]:
    for model in catalog.models.values():
        passed = next((version for version in model.versions.values() if version.state == "passed"), None)
        if passed is not None and members and catalog.holders[passed.blob].keys() >= set(members):
            yield _begin(catalog, model, passed, members)
        elif len(model.versions) > VERSIONS_RETIRED_MAX:
            yield from _forget(catalog, model)


def _begin(catalog: Catalog, model: Model, version: Version, members: tuple[str, ...]) -> GoLive | StageVersion:
    """The first version of a model has none to stand beside."""
    if version.stages and model.live:
        return StageVersion(
            revision=catalog.revision,
            tenant=model.tenant,
            model=model.model,
            version=version.version,
            stage=0,
            holders=members,
            reason="passed its trial",
            who=version.who,
            at_ms=version.at_ms,
        )
    return GoLive(
        revision=catalog.revision,
        tenant=model.tenant,
        model=model.model,
        version=version.version,
        holders=members,
        reason="passed its trial",
        who=version.who,
        at_ms=version.at_ms,
    )


def _forget(catalog: Catalog, model: Model) -> Iterator[ForgetVersion]:
    """The oldest version that runs no more, when there are too many; the one that would be fallen back to stays."""
    ended = [version for version in model.versions.values() if version.state in ENDED]
    if len(ended) > VERSIONS_RETIRED_MAX:
        oldest = min((one for one in ended if one is not model.fallback), key=lambda version: version.revision)
        yield ForgetVersion(revision=catalog.revision, tenant=model.tenant, model=model.model, version=oldest.version)
