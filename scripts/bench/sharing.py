"""What features cost when ten models share twenty of them, beside one model that has them alone.

In one process, without a broker, as the cycle does it: the standard events of one partition are folded into customers'
rows, and the features of every model computed and gathered into its rows, micro-batch by micro-batch. Models are not
called: what they cost is theirs. `cost_ratio` is of ten models that each have the features in an order of their own;
`cost_ratio_one_order`, in the same one. Beside it, ten models that each compute their own: a fold and a plan for each.
The ways take turns on the same events; the median CPU time of a pass is compared.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np
import workload
from numpy.typing import NDArray

from node.columns import where
from node.config import parse_config
from node.ingest.decode import EventDecoder
from node.kernel.tables import NO_TABLES, TableSet
from node.kernel.types import Aggregate, EventColumns, EventSchema, StoredOutput
from node.state.fold import filters_of, fold
from node.state.layout import Layout
from node.triggers import select
from tenants.definitions import compile_definitions
from tenants.features import CompiledFeatures, compile_plan
from tenants.manifest import parse_manifest

AIMS = {"cost_ratio": "<= 1.3"}
MODELS, BATCH = 10, 4096
EVENTS, EVENTS_QUICK = 200_000, 20_000
RUNS, RUNS_QUICK = 7, 1
FEATURES = {
    **workload.FEATURES,
    **{f"visits_{window}": f"count(any, '{window}')" for window in ("1h", "1d", "7d", "30d")},
    **{f"least_{window}": f"coalesce(min(transaction.amount, '{window}'), 0)" for window in ("1h", "30d")},
    "first": "coalesce(first(transaction.amount), 0)",
    "usual": "spend_30d / max(1, transactions_30d)",
    "rush": "visits_1h / max(1, visits_7d)",
    "hour": "hour(event.time)",
}


@dataclass(frozen=True, slots=True)
class Reads:
    values: dict[Aggregate, NDArray[np.float64]]

    @property
    def tables(self) -> TableSet:
        return NO_TABLES

    def aggregate(self, aggregate: Aggregate) -> NDArray[np.float64]:
        return self.values[aggregate]

    def stored(self, output: StoredOutput) -> NDArray[np.float64]:
        raise KeyError(output)


class Way:
    """One way to compute the features: a plan, and the rows of all customers under its layout."""

    def __init__(self, plan: CompiledFeatures, schema: EventSchema, customers: int) -> None:
        self.plan, self.schema = plan, schema
        self.layout = Layout.empty().grown(plan.aggregates, plan.stored_models)
        self.state = np.ascontiguousarray(np.tile(self.layout.initial, (customers, 1)).T)

    def take(self, events: EventColumns, customers: NDArray[np.int64]) -> tuple[float, int]:
        """One micro-batch: the CPU seconds of fold and features, loading left aside, and the feature rows it gave."""
        plan, rows = self.plan, np.ascontiguousarray(self.state[:, customers])
        started = time.process_time()
        selections = select(plan, events, self.schema)
        wanted = np.logical_or.reduce(list(selections.values()))
        masks = plan.masks(events, filters_of(self.layout, events, self.schema.types))
        folded = fold(self.layout, rows, events, masks, wanted, self.schema.types, plan.aggregates)
        triggering = where(events, wanted)
        batch = plan.batch(triggering, {name: mask[wanted] for name, mask in selections.items()})
        found = batch.rows(list(selections), Reads(dict(folded.values)))
        seconds = time.process_time() - started
        self.state[:, customers] = rows
        return seconds, sum(map(len, found.values()))


def plan_of(models: int, schema: EventSchema, turned: bool = False) -> CompiledFeatures:
    """Models of as many tenants with all the shared features; `turned`: each in an order of its own."""
    spoken = {name: name for name in FEATURES}
    for name in ("spend_30d", "transactions_30d", "visits_1h", "visits_7d"):
        spoken[name] = f"features.common.{name}"
    text = ""
    for name, expression in FEATURES.items():
        for used in ("spend_30d", "transactions_30d", "visits_1h", "visits_7d"):
            if name in ("usual", "rush"):
                expression = expression.replace(used, spoken[used])
        text += f'[features.{name}]\nversion = 1\ndescription = "{name}"\nexpression = "{expression}"\n'
    definitions = compile_definitions({"common": text}, schema)
    assert not definitions.problems, definitions.problems
    pairs = []
    for number in range(models):
        first = number if turned else 0
        names = [*list(FEATURES)[first:], *list(FEATURES)[:first]]
        lines = [f'{name} = "features.common.{name}"' for name in names]
        manifest = "\n".join(['on = ["add_to_cart", "transaction"]', "[features]", *lines]).encode()
        shared = definitions.resolver(f"team{number}")
        parsed = parse_manifest("model.toml", f"team{number}", "model", manifest, schema, shared)
        pairs.append((parsed.version("0" * 64), parsed))
    return compile_plan(pairs, schema, definitions)


def batches(count: int) -> tuple[EventSchema, list[tuple[EventColumns, NDArray[np.int64]]], int]:
    """The decoded micro-batches, each with the numbers of its customers, and how many customers there are in all."""
    types = ", ".join(f'"{name}"' for name in workload.TYPES)
    config = parse_config(f'[events]\ntypes = [{types}]\n[events.fields]\namount = "number"\n', Path.cwd())
    decoder, found, numbers = EventDecoder(config.events), [], dict[str, int]()
    for events in workload.generate(count):
        for start in range(0, len(events), BATCH):
            chosen = slice(start, start + BATCH)
            values, times_ms = events.values[chosen], events.times_ms[chosen]
            zeros = np.zeros(len(values), np.int64)
            decoded = decoder.decode(values, times_ms, zeros, np.arange(len(values))).events
            customers = [numbers.setdefault(customer, len(numbers)) for customer in decoded.customers]
            found.append((decoded, np.array(customers, np.int64)))
    return config.schema(), found, len(numbers)


def cpu_us(ways: list[Way], work: list[tuple[EventColumns, NDArray[np.int64]]]) -> tuple[float, int]:
    """CPU time of a pass, in µs an event, and the feature rows it gave."""
    seconds, rows = 0.0, 0
    for (events, customers), way in itertools.product(work, ways):
        taken, given = way.take(events, customers)
        seconds, rows = seconds + taken, rows + given
    return seconds * 1e6 / sum(len(events) for events, _ in work), rows


def main(quick: bool) -> harness.Result:
    schema, work, customers = batches(EVENTS_QUICK if quick else EVENTS)
    plans = {
        "one": [plan_of(1, schema)],
        "shared": [plan_of(MODELS, schema, turned=True)],
        "shared_one_order": [plan_of(MODELS, schema)],
        "apart": [plan_of(1, schema) for _ in range(MODELS)],
    }
    took: dict[str, list[float]] = {way: [] for way in plans}
    counted: dict[str, int] = {}
    for run in range(RUNS_QUICK if quick else RUNS):
        for way, made in plans.items():
            # A fresh state each time: the rows of a pass depend on what was folded before.
            us, rows = cpu_us([Way(plan, schema, customers) for plan in made], work)
            took[way].append(us)
            counted[way] = rows
            print(f"{way} {run}: {us:.2f} µs an event", file=sys.stderr)
    assert {counted[way] for way in plans if way != "one"} == {MODELS * counted["one"]}
    middle = {way: statistics.median(values) for way, values in took.items()}
    detail = {
        "us_per_event": {way: round(value, 3) for way, value in middle.items()},
        "runs_us_per_event": {way: [round(value, 3) for value in values] for way, values in took.items()},
        "cost_ratio_one_order": round(middle["shared_one_order"] / middle["one"], 3),
        "apart_ratio": round(middle["apart"] / middle["one"], 3),
        "models": MODELS,
        "features": len(FEATURES),
        "events": sum(len(events) for events, _ in work),
    }
    return harness.Result({"cost_ratio": round(middle["shared"] / middle["one"], 3)}, detail)
