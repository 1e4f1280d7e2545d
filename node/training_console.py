"""`headrace export training` and `headrace check-training`: over the topics, whatever the nodes do meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from node.app import client_options
from node.kernel.clock import SystemClock
from node.kernel.types import ModelName
from node.training.fed_rows import FedRows
from node.training.files import TrainingFiles
from node.training.reader import RowReader
from node.training.row_log import picked

if TYPE_CHECKING:
    from node.config_sections import Config


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows of a model with an event time (or end of the interval) from `from_ms` up to, not including, `to_ms`.

    `version`: the first digits of the only one wanted; '': all.
    """

    model: ModelName
    from_ms: int
    to_ms: int
    version: str = ""

    def of(self, rows: FedRows) -> FedRows | None:
        """Those of the rows that are wanted; None: none."""
        if not rows.triggers.version.startswith(self.version):
            return None
        times_ms = rows.triggers.times_ms
        inside = (times_ms >= self.from_ms) & (times_ms < self.to_ms)
        if inside.all():
            return rows if len(rows) else None
        return picked(rows, np.flatnonzero(inside)) if inside.any() else None


@contextlib.contextmanager
def progress(what: str) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield bar, bar.add_task(what, total=None)


async def export(config: Config, wanted: Wanted, folder: Path) -> list[str]:
    """Write the files; lines for the operator. Raises ExportFailed, BrokerUnavailable, TopicMissing, StateCorrupt."""
    with TrainingFiles(folder) as files, progress(f"rows of {wanted.model}") as (bar, task):
        async for partition, rows in rows_of(config, wanted, bar, task):
            files.add(rows, partition)
        written = files.finish()
    if not written:
        return [
            f"{wanted.model}: no rows in {folder}; a model's rows are kept from when its manifest says log_rows, "
            "and until [kafka] rows_retention_h and rows_retention_mb delete them"
        ]
    return [f"{folder}/{file}: {rows:,} rows" for file, rows in written.items()]


async def rows_of(config: Config, wanted: Wanted, bar: Progress, task: TaskID) -> AsyncIterator[tuple[int, FedRows]]:
    """What is wanted, with its partition; in order within one."""
    async with RowReader(client_options(config.kafka, "headrace-export"), config.kafka.rows_topic, SystemClock()) as it:
        numbers = await it.partitions()
        for place, partition in enumerate(numbers):

            def passed(done: int, total: int, before: int = place) -> None:
                bar.update(task, completed=before * total + done, total=len(numbers) * total)

            async for record in it.records(partition, wanted.model, passed):
                rows = wanted.of(record) if isinstance(record, FedRows) else None
                if rows is not None:
                    yield partition, rows
