"""How tenants' files say durations, and how messages about them quote a name and guess what was meant."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Final

_UNITS_MS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 7 * 86_400_000}
_DURATION: Final = re.compile(r"([0-9]{1,15})(ms|s|m|h|d|w)")
_COMPARED_CHARACTERS: Final = 64
_COMPARED_NAMES: Final = 4
_NEAR_RATIO: Final = 0.6


def parse_duration(text: str, ms_max: int, *, milliseconds: bool = False) -> int:
    """'90s', '5m', '1h', '7d', '2w' (and '250ms' if asked) -> milliseconds. Raises ValueError with the reason."""
    match = _DURATION.fullmatch(text)
    if match is None or (match[2] == "ms" and not milliseconds):
        example = "'250ms' or '5s'" if milliseconds else "'90s', '5m', '1h', '7d' or '2w'"
        raise ValueError(f"{shown(text)} is not a duration; write a whole number and a unit, such as {example}")
    duration_ms = int(match[1]) * _UNITS_MS[match[2]]
    if not 0 < duration_ms <= ms_max:
        raise ValueError(f"{shown(text)} must be more than 0 and at most {_longest(ms_max)}")
    return duration_ms


def _longest(duration_ms: int) -> str:
    unit = next(unit for unit in ("d", "h", "m", "s", "ms") if duration_ms % _UNITS_MS[unit] == 0)
    return f"{duration_ms // _UNITS_MS[unit]}{unit}"


def shown(value: object) -> str:
    """A name or value as it stands in a message: quoted, on one line, not endless."""
    if isinstance(value, list | dict):  # Nested too deeply, these can't be written out.
        return "a list" if isinstance(value, list) else "a table"
    if isinstance(value, int) and abs(value) >= 1 << 64:  # Nor can integers of thousands of digits.
        return "a number far too large"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(text: str) -> str:
    """Foreign text, such as a parser's message, as one printable line."""
    return text if text.isprintable() else ascii(text)[1:-1]


def suggestion(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?`, or what there is to choose from when nothing is near."""
    choices = sorted(known)
    near = _nearest(name, choices)
    if near:
        return f", did you mean {shown(near)}?"
    if not choices:
        return "; there are none"
    return "; known: " + ", ".join(map(shown, choices[:8])) + (", …" if len(choices) > 8 else "")


def _nearest(name: str, choices: Iterable[str]) -> str:
    """'' where none is near. difflib takes a millisecond for two long names, so it compares the likeliest only: a file
    may have many mistakes, and as many names to choose from, and the node's loop waits for the answer."""
    pairs, start = _pairs(name), name[:_COMPARED_CHARACTERS]

    def likeness(choice: str) -> float:
        others = _pairs(choice)
        return len(pairs & others) / (len(pairs) + len(others))

    likeliest = heapq.nlargest(_COMPARED_NAMES, choices, key=likeness)
    ratios = [(SequenceMatcher(None, start, one[:_COMPARED_CHARACTERS]).ratio(), one) for one in likeliest]
    ratio, near = max(ratios, key=lambda found: found[0], default=(0.0, ""))
    return near if ratio >= _NEAR_RATIO else ""


@lru_cache(maxsize=2048)
def _pairs(text: str) -> frozenset[str]:
    """Its neighbouring characters, its start and its end."""
    framed = f" {text[:_COMPARED_CHARACTERS]} "
    return frozenset(framed[place : place + 2] for place in range(len(framed) - 1))
