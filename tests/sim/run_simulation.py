"""The simulator on the command line: `scripts/sim --seed N --steps M [--seeds K]`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from sim_checks import InvariantBroken  # noqa: E402
from sim_world import simulate  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=300, help="steps of 100 ms with faults; then all is healed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, one after the other")
    options = parser.parse_args()
    started = time.monotonic()
    total = dict.fromkeys(("commits", "owner_changes", "restores", "faults"), 0)
    for seed in range(options.seed, options.seed + options.seeds):
        try:
            outcome = simulate(seed, options.steps)
        except InvariantBroken as broken:
            print(broken, file=sys.stderr)
            return 1
        for name in total:
            total[name] += getattr(outcome, name)
    print(f"{options.seeds} seeds hold in {time.monotonic() - started:.1f} s: {total}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
