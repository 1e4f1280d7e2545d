"""Triggers that wait keep the names of their topics and types, whatever the config says when their model answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
from frame_support import as_sent
from hypothesis import given
from hypothesis import strategies as st

from node.backlog import Answer, Backlog
from node.ingest.dead_letter import Reason
from node.kernel.chunks import decode_chunk, encode_chunk
from node.kernel.clock import ManualClock
from node.kernel.errors import StateCorrupt, TopicMissing
from node.kernel.types import (
    EventNames,
    EventSchema,
    FeatureRows,
    Frame,
    ModelName,
    ModelOutputs,
    ModelVersion,
    SequenceChunk,
    Triggers,
)
from node.outgoing import Origin, answered_records, failed_letters
from node.state.memory import MemoryStore
from node.training.fed_rows import decode, encode_rows, event_ids
from node.training.row_log import FedRows
from node.waiting import Bound

NAME = ModelName("ads", "bid")
VERSION = ModelVersion(NAME, "a" * 64, "", ("buy",), ("x",), ("score",), "predict", 0, 0)
BEFORE = EventNames.of(["web", "shop", "app"], ["look", "buy"])
FIELDS_BEFORE_NAMES = 19


def triggers(topics: Sequence[int], types: Sequence[int], names: EventNames = BEFORE) -> Triggers:
    """At offsets from 0."""
    count = len(topics)
    return Triggers(
        NAME,
        VERSION.version,
        ("ann",) * count,
        np.array(topics, np.int64),
        np.arange(count),
        np.array(types, np.int64),
        np.arange(count) + 1000,
        FeatureRows(("x",), np.zeros((count, 1))),
        event_names=names,
    )


def told(found: Triggers) -> list[tuple[str, str]]:
    names = found.event_names
    pairs = zip(found.topics.tolist(), found.types.tolist(), strict=True)
    return [(names.topics[topic], names.types[kind]) for topic, kind in pairs]


def without_names(chunk: SequenceChunk) -> bytes:
    """As releases wrote it that kept none."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(encode_chunk(chunk), strict=False)[:FIELDS_BEFORE_NAMES])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=8), st.sampled_from([1, 100]))
def test_a_chunk_names_what_it_uses_and_a_fold_of_it_elsewhere_has_the_same_bytes(
    rows: list[tuple[int, int]], times: int
) -> None:
    rows = rows * times
    given_triggers = triggers([topic for topic, _ in rows], [kind for _, kind in rows])
    encoded = encode_chunk(SequenceChunk(3, given_triggers))
    read = decode_chunk(encoded)
    assert told(read.triggers) == told(given_triggers)
    assert encode_chunk(read) == encoded
    for name in (*BEFORE.topics.values(), *BEFORE.types.values()):
        assert (name.encode() in encoded) == any(name in pair for pair in told(given_triggers))


class Waiting:
    """Triggers of all three topics in the sequence log of a store, and the partition opened under another config."""

    def __init__(self, topics: Sequence[str], types: Sequence[str], encoded: bytes = b"") -> None:
        self.store = MemoryStore()
        chunk = SequenceChunk(0, triggers([0, 1, 2], [1, 0, 1]))
        self.store.apply(as_sent(Frame({}, 0, [], np.zeros((0, 1)), appended=[chunk])), 1)
        if encoded:
            self.store._chunks = dict.fromkeys(self.store._chunks, encoded)
        self.origin = Origin("node", topics, 0, EventSchema(tuple(types), {}))
        self.open: list[FeatureRows] = []

    async def submit(self, version: ModelVersion, rows: FeatureRows) -> ModelOutputs:
        """The second row fails."""
        self.open.append(rows)
        return ModelOutputs(np.zeros((len(rows), 1)), {1: "no such aisle"})

    def backlog(self) -> Backlog:
        found = Backlog(
            self, self.store, lambda *_: VERSION, lambda _: Bound(100), self.origin.names, ManualClock()
        )  # fmt: skip
        found.restore(self.store.chunks(10))
        return found

    async def answer(self) -> Answer:
        backlog = self.backlog()
        backlog.pump()
        await backlog.changed.wait()
        (answer,) = backlog.settle().answers
        return answer


@pytest.mark.parametrize(
    ("topics", "types"),
    [
        (["web", "shop", "app"], ["look", "buy"]),
        (["app", "web", "shop"], ["buy", "look"]),
        (["new", "web"], ["buy"]),
        (["new"], ["other"]),
    ],
)
async def test_what_waited_is_told_of_by_the_names_it_had(topics: list[str], types: list[str]) -> None:
    waiting = Waiting(topics, types)
    answer = await waiting.answer()
    records = [json.loads(value) for _, value in answered_records(waiting.origin, answer)]
    assert [(one["id"], one["topic"], one["type"]) for one in records] == [
        ("ads/bid/web/0/0", "web", "buy"),
        ("ads/bid/app/0/2", "app", "buy"),
    ]
    ((_, _, headers),) = failed_letters(waiting.origin, answer)
    letter = dict(headers)
    assert (letter["reason"], letter["source_topic"]) == (Reason.MODEL_FAILED.encode(), b"shop")
    fed = decode(encode_rows(FedRows(1, answer.triggers, VERSION, answer.outputs)))
    assert isinstance(fed, FedRows)
    assert event_ids(fed, 0) == ["ads/bid/web/0/0", "ads/bid/shop/0/1", "ads/bid/app/0/2"]
    assert told(fed.triggers) == [("web", "buy"), ("shop", "look"), ("app", "buy")]


async def test_numbers_of_a_chunk_without_names_are_places_in_the_config() -> None:
    encoded = without_names(SequenceChunk(0, triggers([0, 1, 2], [1, 0, 1])))
    assert decode_chunk(encoded).triggers.event_names == EventNames()
    answer = await Waiting(["web", "shop", "app"], ["look", "buy"], encoded).answer()
    assert told(answer.triggers) == [("web", "buy"), ("shop", "look"), ("app", "buy")]
    assert told(decode_chunk(encode_chunk(SequenceChunk(1, answer.triggers))).triggers) == told(answer.triggers)


@pytest.mark.parametrize(
    ("topics", "types", "what"),
    [(["web", "shop"], ["look", "buy"], "topic 2"), (["web", "shop", "app"], ["look"], "type 1")],
)
def test_one_whose_places_the_config_has_no_more_says_what_to_put_back(
    topics: list[str], types: list[str], what: str
) -> None:
    encoded = without_names(SequenceChunk(0, triggers([0, 1, 2], [1, 0, 1])))
    with pytest.raises(TopicMissing, match=rf"{NAME} wait.*{what} .*put \[kafka\] topics"):
        Waiting(topics, types, encoded).backlog()


def damaged_topics(chunk: list[object], count: int) -> None:
    chunk[5] = np.array([1] * (count - 1) + [2**40], np.int64).tobytes()


def damaged_types(chunk: list[object], count: int) -> None:
    chunk[7] = np.array([1] * (count - 1) + [-1], np.int64).tobytes()


def no_type_names(chunk: list[object], count: int) -> None:
    chunk[FIELDS_BEFORE_NAMES + 1] = {}


@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize("damage", [damaged_topics, damaged_types, no_type_names])
def test_a_number_without_a_name_is_a_damaged_chunk(damage: Callable[[list[object], int], None], count: int) -> None:
    fields = msgspec.msgpack.decode(encode_chunk(SequenceChunk(0, triggers([1] * count, [1] * count))), strict=False)
    damage(fields, count)
    with pytest.raises(StateCorrupt, match=r"has no name|none of topics or types"):
        decode_chunk(msgspec.msgpack.encode(fields))
