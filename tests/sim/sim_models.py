"""Tenants' models in the simulation: who puts which version, which disk has which file, and what must be live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from replication.catalog import Catalog, Model, model_key
from replication.commands import Command, HoldBlob, PutVersion
from replication.ownership import Reports, living
from replication.rollout import rollout

if TYPE_CHECKING:
    from sim_node import SimNode
    from sim_world import World

TENANT, MODELS = "t", ("m", "n")
LOOK_MS = 400


def put(node: SimNode) -> None:
    """A tenant drops a file at this node: mostly a new one, now and then one that is known."""
    world, model = node.world, node.world.random.choice(MODELS)
    known = node.catalog.models.get(model_key(TENANT, model))
    versions = [] if known is None else sorted(node.disk.blobs & known.versions.keys())
    again = bool(versions) and world.random.random() < 0.4
    version = world.random.choice(versions) if again else f"{world.next_number():064x}"
    node.disk.blobs.add(version)
    node.propose(
        PutVersion(
            revision=node.catalog.revision,
            tenant=TENANT,
            model=model,
            version=version,
            blob=version,
            manifest="x",
            report="{}",
        )
    )


def look(node: SimNode) -> None:
    """Fetch what is listed and not here, and say what is here and what no longer is."""
    for blob, holders in node.catalog.holders.items():
        here = blob in node.disk.blobs
        if not here:
            node.world.ask_blob(node, blob)
        if here != (node.name in holders):
            node.propose(
                HoldBlob(
                    revision=node.catalog.revision,
                    node=node.name,
                    incarnation=node.disk.incarnation,
                    blob=blob,
                    held=here,
                )
            )


def lead(node: SimNode, reports: Reports) -> None:
    world, now_ms = node.world, int(node.local_ms)
    commands = rollout(node.catalog, living(node.catalog, reports, now_ms, world.plan_settings))
    world.checks.all_is_valid(node.catalog, commands)
    for command in commands:
        world.propose(node, command)


class ModelChecks:
    """(i): the newest wish goes live, everywhere at once, and only where the file is."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.wishes: dict[str, str] = {}

    def changed(self, command: Command, before: Catalog, after: Catalog) -> None:
        if isinstance(command, PutVersion):
            self.wishes[model_key(command.tenant, command.model)] = command.version
        for key, model in after.models.items():
            was = before.models.get(key)
            if model is not was:
                self._is_sound(key, model, was.live if was is not None else "")

    def _is_sound(self, key: str, model: Model, was: str) -> None:
        live = [version.version for version in model.versions.values() if version.state == "live"]
        if live != ([model.live] if model.live else []):
            self.world.checks.fail("(i) not one version of a model is live", key, live, model.live)
        if model.live == was:
            return
        if model.live != self.wishes[key]:
            self.world.checks.fail("(i) an older version went live", key, model.live[-4:], self.wishes[key][-4:])
        lacking = [
            node.name
            for node in self.world.nodes.values()
            if self.world.is_well(node) and model.live not in node.disk.blobs
        ]
        if lacking:
            self.world.checks.fail("(i) a version went live on nodes that lack its file", key, lacking)

    def unfinished(self, catalog: Catalog) -> str:
        """A file that was lost with every disk that had it can't go live any more."""
        for key, wish in self.wishes.items():
            having = {node.name for node in self.world.nodes.values() if wish in node.disk.blobs}
            if not having:
                continue
            if catalog.models[key].live != wish:
                return f"the newest version of {key} is not live"
            if having != catalog.nodes.keys() or catalog.holders[wish].keys() != having:
                return f"not every node has the live version of {key}"
        return ""
