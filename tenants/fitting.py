"""Whether what the registry decides fits into customers' rows, and what is left out where it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from node.kernel.ports import FeaturePlan
from node.kernel.types import EventSchema, ModelName, ModelVersion
from tenants import registry, transitions
from tenants.features import compile_plan
from tenants.folder import MANIFEST
from tenants.manifest import Manifest
from tenants.model_graph import ring_problem
from tenants.registry import Agreed, Event, GoLive, RunBeside, Snapshot, Step, TrialFailed, TrialPassed

log = structlog.get_logger(__name__)

_Models = Sequence[tuple[ModelVersion, Manifest]]


@dataclass(frozen=True, slots=True)
class Fitting:
    """`check_state` says why customers' rows can't hold what a plan needs, '' when they can, and says the same on every
    node. `check_room` says it of the rows that this node has, which hold the state of replaced models too."""

    schema: EventSchema
    check_state: Callable[[FeaturePlan], str]
    check_room: Callable[[FeaturePlan], str] = lambda plan: ""

    def next(self, snapshot: Snapshot, event: Event) -> Step:
        """What the registry decides; a candidate whose state does not fit beside the live models' is refused."""
        if isinstance(event, Agreed):
            return self._agreed(snapshot, event)
        after, actions = transitions.apply(snapshot, event, self.schema)
        if isinstance(event, TrialPassed) and after is not snapshot:
            models = registry.prospect(after)
            own = [one for one in models if one[0].name == event.name]
            reason = self._state(models, after) or self.check_room(self._plan(own, after))
            if reason:
                refused = TrialFailed(
                    event.name, event.version, f"with the live models, {reason}", event.at_ms, MANIFEST
                )
                return transitions.apply(snapshot, refused, self.schema)
        return after, actions

    def _agreed(self, snapshot: Snapshot, event: Agreed) -> Step:
        """Two nodes may have put models at once that fit alone and not together: then all nodes leave out the same."""
        after, actions = transitions.apply(snapshot, event, self.schema)
        if not any(isinstance(action, GoLive | RunBeside) for action in actions):
            return after, actions
        beside = [registry.under_key(*one) for one in after.beside]
        if not self._misfit(after.live, after) and not self._state([*after.live, *beside], after):
            return after, actions
        fitting: list[tuple[ModelVersion, Manifest]] = []
        unfit: dict[ModelName, str] = {}
        for version, manifest in after.live:
            reason = self._misfit([*fitting, (version, manifest)], after)
            if reason:
                unfit[version.name] = reason
                log.error("a live model is not served: its state does not fit", model=str(version.name), reason=reason)
            else:
                fitting.append((version, manifest))
        stages = not self._state([*fitting, *beside], after)
        return transitions.apply(snapshot, replace(event, unfit=unfit, stages=stages), self.schema)

    def _misfit(self, live: _Models, snapshot: Snapshot) -> str:
        """Why the models can't run together; '' when they can."""
        return self._state(live, snapshot) or ring_problem([manifest for _, manifest in live], snapshot.definitions)

    def _state(self, models: _Models, snapshot: Snapshot) -> str:
        return self.check_state(self._plan(models, snapshot))

    def _plan(self, models: _Models, snapshot: Snapshot) -> FeaturePlan:
        return compile_plan(models, self.schema, snapshot.definitions)
