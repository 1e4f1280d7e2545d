"""The node's config for the demo, and what the demo itself is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass

from demonstration.data import FIELDS, TYPES

PARTITIONS = 4
CYCLE_EVENTS = 4096
BATCH_EVENTS = PARTITIONS * CYCLE_EVENTS
"""Events, over all partitions, that the node sees as one step in time when it is as busy as it can be."""
WARM_UP_DAYS = 31
"""Events before the streamed part that are streamed too, uncounted in the quality: else every window starts empty."""


@dataclass(frozen=True)
class Settings:
    """The command line."""

    once: bool = False
    as_json: bool = False
    rate: float | None = None
    """Events a second; None: as fast as the node takes them."""
    kafka: str | None = None
    """HOST:PORT of a real broker; None: the embedded one."""
    events: int | None = None
    """Stream only so many, for a smoke run; None: all."""


@dataclass(frozen=True)
class Topics:
    """Names of one run, so that runs on one broker don't meet."""

    application: str

    @property
    def events(self) -> str:
        return f"{self.application}.events"

    @property
    def inferences(self) -> str:
        return f"{self.application}.inferences"

    @property
    def changelog(self) -> str:
        return f"{self.application}.changelog"

    @property
    def dead_letters(self) -> str:
        return f"{self.application}.dead-letters"

    @property
    def all(self) -> tuple[str, ...]:
        return self.events, self.inferences, self.changelog, self.dead_letters, f"{self.application}.rows"


def node_config(address: str, topics: Topics, http_port: int) -> str:
    """The TOML text; its paths are relative to the folder it goes to."""
    fields = "\n".join(f'{name} = "{kind}"' for name, kind in FIELDS.items())
    return f"""\
# Written by scripts/demo. `headrace check --config` explains it.
[node]
name = "demo"
data_dir = "data"
log_format = "console"

[kafka]
bootstrap = [{json.dumps(address)}]
topics = ["{topics.events}"]
application = "{topics.application}"

[cycle]
events_max = {CYCLE_EVENTS}

[events]
types = {json.dumps(list(TYPES))}
customer = "household"
unknown_types = "dead_letter"

[events.fields]
{fields}

[profile]
baskets = "count(basket)"
spent = "sum(basket.amount)"
saved = "sum(basket.retail_discount)"
redeemed = "count(coupon_redemption)"

[tenants]
directory = "tenants"
rows_queued_max = 65536

[http]
port = {http_port}
"""
