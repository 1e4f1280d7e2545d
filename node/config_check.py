"""What is wrong with a config beside its text: what only those know who will use it, tried by `headrace check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from node.config import problems_of
from node.config_sections import Config


def use_problems(config: Config) -> list[str]:
    """Each mistake that would end `headrace run`, one line. Nothing is imported for what the config does not use."""
    return [problem for attempt in _attempts(config) for problem in problems_of(attempt)]


def _attempts(config: Config) -> Iterator[Callable[[], object]]:
    if config.profile:
        from tenants.expression import evaluate_profile

        yield partial(evaluate_profile, config.schema())
    if config.cluster is not None and config.cluster.snapshot_url:
        from replication.snapshot_store import look_up_driver

        yield partial(look_up_driver, config.cluster.snapshot_url)
