"""(P) Models' latest outputs, kept in the customer's row, so that storing an inference costs no write of its own."""

from __future__ import annotations

import numpy as np

from node.kernel.types import Floats, Ints, ModelVersion, StoredOutput
from node.state.layout import Layout


def read_output(layout: Layout, rows: Floats, output: StoredOutput, ttl_ms: int, at: Ints, times_ms: Ints) -> Floats:
    """float64 [n]: the output as of each time; NaN where there is none, or its TTL (0: never expires) has passed.

    `rows` is float64 [slots, customers], `at` [n] their columns. An output that the layout lacks is NaN everywhere.
    """
    slots = layout.outputs.get(output.name)
    slot = None if slots is None else slots.outputs.get(output.output)
    if slots is None or slot is None:
        return np.full(len(at), np.nan)
    values: Floats = rows[slot, at]
    if ttl_ms:
        values[rows[slots.time_slot, at] + ttl_ms < times_ms] = np.nan
    return values


def write_outputs(
    layout: Layout, rows: Floats, version: ModelVersion, at: Ints, times_ms: Ints, values: Floats
) -> None:
    """Store `values` [n, outputs of the version] for the columns `at` [n] of `rows` [slots, customers], in place.

    Of a customer's inferences the newest by event time stays, of equally new ones the later. Outputs that another
    version of the model had and this one lacks become NaN. Nothing is stored where the layout lacks the model: it is
    gone, and was answered late.
    """
    slots = layout.outputs.get(version.name)
    if slots is None:
        return
    by_time = times_ms.argsort(kind="stable")
    held = rows[slots.time_slot, at[by_time]]
    by_time = by_time[~(times_ms[by_time] < held)]
    columns = at[by_time]
    for output, slot in slots.outputs.items():
        place = version.outputs.index(output) if output in version.outputs else None
        rows[slot, columns] = np.nan if place is None else values[by_time, place]
    rows[slots.time_slot, columns] = times_ms[by_time]
    rows[slots.version_slot, columns] = int(version.short_version, 16)
