"""The joined-up JSON of inferences is what a JSON library would have written, whatever the texts and numbers."""

from __future__ import annotations

import json
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from node.inferences import encode_inferences
from node.kernel.types import EventNames, FeatureRows, ModelName, ModelOutputs, ModelVersion, Triggers

# Without lone surrogates: decoding refuses those.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
numbers = st.floats(allow_infinity=False)


@st.composite
def answers(draw: st.DrawFn) -> tuple[ModelVersion, Triggers, ModelOutputs, list[str], list[str]]:
    count, outputs = draw(st.integers(0, 6)), draw(st.lists(texts, min_size=1, max_size=3, unique=True))
    labels = tuple(draw(st.lists(texts, min_size=1, max_size=4))) if len(outputs) == 1 and draw(st.booleans()) else ()
    value = st.one_of(st.integers(-1, len(labels)).map(float), st.floats()) if labels else numbers
    values = np.array(draw(st.lists(value, min_size=count * len(outputs), max_size=count * len(outputs))), np.float64)
    topics, types = draw(st.lists(texts, min_size=1, max_size=3)), draw(st.lists(texts, min_size=1, max_size=3))

    def integers(bound: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(0, bound), min_size=count, max_size=count)), np.int64)

    name = ModelName(draw(texts), draw(texts))
    version = ModelVersion(name, "ab" * 32, "", (), (), tuple(outputs), "predict", 0, 1, labels)
    triggers = Triggers(
        name,
        draw(st.sampled_from([version.version, "cd" * 32])),
        tuple(draw(st.lists(texts, min_size=count, max_size=count))),
        integers(len(topics) - 1),
        integers(2**62),
        integers(len(types) - 1),
        integers(2**53),
        FeatureRows(("x",), np.zeros((count, 1))),
        tables=draw(st.dictionaries(texts, texts, max_size=2)),
        event_names=EventNames.of(topics, types),
    )
    errors = dict.fromkeys(draw(st.sets(st.integers(0, 5), max_size=2)) & set(range(count)), "failed")
    outputs_found = ModelOutputs(values.reshape(count, len(outputs)), errors)
    return version, triggers, outputs_found, topics, types


@given(answers())
def test_every_record_is_the_json_of_its_trigger(
    given_: tuple[ModelVersion, Triggers, ModelOutputs, list[str], list[str]],
) -> None:
    version, triggers, outputs, topics, types = given_
    records = encode_inferences(version, triggers, outputs, 3)
    rows = [row for row in range(len(triggers)) if row not in outputs.errors]
    assert len(records) == len(rows)
    for (key, value), row in zip(records, rows, strict=True):
        topic, offset = topics[triggers.topics[row]], int(triggers.offsets[row])
        assert key == triggers.customers[row].encode()
        told = {"tables": triggers.tables} if triggers.tables else {}
        told |= {"answered_by": version.version} if triggers.version != version.version else {}
        assert json.loads(value) == told | {
            "id": f"{triggers.name}/{topic}/3/{offset}",
            "tenant": triggers.name.tenant,
            "model": triggers.name.model,
            "version": triggers.version,
            "customer": triggers.customers[row],
            "outputs": dict(zip(version.outputs, _told(version, outputs.values[row]), strict=True)),
            "topic": topic,
            "partition": 3,
            "offset": offset,
            "type": types[triggers.types[row]],
            "time": int(triggers.times_ms[row]),
        }


def _told(version: ModelVersion, values: np.ndarray) -> list[float | str | None]:
    if version.labels:
        return [
            version.labels[int(value)] if value in range(len(version.labels)) else None for value in values.tolist()
        ]
    return [None if math.isnan(value) else value for value in values.tolist()]
