"""What is wrong with a config beside its text: what only those know who will use it, tried by `headrace check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from node.config_sections import Config
from node.kernel.errors import ConfigError


def use_problems(config: Config) -> list[str]:
    """Each mistake that would end `headrace run`, one line. Nothing is imported for what the config does not use."""
    problems: list[str] = []
    for attempt in _attempts(config):
        try:
            attempt()
        except ConfigError as error:
            problems += error.problems
    return problems


def _attempts(config: Config) -> Iterator[Callable[[], object]]:
    if config.profile:
        from tenants.expression import evaluate_profile

        yield partial(evaluate_profile, config.schema())
    if config.cluster is not None and config.cluster.snapshot_url:
        from replication.snapshot_store import look_up_driver

        yield partial(look_up_driver, config.cluster.snapshot_url)
