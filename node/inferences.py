"""(P) Inferences as records of the inferences topic: JSON, keyed by customer.

`{"id", "tenant", "model", "version", "customer", "topic", "partition", "offset", "type", "time", "outputs"}`;
`id` is the same whenever the same trigger is run again, so a reader of a broker without transactions can
drop duplicates. A missing output is null. `version` is the one whose trigger it was; if that was quarantined while the
trigger waited, `"answered_by"` is there too: the version that ran in its place, whose the outputs are. Of a model
that uses others' outputs there is also `"inputs"`: each of them -> `"fresh"`, of the same event, or `"stored"`, before
it; of one that reads tables `"tables"`: name -> version it was fed from. `"warming": true` is there while windows that
its model asks history for are not filled from it.

Those of an interval run are of no event: `interval`, its end, stands in place of topic, offset and type, and the id is
`<tenant>/<model>/interval/<end>/<customer>`. So are those of closed sessions: `session` is the time of the event that
began it, `time` that of its newest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson

from node.kernel.types import Floats, ModelOutputs, ModelVersion, Triggers

Record = tuple[bytes, bytes]
"""Key and value."""


def encode_inferences(version: ModelVersion, triggers: Triggers, outputs: ModelOutputs, partition: int) -> list[Record]:
    """One record for each trigger that has no error, in order.

    Built by columns and joined: a dict and a dumps call for each would cost 2 µs, this costs a third.
    """
    if not len(triggers):
        return []
    if triggers.kind != "event":
        return _eventless_records(version, triggers, outputs, partition)
    name = orjson.dumps(str(triggers.name))[1:-1]
    topics = {number: orjson.dumps(topic) for number, topic in triggers.event_names.topics.items()}
    sources = {number: topic[1:-1] + b"/%d/" % partition for number, topic in topics.items()}
    topics_json = {n: b'","topic":' + topic + b',"partition":%d' % partition for n, topic in topics.items()}
    types_json = {number: orjson.dumps(event) for number, event in triggers.event_names.types.items()}
    model = b'","tenant":%s,"model":%s,"version":"%s","customer":"' % (
        orjson.dumps(triggers.name.tenant),
        orjson.dumps(triggers.name.model),
        triggers.version.encode(),
    )
    customers = _json_texts(triggers.customers)
    head = b'{"id":"' + name + b"/"
    outputs_key = _told(version, triggers) + b',"outputs":{'
    records = [
        (
            key,
            b"".join(
                (head, sources[topic], offset, model, customer, topics_json[topic], b',"offset":', offset,
                 b',"type":', types_json[kind], b',"time":', time, used, outputs_key, values, b"}}")
            ),
        )
        for key, customer, topic, offset, kind, time, used, values in zip(
            [customer.encode() for customer in triggers.customers],
            customers,
            triggers.topics.tolist(),
            _json_numbers(triggers.offsets),
            triggers.types.tolist(),
            _json_numbers(triggers.times_ms),
            _json_inputs(triggers),
            _json_outputs(version, outputs.values),
            strict=True,
        )
    ]  # fmt: skip
    if outputs.errors:
        return [record for row, record in enumerate(records) if row not in outputs.errors]
    return records


def _told(version: ModelVersion, triggers: Triggers) -> bytes:
    """What all the triggers have in common and most have not, as further fields."""
    tables = b',"tables":' + orjson.dumps(dict(triggers.tables)) if triggers.tables else b""
    warming = b',"warming":true' if triggers.warming else b""
    other = b',"answered_by":"%s"' % version.version.encode() if version.version != triggers.version else b""
    return tables + warming + other


def _eventless_records(
    version: ModelVersion, triggers: Triggers, outputs: ModelOutputs, partition: int
) -> list[Record]:
    name, kind = orjson.dumps(str(triggers.name))[1:-1], triggers.kind.encode()
    model = b'","tenant":%s,"model":%s,"version":"%s","customer":"' % (
        orjson.dumps(triggers.name.tenant),
        orjson.dumps(triggers.name.model),
        triggers.version.encode(),
    )
    told = _told(version, triggers)
    records = [
        (
            key,
            b"".join(
                (b'{"id":"', name, b"/", kind, b"/", moment, b"/", customer, model, customer, b'","', kind, b'":',
                 moment, b',"partition":%d' % partition, b',"time":', time, told, b',"outputs":{', values, b"}}")
            ),
        )
        for key, customer, moment, time, values in zip(
            [customer.encode() for customer in triggers.customers],
            _json_texts(triggers.customers),
            _json_numbers(triggers.moments),
            _json_numbers(triggers.times_ms),
            _json_outputs(version, outputs.values),
            strict=True,
        )
    ]  # fmt: skip
    return [record for row, record in enumerate(records) if row not in outputs.errors]


def _json_texts(texts: Sequence[str]) -> list[bytes]:
    """Each text as the inside of a JSON string."""
    joined = orjson.dumps(texts)
    parts = joined[2:-2].split(b'","')
    if b"\\" not in joined and len(parts) == len(texts):
        return parts
    return [orjson.dumps(text)[1:-1] for text in texts]


def _json_numbers(column: np.ndarray) -> list[bytes]:
    return orjson.dumps(np.ascontiguousarray(column), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")


def _json_inputs(triggers: Triggers) -> list[bytes]:
    """For each trigger its `inputs`, as a member that follows others; few combinations occur, so each is made once."""
    if triggers.fresh is None:
        return [b""] * len(triggers)
    told = {
        bits: b',"inputs":'
        + orjson.dumps({name: "fresh" if bits >> place & 1 else "stored" for place, name in enumerate(triggers.inputs)})
        for bits in np.unique(triggers.fresh).tolist()
    }
    return [told[bits] for bits in triggers.fresh.tolist()]


def _json_outputs(version: ModelVersion, values: Floats) -> list[bytes]:
    """The inside of each row's `outputs` object."""
    columns = []
    for position, output in enumerate(version.outputs):
        prefix = orjson.dumps(output) + b":"
        numbers = _labels(version, values[:, position]) or _json_numbers(values[:, position])
        columns.append([prefix + number for number in numbers])
    if len(columns) == 1:
        return columns[0]
    return [b",".join(row) for row in zip(*columns, strict=True)]


def _labels(version: ModelVersion, indexes: Floats) -> list[bytes]:
    if not version.labels:
        return []
    names = {float(index): orjson.dumps(label) for index, label in enumerate(version.labels)}
    return [names.get(index, b"null") for index in indexes.tolist()]
