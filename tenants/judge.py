"""(P) Whether a staged version goes on, stays where it is, or is rolled back: by what was seen of it.

A condition is judged once `rows_min` rows were seen; before that, a version is rolled back only when it has failed or
disagreed more often than `rows_min` rows may, whatever the rest of them gave. Agreement is judged likewise by the rows
that could be compared. What can't be known, such as a ratio to a live version that had no rows, is no reason against
it; nor is a canary's drift as far as it may be chance, since it answers other customers than the live version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tenants.comparison import Figures
from tenants.stage import Stage


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is what decided, with its figures; of "keep", what is waited for."""

    decision: Literal["promote", "keep", "roll back"]
    reason: str


def judge(stage: Stage, figures: Figures, seconds: float) -> Verdict:
    """`seconds`: for how long the version has been in this stage."""
    enough = figures.rows >= stage.rows_min
    compared = figures.compared >= stage.rows_min or stage.agreement_min is None
    against = [*(_broken(stage, figures) if enough else _failing(stage, figures)), *_disagreeing(stage, figures)]
    if against:
        return Verdict("roll back", f"in stage {stage}: {'; '.join(against)}")
    if not enough:
        return Verdict("keep", f"{figures.rows} of {stage.rows_min} rows seen")
    if not compared:
        return Verdict("keep", f"{figures.compared} of {stage.rows_min} rows compared")
    if seconds * 1000 < stage.time_min_ms:
        return Verdict("keep", f"{seconds:.0f} of {stage.time_min_ms / 1000:g} s passed")
    return Verdict("promote", f"stage {stage} held: {_told(stage, figures)}")


def _failing(stage: Stage, figures: Figures) -> Iterator[str]:
    """More rows than `rows_min` rows could make good, reckoned as it is once all of these were seen: by a product, a
    rate of 0.29 would not allow 29 of 100."""
    if figures.errors / stage.rows_min > stage.error_rate_max:
        yield (
            f"{figures.errors} of the first {figures.rows} rows failed, more than error_rate_max"
            f" {stage.error_rate_max:g} of {stage.rows_min}"
        )


def _disagreeing(stage: Stage, figures: Figures) -> Iterator[str]:
    apart, agreement, least = figures.compared - figures.agreed, figures.agreement, stage.agreement_min
    if least is None or agreement is None:
        return
    if figures.compared >= stage.rows_min:
        if agreement < least:
            yield f"agreement {agreement:.4g} is under agreement_min {least:g}"
    elif (stage.rows_min - apart) / stage.rows_min < least:
        yield (
            f"{apart} of the first {figures.compared} rows disagree, more than agreement_min"
            f" {least:g} of {stage.rows_min} allows"
        )


def _broken(stage: Stage, figures: Figures) -> Iterator[str]:
    if figures.error_rate > stage.error_rate_max:
        yield f"error rate {figures.error_rate:.4g} is over error_rate_max {stage.error_rate_max:g}"
    ratio, chance = figures.cost_ratio, figures.drift_chance if stage.kind == "canary" else 0.0
    if stage.drift_max is not None and figures.drift - chance > stage.drift_max:
        yield f"drift {figures.drift:.4g} is over drift_max {stage.drift_max:g}"
    if stage.p99_ms_max is not None and figures.p99_ms > stage.p99_ms_max:
        yield f"p99 of {figures.p99_ms:.4g} ms a call is over p99_ms_max {stage.p99_ms_max:g}"
    if stage.cost_ratio_max is not None and ratio is not None and ratio > stage.cost_ratio_max:
        yield f"a row costs {ratio:.4g} times the live version's, over cost_ratio_max {stage.cost_ratio_max:g}"


def _told(stage: Stage, figures: Figures) -> str:
    told = [f"{figures.rows} rows", f"error rate {figures.error_rate:.4g}"]
    if stage.kind == "shadow" and figures.agreement is not None:
        told.append(f"agreement {figures.agreement:.4g}")
    if figures.cost_ratio is not None:
        told.append(f"cost ratio {figures.cost_ratio:.3g}")
    return ", ".join([*told, f"drift {figures.drift:.3g}", f"p99 {figures.p99_ms:.3g} ms a call"])
