"""The demo's command line; `scripts/demo` makes the environment and starts it."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import signal
import sys
import tempfile
from pathlib import Path

import structlog
from rich.console import Console

from demonstration.settings import Settings


def parse(arguments: list[str]) -> Settings:
    """Exits with a line that says what is wrong with them."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Stream a real year of shopping through a node that runs three tenants' models.",
    )
    parser.add_argument("--once", action="store_true", help="end when the stream ends; else the node stays up")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rate", type=_rate, metavar="N", help="at most N events a second")
    parser.add_argument("--kafka", type=_address, metavar="HOST:PORT", help="a real broker instead of the embedded one")
    parser.add_argument("--events", type=_count, metavar="N", help="stream only the first N, for a quick look")
    given = parser.parse_args(arguments)
    return Settings(given.once, given.json, given.rate, given.kafka, given.events)


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a rate; give events a second, more than 0")
    return rate


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of events; give a whole number from 1")
    return int(text)


def _address(text: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"{text} is not HOST:PORT")
    return text


def _quieten() -> None:
    """What the Kafka client logs while a broker starts or stops is no news here; what fails is raised."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


def main() -> int:
    settings = parse(sys.argv[1:])
    # With --json, standard output is for the one object.
    console = Console(stderr=settings.as_json, highlight=False)
    _quieten()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from demonstration.run import run  # brings pandas and scikit-learn: a wrong argument is told without them
    from demonstration.screen import Screen
    from node.kernel.errors import HeadraceError

    try:
        with tempfile.TemporaryDirectory(prefix="headrace-demo-") as folder:
            outcome = run(settings, Screen(console), Path(folder))
    except HeadraceError as error:
        console.print(f"demo: {error}", markup=False, soft_wrap=True)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("demo: stopped")
        return 130
    if settings.as_json:
        print(json.dumps(outcome.report), flush=True)
    return 1 if outcome.report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
