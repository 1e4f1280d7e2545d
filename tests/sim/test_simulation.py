"""Thousands of seeds of a whole cluster under faults, and the mistakes they must show; `scripts/sim` runs more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sim_checks import InvariantBroken
from sim_mutations import MUTATIONS, Mutation, seeds_until_caught
from sim_world import Outcome, World, simulate

STEPS = 200
SEEDS = 2500
SEEDS_A_TEST = 250
MUTATED_SEEDS_MAX = 300


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_TEST))
def test_invariants_hold(first: int) -> None:
    outcomes = [simulate(seed, STEPS) for seed in range(first, first + SEEDS_A_TEST)]
    assert sum(outcome.commits == 0 for outcome in outcomes) == 0
    changes = [outcome.owner_changes for outcome in outcomes]
    assert sum(changes) > 5 * SEEDS_A_TEST, "owners change often, or nothing is tested"
    assert sum(outcome.restores for outcome in outcomes) > SEEDS_A_TEST
    assert sum(outcome.faults for outcome in outcomes) > 5 * SEEDS_A_TEST
    assert sum(outcome.flips for outcome in outcomes) > SEEDS_A_TEST, "of tables, though few seeds have any"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_mistake_breaks_an_invariant(mutation: Mutation) -> None:
    assert seeds_until_caught(mutation, STEPS, MUTATED_SEEDS_MAX) is not None
    simulate(0, STEPS)  # and it is gone again


def test_a_seed_gives_the_same_run_again() -> None:
    def run() -> tuple[Outcome, list[tuple[object, ...]]]:
        world = World(11)
        return world.run(100), list(world.trace)

    assert run() == run()


def test_a_broken_invariant_is_told_with_seed_and_events() -> None:
    (mutation,) = (mutation for mutation in MUTATIONS if mutation.name == "no fence")
    found = seeds_until_caught(mutation, STEPS, MUTATED_SEEDS_MAX)
    assert found is not None
    with mutation.made(), pytest.raises(InvariantBroken, match=r"(?s)\(c\).*the last events.*commit.*seed \d+"):
        simulate(found[0] - 1, STEPS)


def test_many_processes_share_the_seeds() -> None:
    program = Path(__file__).with_name("run_simulation.py")
    command = [sys.executable, str(program), "--seed", "7", "--seeds", "24", "--steps", "60", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("24 seeds hold")
