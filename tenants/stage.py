"""(P) The stages that a new version goes through beside the live one, as its manifest's `[rollout]` says them.

[rollout]
stages = [
    { stage = "shadow", rows_min = 5000, agreement_min = 0.98 },
    { stage = "canary", share = 0.1, time_min = "1h", error_rate_max = 0.001, p99_ms_max = 20 },
]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast, get_args

from node.kernel.limits import STAGE_MS_MAX, STAGE_ROWS_MAX, STAGES_MAX
from node.kernel.types import ModelName, StageKind
from tenants.wording import parse_duration, shown, suggestion

KINDS: Final = get_args(StageKind)


@dataclass(frozen=True, slots=True)
class Stage:
    """What a version has to show before it goes on; None: not asked for.

    `tolerance` is the difference of two numbers that still agree, of the live one's size where that is over 1.
    """

    kind: StageKind
    share: float = 0.0
    rows_min: int = 1000
    time_min_ms: int = 0
    error_rate_max: float = 0.01
    agreement_min: float | None = None
    tolerance: float = 0.01
    drift_max: float | None = None
    p99_ms_max: float | None = None
    cost_ratio_max: float | None = None

    def __str__(self) -> str:
        return self.kind if self.kind == "shadow" else f"canary {self.share:.3g}"


@dataclass(frozen=True, slots=True)
class Promote:
    """The staged `version`, if it still is in stage number `stage`, goes to its next one, or with `to_live` or after
    the last one is live. Of a node by itself: in a cluster the catalog is asked, as for `RollBack`."""

    name: ModelName
    version: str
    stage: int
    who: str
    reason: str
    at_ms: int
    to_live: bool = False


@dataclass(frozen=True, slots=True)
class RollBack:
    """The version, staged or live, must not run any more; of a live one, the one before it does again."""

    name: ModelName
    version: str
    who: str
    reason: str
    at_ms: int


_NUMBERS: Final[Mapping[str, tuple[float, float]]] = {
    "error_rate_max": (0.0, 1.0),
    "agreement_min": (0.0, 1.0),
    "tolerance": (0.0, 1e15),
    "drift_max": (0.0, 1.0),
    "p99_ms_max": (0.001, 1e9),
    "cost_ratio_max": (0.001, 1e9),
}
_ONLY: Final[Mapping[str, StageKind]] = {"share": "canary", "agreement_min": "shadow", "tolerance": "shadow"}
_KEYS: Final = ("stage", "share", "rows_min", "time_min", *_NUMBERS)


def parse_rollout(table: object, problem: Callable[[str], None]) -> tuple[Stage, ...]:
    """The stages of a manifest's `rollout` table; `problem` hears of each mistake, whose stage is left out."""
    if not isinstance(table, dict) or set(table) != {"stages"} or not isinstance(table["stages"], list):
        problem('rollout must hold one list: [rollout] stages = [{ stage = "shadow" }, …]')
        return ()
    listed = table["stages"]
    if not 1 <= len(listed) <= STAGES_MAX:
        problem(f"rollout has {len(listed)} stages; there must be 1 to {STAGES_MAX}, or no [rollout]")
        return ()
    return tuple(_stages(listed, problem))


def _stages(listed: list[Any], problem: Callable[[str], None]) -> Iterator[Stage]:
    share = 0.0
    for number, given in enumerate(listed, 1):
        place = f"rollout stage {number}"
        if not isinstance(given, dict) or given.get("stage") not in KINDS:
            problem(f'{place} must be a table with stage = "shadow" or "canary"')
            continue
        told: list[str] = []
        stage = _stage(given, told.append)
        if not told and stage.kind == "canary" and stage.share < share:
            told.append(f"share must not be below {share:g}, that of the stage before: a customer stays where it is")
        share = max(share, stage.share)
        for text in told:
            problem(f"{place}: {text}")
        if not told:
            yield stage


def _stage(given: Mapping[str, Any], problem: Callable[[str], None]) -> Stage:
    kind = cast("StageKind", given["stage"])
    for key in given:
        if key not in _KEYS:
            problem(f"unknown key {shown(key)}" + suggestion(key, _KEYS))
        elif _ONLY.get(key, kind) != kind:
            problem(f"{key} says nothing of a {kind}: only a {_ONLY[key]} has it")
    values: dict[str, Any] = {}
    for key, (least, most) in _NUMBERS.items():
        if key in given:
            values[key] = _number(given[key], key, least, most, problem)
    if kind == "canary":
        values["share"] = _number(given.get("share"), "share", 1e-4, 1.0, problem)
    if "rows_min" in given:
        values["rows_min"] = int(_number(given["rows_min"], "rows_min", 1, STAGE_ROWS_MAX, problem))
    if "time_min" in given:
        values["time_min_ms"] = _duration(given["time_min"], problem)
    return Stage(kind, **values)


def _number(value: object, key: str, least: float, most: float, problem: Callable[[str], None]) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
        return float(value)
    problem(f"{key} must be a number from {least:g} to {most:g}, not {shown(value)}")
    return least


def _duration(value: object, problem: Callable[[str], None]) -> int:
    if not isinstance(value, str):
        problem(f"time_min must be a duration in quotes such as '10m', not {shown(value)}")
        return 0
    try:
        return parse_duration(value, STAGE_MS_MAX, milliseconds=True)
    except ValueError as error:
        problem(f"time_min {error}")
        return 0
