"""(P) A micro-batch as columns: how values become the columns of `EventColumns`, and parts of it are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from node.kernel.types import Bools, Column, EventColumns, EventSchema, Floats, Ints, Texts


def number_column(values: Sequence[float | bool | None]) -> Floats:
    """float64 [n]; None becomes NaN, True 1.0, False 0.0."""
    return np.array(values, dtype=np.float64)


def text_column(values: Sequence[str | None]) -> Texts:
    """object [n], str or None."""
    return np.array(values, dtype=np.object_)


def customer_rows(names: Sequence[str]) -> tuple[Ints, list[str]]:
    """int64 [n] positions into the customers named, each once, in order of first appearance."""
    positions = {name: position for position, name in enumerate(dict.fromkeys(names))}
    return np.fromiter(map(positions.__getitem__, names), np.int64, len(names)), list(positions)


def no_events(schema: EventSchema) -> EventColumns:
    none = np.empty(0, np.int64)
    fields: dict[str, Column] = {
        name: text_column(()) if kind == "text" else number_column(()) for name, kind in schema.fields.items()
    }
    return EventColumns(none, none, none, [], none, none, fields)


def take(events: EventColumns, selection: Ints | Bools) -> EventColumns:
    """The events of `selection` (positions, or a mask of length n) in its order, customers numbered anew."""
    names = [events.customers[row] for row in events.rows[selection].tolist()]
    rows, customers = customer_rows(names)
    return EventColumns(
        types=events.types[selection],
        times_ms=events.times_ms[selection],
        rows=rows,
        customers=customers,
        topics=events.topics[selection],
        offsets=events.offsets[selection],
        fields={name: column[selection] for name, column in events.fields.items()},
    )


def where(events: EventColumns, mask: Bools | Ints) -> EventColumns:
    """The events of the mask, or at those positions, their customers numbered as before: rows of the same matrix."""
    return replace(
        events,
        types=events.types[mask],
        times_ms=events.times_ms[mask],
        rows=events.rows[mask],
        topics=events.topics[mask],
        offsets=events.offsets[mask],
        fields={name: column[mask] for name, column in events.fields.items()},
    )
