"""(P) The rows of one partition that are to be checked, found by their events; and what other models gave for these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from node.kernel.types import StoredOutput
from node.training.fed_rows import Described, FedRows

Event = tuple[str, int]
"""Source topic and offset."""


@dataclass(slots=True)
class Logged:
    """`rows`: event -> record, place in it, and what its version's features follow from (None: that is gone)."""

    rows: dict[Event, tuple[FedRows, int, Described | None]] = field(default_factory=dict)
    given: dict[StoredOutput, dict[Event, float]] = field(default_factory=dict)
    unchecked: dict[str, int] = field(default_factory=dict)
    count: int = 0
    described: dict[str, Described] = field(default_factory=dict)

    def add(self, record: FedRows | Described, rows_max: int) -> None:
        """A record of the model that is checked, in the topic's order."""
        if isinstance(record, Described):
            for entry, (rows, place, known) in self.rows.items() if record.version not in self.described else ():
                if known is None and rows.triggers.version == record.version:
                    self.rows[entry] = rows, place, record
            self.described[record.version] = record
            return
        self.count += len(record)
        described = self.described.get(record.triggers.version)
        if record.triggers.kind != "event":
            self.leave(
                f"of {'an interval run' if record.triggers.kind == 'interval' else 'closed sessions'}: of no event",
                len(record),
            )
            return
        room = max(0, rows_max - len(self.rows))
        for place, event in enumerate(events_of(record)[:room]):
            self.rows[event] = record, place, described
        if room < len(record):
            self.leave("beyond --rows-max", len(record) - room)

    def add_input(self, record: FedRows) -> None:
        """Of a model whose outputs the checked one uses."""
        for at, output in enumerate(record.version.outputs):
            values = self.given.setdefault(StoredOutput(record.triggers.name, output), {})
            for place, event in enumerate(events_of(record)):
                if place not in record.outputs.errors:
                    values[event] = float(record.outputs.values[place, at])

    def leave(self, reason: str, rows: int = 1) -> None:
        """Say why rows are not checked."""
        self.unchecked[reason] = self.unchecked.get(reason, 0) + rows

    def inputs(self) -> Mapping[str, tuple[tuple[str, ...], int]]:
        """Of all versions: by name, outputs and time to live."""
        return {name: told for one in self.described.values() for name, told in one.source.inputs.items()}


def events_of(rows: FedRows) -> list[Event]:
    triggers = rows.triggers
    return [
        (triggers.event_names.topics[topic], offset)
        for topic, offset in zip(triggers.topics.tolist(), triggers.offsets.tolist(), strict=True)
    ]
