"""Simulate a whole cluster under faults, each run from one seed.

Exits 1 when an invariant broke, with every seed that broke one and what happened last in the first of them. With
--mutations it makes known mistakes in the cores, one at a time, and exits 1 when one of them breaks nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from sim_mutations import MUTATIONS, seeds_until_caught  # noqa: E402
from sim_world import Outcome, simulate  # noqa: E402

COUNTED = ("commits", "owner_changes", "restores", "faults", "flips")
SEEDS_A_CHUNK = 10


def run_seed(task: tuple[int, int]) -> tuple[int, Outcome | str]:
    """What became of one seed; as text what it broke."""
    seed, steps = task
    try:
        return seed, simulate(seed, steps)
    except Exception as failure:
        notes = "\n".join(getattr(failure, "__notes__", ()))
        return seed, f"{type(failure).__name__}: {failure}\n{notes}"


def run_seeds(seeds: range, steps: int, workers: int) -> Iterator[tuple[int, Outcome | str]]:
    tasks: Iterable[tuple[int, int]] = ((seed, steps) for seed in seeds)
    if workers == 1:
        yield from map(run_seed, tasks)
        return
    with multiprocessing.Pool(workers) as pool:
        yield from pool.imap(run_seed, tasks, SEEDS_A_CHUNK)


def hold(seeds: range, steps: int, workers: int) -> bool:
    started = time.monotonic()
    total, broken = dict.fromkeys(COUNTED, 0), []
    for seed, outcome in run_seeds(seeds, steps, workers):
        if isinstance(outcome, Outcome):
            for name in COUNTED:
                total[name] += getattr(outcome, name)
            continue
        print(outcome if not broken else outcome.partition("\n")[0], file=sys.stderr, flush=True)
        broken.append(seed)
    seconds = time.monotonic() - started
    if broken:
        print(f"{len(broken)} of {len(seeds)} seeds broke an invariant in {seconds:.1f} s: {broken}", file=sys.stderr)
        return False
    print(f"{len(seeds)} seeds hold in {seconds:.1f} s: {total}")
    return True


def all_caught(steps: int, seeds_max: int) -> bool:
    missed = 0
    print(f"{'mutation':<26} {'seeds':>5}  what is done wrong, and what that broke")
    for mutation in MUTATIONS:
        found = seeds_until_caught(mutation, steps, seeds_max)
        missed += found is None
        seeds, why = found or (f">{seeds_max}", "NOTHING")
        print(f"{mutation.name:<26} {seeds:>5}  {mutation.what}: {why[:60]}", flush=True)
    print(f"{len(MUTATIONS) - missed} of {len(MUTATIONS)} mutations are caught within {seeds_max} seeds")
    return missed == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=200, help="steps of 100 ms with faults; then all is healed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds from the first on")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the seeds")
    parser.add_argument("--mutations", action="store_true", help="make mistakes on purpose: each must be caught")
    parser.add_argument("--seeds-max", type=int, default=1000, help="seeds in which a mistake must be caught")
    options = parser.parse_args()
    if options.mutations:
        return 0 if all_caught(options.steps, options.seeds_max) else 1
    seeds = range(options.seed, options.seed + options.seeds)
    return 0 if hold(seeds, options.steps, options.workers) else 1


if __name__ == "__main__":
    sys.exit(main())
