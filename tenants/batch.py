"""Submissions and the batches made of them: rows gathered for a call, outputs scattered back in order."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from node.kernel.types import FeatureRows, Floats, Ints, ModelOutputs
from tenants.failure_rate import FailureRate
from tenants.isolation import Isolation
from tenants.scheduler import Part


@dataclass(slots=True, eq=False)
class Submission:
    """Rows handed in together; `future` is set once each has an output or an error."""

    rows: FeatureRows
    future: asyncio.Future[ModelOutputs]
    outputs: int
    left: int
    values: Floats | None = None
    errors: dict[int, str] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    call_seconds: float = 0.0

    def answer(self, places: slice | Ints, values: Floats | None, errors: Mapping[int, str], share: float) -> None:
        """Outputs for the rows at `places` (None: none), `errors` by row of the submission; `share` CPU seconds."""
        in_order = isinstance(places, slice)
        count = places.stop - places.start if isinstance(places, slice) else len(places)
        self.left -= count
        self.cpu_seconds += share
        self.errors.update(errors)
        if values is not None and in_order and count == len(self.rows):
            self.values = values
        elif values is not None:
            if self.values is None:
                self.values = np.full((len(self.rows), self.outputs), np.nan)
            self.values[places] = values
        if self.left == 0 and not self.future.done():
            given = self.values if self.values is not None else np.full((len(self.rows), self.outputs), np.nan)
            self.future.set_result(ModelOutputs(given, self.errors, self.cpu_seconds, self.call_seconds))

    def fail(self, reason: str) -> None:
        """Answer every row that has no answer yet with `reason`."""
        if not self.future.done():
            values = self.values if self.values is not None else np.full((len(self.rows), self.outputs), np.nan)
            unanswered = ~np.isfinite(values).all(axis=1)
            errors = {int(row): self.errors.get(int(row), reason) for row in np.flatnonzero(unanswered)}
            self.left = 0
            self.future.set_result(ModelOutputs(values, errors, self.cpu_seconds, self.call_seconds))


@dataclass(slots=True, eq=False)
class Piece:
    """Rows out of a batch that failed, to be run by themselves.

    Row i is row `places[i]` of `owners[which[i]]`. `losses` counts the workers that these very rows took along.
    """

    rows: FeatureRows
    owners: Sequence[Submission]
    which: Ints
    places: Ints
    isolation: Isolation | None = None
    losses: int = 0

    def take(self, positions: Ints, losses: int = 0, isolation: Isolation | None = None) -> Piece:
        texts = {name: [column[position] for position in positions] for name, column in self.rows.texts.items()}
        rows = FeatureRows(self.rows.names, np.ascontiguousarray(self.rows.numbers[positions]), texts)
        return Piece(rows, self.owners, self.which[positions], self.places[positions], isolation, losses)

    def answer(self, values: Floats | None, errors: Mapping[int, str], cpu_seconds: float) -> None:
        """`values` [rows, outputs] (None: none) and `errors` by row of this piece, to those who asked."""
        for number in np.unique(self.which):
            mine = np.flatnonzero(self.which == number)
            places = self.places[mine]
            of_mine = {int(self.places[row]): errors[row] for row in mine.tolist() if row in errors} if errors else {}
            share = cpu_seconds * len(mine) / len(self.which)
            self.owners[number].answer(places, None if values is None else values[mine], of_mine, share)

    @property
    def abandoned(self) -> bool:
        return all(owner.future.done() for owner in self.owners)


Ticket: TypeAlias = Submission | Piece


@dataclass(slots=True)
class Batch:
    """The rows of one dispatch and where each came from."""

    parts: Sequence[tuple[Ticket, int, int]]
    rows: FeatureRows

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Batch:
        placed: list[tuple[Ticket, int, int]] = []
        for part in parts:
            assert isinstance(part.ticket, Submission | Piece)
            placed.append((part.ticket, part.start, part.stop))
        return cls(placed, _gathered([_part_rows(*part) for part in placed]))

    @property
    def isolation(self) -> Isolation | None:
        """Of the batch that this is a piece of."""
        first = self.parts[0][0]
        return first.isolation if isinstance(first, Piece) else None

    def without_refused(self, rate: FailureRate) -> tuple[Batch | None, int]:
        """The batch without rows whose likes were refused in it before, None when none is left; how many those are."""
        first, isolation = self.parts[0][0], self.isolation
        if not isinstance(first, Piece) or isolation is None:
            return self, 0
        refused = isolation.refusals(first.rows)
        if refused:
            rows = np.array(sorted(refused))
            isolation.verdict.close(rate, len(rows), 0, 0)
            first.take(rows).answer(None, {at: refused[int(row)] for at, row in enumerate(rows)}, 0.0)
            left = np.setdiff1d(np.arange(len(first.rows)), rows)
            if not len(left):
                return None, len(refused)
            first = first.take(left, first.losses, isolation)
        isolation.calls_left -= 1
        return Batch([(first, 0, len(first.rows))], first.rows), len(refused)

    def answer(self, outputs: ModelOutputs, cpu_seconds: float, call_seconds: float = 0.0) -> None:
        offset = 0
        for ticket, start, stop in self.parts:
            for owner in ticket.owners if isinstance(ticket, Piece) else (ticket,):
                owner.call_seconds = max(owner.call_seconds, call_seconds)
            count = stop - start
            values = outputs.values[offset : offset + count]
            errors = (
                {row - offset: text for row, text in outputs.errors.items() if offset <= row < offset + count}
                if outputs.errors
                else {}
            )
            share = cpu_seconds * count / len(self.rows)
            if isinstance(ticket, Piece):
                ticket.answer(values, errors, share)
            else:
                moved = {row + start: text for row, text in errors.items()} if errors else errors
                ticket.answer(slice(start, stop), values, moved, share)
            offset += count

    def piece(self) -> Piece:
        """The same rows as one piece; a batch that is one already, itself."""
        first = self.parts[0][0]
        if isinstance(first, Piece):
            return first
        owners = [ticket for ticket, _, _ in self.parts if isinstance(ticket, Submission)]
        sizes = [stop - start for _, start, stop in self.parts]
        which = np.repeat(np.arange(len(owners)), sizes)
        places = np.concatenate([np.arange(start, stop) for _, start, stop in self.parts])
        return Piece(self.rows, owners, which, places)


def _part_rows(ticket: Ticket, start: int, stop: int) -> FeatureRows:
    return ticket.rows if start == 0 and stop == len(ticket.rows) else ticket.rows.take(slice(start, stop))


def _gathered(pieces: Sequence[FeatureRows]) -> FeatureRows:
    if len(pieces) == 1:
        return pieces[0]
    names = pieces[0].names
    texts: dict[str, list[str | None]] = {
        name: [text for piece in pieces for text in piece.texts[name]] for name in pieces[0].texts
    }
    return FeatureRows(names, np.concatenate([piece.numbers for piece in pieces]), texts)


def fail(ticket: object, reason: str) -> int:
    """Answer the ticket's rows with `reason`; how many."""
    if isinstance(ticket, Piece):
        ticket.answer(None, dict.fromkeys(range(len(ticket.rows)), reason), 0.0)
        return len(ticket.rows)
    assert isinstance(ticket, Submission)
    count = ticket.left
    ticket.fail(reason)
    return count
