"""(P) How far behind models are: what waits in the sequence log and what was shed, over a node's partitions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from node.serving.view import Waiting

_SHED = "shed"


@dataclass(slots=True)
class _Sum:
    rows: int = 0
    size: int = 0
    waiting_ms: int = 0
    shed: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def waiting(self) -> Waiting:
        return Waiting(rows=self.rows, bytes=self.size, seconds=self.waiting_ms / 1000, shed=dict(self.shed))


class Lags:
    """By model and by tenant; each partition gives what its backlog and its counters say."""

    def __init__(self, partitions: Iterable[tuple[Mapping[str, Mapping[str, int]], Mapping[str, int]]]) -> None:
        self._models: defaultdict[str, _Sum] = defaultdict(_Sum)
        self._tenants: defaultdict[str, _Sum] = defaultdict(_Sum)
        for backlog, counters in partitions:
            for line, figures in backlog.items():
                model = line.partition("@")[0]
                for one in (self._models[model], self._tenants[_tenant(model)]):
                    one.rows += figures["rows"]
                    one.size += figures["bytes"]
                    one.waiting_ms = max(one.waiting_ms, figures["waiting_ms"])
            for counter, count in counters.items():
                what, _, which = counter.partition(" ")
                reason, _, model = which.rpartition(" ")
                if what == _SHED:
                    self._models[model].shed[reason] += count
                    self._tenants[_tenant(model)].shed[reason] += count

    def model(self, name: str) -> Waiting:
        """Of `tenant/model`."""
        return self._models[name].waiting() if name in self._models else Waiting()

    def tenant(self, name: str) -> Waiting:
        return self._tenants[name].waiting() if name in self._tenants else Waiting()


def _tenant(model: str) -> str:
    return model.partition("/")[0]
