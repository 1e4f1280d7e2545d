"""What filtered windows count does not depend on which models' versions are live meanwhile."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_cycle import Parts
from test_fold import STEPS_MS, TYPES, bits, columns

from node.config import Config, parse_config
from node.kernel.ports import FeaturePlan
from node.state.codec import pack, unpack
from node.state.fold import filters_of
from node.state.layout import Layout
from tenants.definitions import NOTHING_SHARED
from tenants.manifest import parse_manifest
from tenants.staged_plan import plan_of

sys.path.insert(0, str(Path(__file__).parent.parent))
from reference import Event, Reference

FIELDS = '[events.fields]\namount = "number"\nchannel = "text"\n'
SHOP = parse_config(f"[events]\ntypes = {[*TYPES]}\n{FIELDS}", Path.cwd())
FILTERS = {
    "event.channel == 'web'": lambda event: event.fields["channel"] == "web",
    "event.amount > 2": lambda event: event.fields["amount"] > 2,
    "event.type != 'search'": lambda event: event.type != "search",
}
WEB, LARGE, BOUGHT = FILTERS
VERSIONS = (
    (f"count(transaction, '1h', where={WEB})", f"std(any.amount, '1d', where={LARGE})"),
    (f"sum(any.amount, where={BOUGHT})", "count(any, '1h')"),
    (f"last(transaction.amount, session='5m', where={WEB})", f"max(search.amount, '1h', where={LARGE})"),
    (),
)
"""Features of a model's versions."""


def version_with(config: Config, expressions: Sequence[str]) -> FeaturePlan:
    schema = config.schema()
    features = [f'f{number} = "{text}"' for number, text in enumerate(expressions)] or ['time = "event.time"']
    text = "\n".join(['on = ["transaction"]', "[features]", *features])
    manifest = parse_manifest("a/m.toml", "a", "m", text.encode(), schema)
    return plan_of([(manifest.version("0" * 64), manifest)], [], schema, NOTHING_SHARED)


class Partition:
    """Rows that real cycles' plans and folds change, beside the plain program that has seen the same events."""

    def __init__(self, config: Config = SHOP) -> None:
        self.parts, self.stored = Parts(config=config), dict[str, bytes]()
        self.reference = Reference(FILTERS)

    def restart(self, config: Config) -> None:
        self.parts = Parts(self.parts.state.layout, config)

    def see(self, newest: FeaturePlan, events: Sequence[Event], fields: Sequence[str] = ("amount", "channel")) -> None:
        """All values of the newest plan as of each event."""
        self.parts.newest = newest
        plan = self.parts.cycle._plan()
        assert plan is newest
        self.reference.ask(list(plan.aggregates))
        batch = columns(list(events))
        batch.fields = {name: column for name, column in batch.fields.items() if name in fields}
        rows = unpack(self.parts.state.layout, [self.stored.get(name) for name in batch.customers])
        found = self.parts.cycle._fold(plan, rows, batch, np.ones(len(events), np.bool_)).values
        self.stored.update(zip(batch.customers, pack(rows), strict=True))
        expected = [self.reference.see(event) for event in events]
        for aggregate in plan.aggregates:
            due = [values[aggregate] for values in expected]
            assert [bits(value) for value in found[aggregate].tolist()] == [bits(one) for one in due], str(aggregate)


@pytest.mark.parametrize("seed", range(20))
async def test_filtered_windows_are_right_after_any_versions_came_between(seed: int) -> None:
    """Rollbacks, fallbacks, canaries that come and go, models that are gone and come back."""
    chance, partition = random.Random(seed), Partition()
    versions = [version_with(SHOP, texts) for texts in VERSIONS]
    time_ms = 1_700_000_000_000
    for _ in range(12):
        events = []
        for _ in range(chance.randrange(1, 12)):
            time_ms += chance.choice(STEPS_MS)
            fields = {"amount": float(chance.randrange(5)), "channel": chance.choice((None, "web", "shop"))}
            kind = chance.choice(TYPES)
            events.append(Event(chance.choice("abc"), kind, time_ms, fields))
        partition.see(chance.choice(versions), events)


async def test_a_filter_whose_field_is_not_declared_any_more_stops_nobody_and_goes_on_once_it_is() -> None:
    without = parse_config(f"[events]\ntypes = {[*TYPES]}\n[events.fields]\namount = 'number'\n", Path.cwd())
    partition, time_ms = Partition(), 1_700_000_000_000

    def bought(count: int, channel: str) -> list[Event]:
        return [Event("a", "transaction", time_ms, {"amount": 3.0, "channel": channel}) for _ in range(count)]

    partition.see(version_with(SHOP, VERSIONS[0]), bought(3, "web"))
    partition.restart(without)
    partition.see(version_with(without, VERSIONS[0][1:]), bought(3, "missing"), fields=["amount"])
    partition.restart(SHOP)
    partition.see(version_with(SHOP, VERSIONS[0]), bought(3, "web"))


def test_a_filter_of_event_types_that_do_not_come_is_not_evaluated() -> None:
    layout = Layout.empty()
    for version in VERSIONS:
        layout = layout.grown(version_with(SHOP, version).aggregates, ())

    def filters(*kinds: str) -> set[str]:
        events = [Event("a", kind, 0, {"amount": 3.0, "channel": None}) for kind in kinds]
        return filters_of(layout, columns(events), TYPES)

    assert filters() == set()
    assert filters("search") == {LARGE, BOUGHT}
    assert filters("add_to_cart", "search") == {LARGE, BOUGHT}
    assert filters("transaction") == {WEB, LARGE, BOUGHT}
