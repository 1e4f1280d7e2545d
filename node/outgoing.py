"""(P) What a cycle sends: inference records, dead letters and the counts that go with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from node.backlog import Answer
from node.batches import Headers
from node.inferences import encode_inferences
from node.ingest.dead_letter import Reason, dead_letter_record, model_failure_value
from node.ingest.decode import Decoded
from node.kernel.limits import COUNTERS_FORMER_MAX
from node.kernel.types import OTHER, DeadLetter, EventNames, EventSchema, ModelName

LetterRecord = tuple[bytes | None, bytes | None, Headers]


@dataclass(frozen=True, slots=True)
class Origin:
    """What is the same for all records of one partition."""

    node: str
    topics: Sequence[str]
    partition: int
    schema: EventSchema

    @property
    def names(self) -> EventNames:
        return EventNames.of(self.topics, self.schema.types)


def refused_letters(
    origin: Origin, records: Sequence[Any], topics: Sequence[int], decoded: Decoded
) -> list[LetterRecord]:
    """The records that could not be decoded, whole."""
    letters = []
    for refusal in decoded.refusals:
        record = records[refusal.index]
        letter = DeadLetter(
            refusal.reason,
            refusal.detail,
            origin.topics[topics[refusal.index]],
            origin.partition,
            record.offset,
            record.timestamp,
            record.key,
            record.value,
        )
        letters.append(dead_letter_record(letter, origin.node))
    return letters


def failed_letters(origin: Origin, answer: Answer) -> list[LetterRecord]:
    """The triggers a model failed on. The event itself is at its offset; the letter holds the model's input. A trigger
    of an interval has no event: its letter names no topic, offset -1 and the interval's end as the timestamp. Nor has
    that of a session, whose timestamp is its newest event's."""
    letters = []
    triggers = answer.triggers
    for row, detail in answer.outputs.errors.items():
        customer = triggers.customers[row]
        features: dict[str, float | str | None] = dict(
            zip(triggers.rows.names, triggers.rows.numbers[row].tolist(), strict=True)
        )
        features.update({name: texts[row] for name, texts in triggers.rows.texts.items()})
        letter = DeadLetter(
            Reason.MODEL_FAILED,
            detail,
            triggers.event_names.topics[int(triggers.topics[row])] if triggers.kind == "event" else "",
            origin.partition,
            int(triggers.offsets[row]) if triggers.kind == "event" else -1,
            int(triggers.times_ms[row]),
            customer.encode(),
            model_failure_value(customer, features),
            str(triggers.name),
        )
        letters.append(dead_letter_record(letter, origin.node))
    return letters


def answered_records(origin: Origin, answer: Answer) -> list[tuple[bytes, bytes]]:
    return encode_inferences(answer.version, answer.triggers, answer.outputs, origin.partition)


def counts(decoded: Decoded, answers: Sequence[Answer], shed: Counter[str], late: int) -> Counter[str]:
    """What to add to the partition's counters, by name: `events`, `dead_letters <reason>`, `inferences <model>`…"""
    counted = Counter({"commits": 1, "events": len(decoded.events), "ignored": decoded.ignored, "late": late})
    for refusal in decoded.refusals:
        counted[f"dead_letters {refusal.reason}"] += 1
    for answer in answers:
        failed = len(answer.outputs.errors)
        counted[f"inferences {answer.triggers.name}"] += len(answer.triggers) - failed
        if failed:
            counted[f"dead_letters {Reason.MODEL_FAILED}"] += failed
            counted[f"failed {answer.triggers.name}"] += failed
    for what, rows in shed.items():
        counted[f"shed {what}"] += rows
    return +counted


def add_up_former(counters: Counter[str], models: Collection[ModelName]) -> None:
    """Where there are many `counters` of models that are not among `models`, add them up: each tenant's under OTHER,
    and if that is still too many, those of tenants without a model together. No total falls. Every frame holds all
    counters, and a tenant may call its models by a new name every day."""
    here, tenants = {str(name) for name in models}, {OTHER, *(name.tenant for name in models)}
    _add_up(counters, lambda tenant, model: model != OTHER and f"{tenant}/{model}" not in here)
    _add_up(counters, lambda tenant, model: tenant not in tenants, OTHER)


def counted_under(counter: str, counters: Collection[str]) -> str:
    """The name that goes on, among `counters`, with what one of that name counted before `add_up_former`."""
    what, _, name = counter.rpartition(" ")
    names = (counter, f"{what} {name.partition('/')[0]}/{OTHER}", f"{what} {OTHER}/{OTHER}")
    return next((one for one in names if one in counters), counter)


def _add_up(counters: Counter[str], former: Callable[[str, str], bool], under: str = "") -> None:
    """Of the counters of models, those of `former(tenant, model)`; `under` a tenant's name, or else each its own's."""
    found = []
    for counter in counters:
        what, _, name = counter.rpartition(" ")
        tenant, of_model, model = name.partition("/")
        if of_model and former(tenant, model):
            found.append((counter, f"{what} {under or tenant}/{OTHER}"))
    if len(found) > COUNTERS_FORMER_MAX:
        for counter, other in found:
            counters[other] += counters.pop(counter)
