"""`scripts/bench/run NAME`: runs the benchmark of that name and prints its envelope as the last line.

A benchmark is a module beside this one with `AIMS`, a mapping of aims such as {"p99_ms": "<= 50"}, and
`main(quick: bool) -> harness.Result`. What it has to say meanwhile goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path

import harness

SHARED = ("dispatch", "harness", "workload")


def benchmarks() -> list[str]:
    """The modules beside this one that define AIMS, with dashes in their names."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem not in SHARED)
    return [path.stem.replace("_", "-") for path in files if "\nAIMS" in path.read_text()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench/run", description="Run one benchmark.")
    parser.add_argument("name", choices=benchmarks(), metavar="NAME", help=f"one of: {', '.join(benchmarks())}")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, the last line")
    parser.add_argument("--quick", action="store_true", help="a smoke run of the same code: its figures mean little")
    given = parser.parse_args()
    module = importlib.import_module(given.name.replace("-", "_"))
    # Only the envelope goes to stdout, whatever a benchmark or library prints.
    with contextlib.redirect_stdout(sys.stderr):
        result = module.main(given.quick)
        found = harness.envelope(given.name, module.AIMS, result, given.quick)
        line = json.dumps(found, allow_nan=False, indent=None if given.json else 2)
    print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
