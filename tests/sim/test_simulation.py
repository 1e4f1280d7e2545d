"""Hundreds of seeds of a whole cluster under faults; `scripts/sim --seeds 5000` runs more."""

from __future__ import annotations

import pytest
from sim_broker import PartitionLog, Transaction
from sim_checks import InvariantBroken
from sim_world import Outcome, World, simulate

STEPS = 300
SEEDS_PER_TEST = 60


@pytest.mark.parametrize("first", range(0, 300, SEEDS_PER_TEST))
def test_invariants_hold(first: int) -> None:
    outcomes = [simulate(seed, STEPS) for seed in range(first, first + SEEDS_PER_TEST)]
    assert min(outcome.commits for outcome in outcomes) > 0
    changes = [outcome.owner_changes for outcome in outcomes]
    assert sum(changes) > 10 * SEEDS_PER_TEST, "owners change often, or nothing is tested"
    assert sum(outcome.restores for outcome in outcomes) > 0
    assert sum(outcome.faults for outcome in outcomes) > 5 * SEEDS_PER_TEST


def test_a_seed_gives_the_same_run_again() -> None:
    def run() -> tuple[Outcome, list[tuple[object, ...]]]:
        world = World(11)
        return world.run(100), list(world.trace)

    assert run() == run()


def test_a_broken_invariant_is_told_with_seed_and_events(monkeypatch: pytest.MonkeyPatch) -> None:
    def commit_whoever(log: PartitionLog, producer_epoch: int) -> int | None:
        del producer_epoch
        return fenced(log, log.producer_epoch)

    def send_whoever(log: PartitionLog, producer_epoch: int, transaction: Transaction) -> bool:
        del producer_epoch
        return sent(log, log.producer_epoch, transaction)

    fenced, sent = PartitionLog.commit, PartitionLog.send
    monkeypatch.setattr(PartitionLog, "commit", commit_whoever)
    monkeypatch.setattr(PartitionLog, "send", send_whoever)

    def many_seeds() -> None:
        for seed in range(200):
            simulate(seed, STEPS)

    with pytest.raises(InvariantBroken, match=r"(?s)\(c\).*the last events.*commit.*seed \d+"):
        many_seeds()
