"""What is shown: stages with progress, a live table of the stream, the result; plain lines where it is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from demonstration.figures import Figures, TenantFigures
from demonstration.results import Quality
from node.kernel.types import ModelName

PLAIN_LINE_SECONDS = 5.0
PLAIN_COLUMNS = 120

Advance = Callable[[int], None]


class Screen:
    """`console` is where it goes; a terminal gets what moves."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._plain = not console.is_terminal
        self._said = 0.0
        self._told: Mapping[ModelName, int] = {}

    def say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    @contextmanager
    def stage(self, what: str, total: int | None = None) -> Iterator[Advance]:
        """A step of the preparation; the caller tells the progress, if `total` is known."""
        started = time.monotonic()
        if self._plain:
            self.say(f"{what} …")
            yield lambda _: None
        else:
            columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
            if total is not None:
                columns.insert(3, MofNCompleteColumn())
            with Progress(*columns, console=self._console, transient=True) as progress:
                task = progress.add_task(what, total=total)
                yield lambda count: progress.advance(task, count)
        self.say(f"{what}: {time.monotonic() - started:.1f} s")

    @contextmanager
    def stream(self, addresses: Sequence[str]) -> Iterator[Callable[[Figures], None]]:
        """The caller shows the figures as they change."""
        if self._plain:
            for address in addresses:
                self.say(address)
            yield self._say_figures
            return
        with Live(console=self._console, refresh_per_second=4) as live:
            yield lambda figures: live.update(stream_view(figures, addresses))

    def _say_figures(self, figures: Figures) -> None:
        now = time.monotonic()
        if now - self._said < PLAIN_LINE_SECONDS or figures.inferences == self._told:
            return
        self._said, self._told = now, figures.inferences
        shares = ", ".join(
            f"{name.tenant} {figures.inferences[name]:,} ({_share(figures.node.tenants.get(name.tenant))} CPU)"
            for name in figures.inferences
        )
        self.say(
            f"{figures.phase} {figures.day}: {figures.node.processed:,} of {figures.total:,} events, "
            f"{figures.events_per_s:,.0f}/s, lag {figures.lag:,}; inferences: {shares}"
        )

    def result(
        self, figures: Figures, seconds: float, qualities: Mapping[ModelName, Quality], report: Mapping[str, Any]
    ) -> None:
        rate = figures.node.processed / seconds if seconds else 0.0
        self.say(
            f"{figures.node.processed:,} events in {seconds:.1f} s ({rate:,.0f}/s), {figures.dead_letters:,} dead "
            f"letters, {figures.node.shed:,} sheds, {report['missing']:,} missing, "
            f"delivery {figures.node.delivery.replace('_', ' ')}"
        )
        self._console.print(quality_view(figures, qualities), width=PLAIN_COLUMNS if self._plain else None)
        tables, lists, rows = report["tables"], report["lists"], report["training_rows"]
        versions = ", ".join(f"{count:,} by {version}" for version, count in tables["inferences_by_version"].items())
        self.say(
            f"catalogue flipped half-way: inferences {versions}; {tables['mixed']} mixed, {tables['unnamed']} name none"
        )
        self.say(
            f"weekly lists: {lists['finished']} runs over a partition, {lists['late']} late, {lists['skipped']} weeks "
            f"skipped, {lists['missing']} inferences missing, {lists['left_out']} households left out"
        )
        for name, users in report["shared_features"].items():
            self.say(f"{name} is used by {', '.join(users)}")
        self.say(
            f"training rows: {rows['exported']:,} exported, {rows['compared']:,} computed anew, "
            f"{rows['different']:,} different"
        )
        for problem in report["problems"]:
            self.say(f"PROBLEM: {problem}")


def stream_view(figures: Figures, addresses: Sequence[str]) -> Group:
    head = Text.assemble(
        (figures.phase, "bold"),
        f"  {figures.day}  {figures.node.processed:,} of {figures.total:,} events  ",
        (f"{figures.events_per_s:,.0f}/s", "bold"),
        f"  lag {figures.lag:,}  dead letters {figures.dead_letters:,}  sheds {figures.node.shed:,}",
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("tenant", "model", "inferences", "/s", "CPU share", "CPU s", "queued", "worker"):
        table.add_column(heading, justify="left" if heading in ("tenant", "model", "worker") else "right")
    for name, count in figures.inferences.items():
        tenant = figures.node.tenants.get(name.tenant)
        shown = tenant or TenantFigures()
        table.add_row(
            name.tenant,
            name.model,
            f"{count:,}",
            f"{figures.inferences_per_s[name]:,.0f}",
            _share(tenant),
            f"{shown.cpu_seconds:.1f}",
            f"{shown.rows_queued:,}",
            shown.worker,
        )
    reasons = [Text(reason, style="yellow") for reason in figures.node.reasons]
    bar = ProgressBar(total=max(1, figures.total), completed=figures.node.processed, width=60)
    return Group(head, bar, table, *reasons, *(Text(address, style="dim") for address in addresses))


def quality_view(figures: Figures, qualities: Mapping[ModelName, Quality]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    for heading in ("model", "inferences", "judged", "came true", "AUC", "average precision"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, quality in qualities.items():
        table.add_row(
            str(name),
            f"{figures.inferences[name]:,}",
            f"{quality.judged:,}",
            "" if quality.positive_share is None else f"{quality.positive_share:.1%}",
            *("" if value is None else f"{value:.3f}" for value in (quality.auc, quality.average_precision)),
        )
    return table


def _share(tenant: TenantFigures | None) -> str:
    return "" if tenant is None or tenant.cpu_share is None else f"{tenant.cpu_share:.0%}"
