"""The wire between the node and a worker: what is written is read back, and nothing else is taken."""

from __future__ import annotations

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from node.kernel.errors import BoundExceeded
from node.kernel.limits import (
    LABEL_BYTES_MAX,
    OUTPUTS_PER_MODEL_MAX,
    REPORT_BYTES_MAX,
    ROWS_QUEUED_PER_MODEL_MAX,
    WORKER_MESSAGE_BYTES_MAX,
)
from node.kernel.types import FeatureRows
from tenants import messages
from tenants.agreement import TrialReport, encode_report
from tenants.messages import Call, Called, Load, Loaded, MessageCorrupt, Ready, Refused, Unload, Unloaded
from tenants.trial import NOTE_MISSING

texts = st.text(max_size=20)
names = st.lists(texts, max_size=4).map(tuple)
seconds = st.floats(0, 1e6)
requests = st.one_of(
    st.builds(Load, version=texts, method=texts, features=names, outputs=names, text_features=names),
    st.builds(Unload, version=texts),
    st.builds(
        Call,
        version=texts,
        rows=st.integers(0, 2**31),
        columns=st.integers(0, 2**31),
        texts=st.dictionaries(texts, st.lists(st.none() | texts, max_size=3), max_size=3),
    ),
)
answers = st.one_of(
    st.builds(Ready, layers=names, missing=st.dictionaries(texts, texts, max_size=3)),
    st.builds(
        Loaded,
        feature_names=st.none() | names,
        feature_count=st.none() | st.integers(0, 999),
        outputs=st.integers(0, 99),
        labels=names,
        seconds_per_row=seconds,
        seconds_per_call=seconds,
        memory_bytes=st.integers(0, 2**40),
        class_name=texts,
        notes=names,
    ),
    st.just(Unloaded()),
    st.builds(
        Called,
        rows=st.integers(0, 2**31),
        outputs=st.integers(0, 99),
        cpu_seconds=seconds,
        errors=st.dictionaries(st.integers(0, 2**31), texts, max_size=3),
    ),
    st.builds(Refused, reason=texts),
)
matrices = arrays(np.float64, st.tuples(st.integers(0, 5), st.integers(1, 4)))


def joined(buffers: list[messages.Buffer]) -> tuple[memoryview, int]:
    """A frame as its reader gets it: without the prefix, and its header's length."""
    whole = b"".join(bytes(buffer) for buffer in buffers)
    lengths = messages.lengths(whole[: messages.PREFIX.size])
    frame = whole[messages.PREFIX.size :]
    assert len(frame) == lengths.total_bytes
    return memoryview(frame), lengths.header_bytes


@given(requests, st.binary(max_size=50))
def test_a_request_comes_back(request: messages.Request, body: bytes) -> None:
    decoded, rest = messages.decode_request(*joined(messages.encode(request, body)))
    assert decoded == request
    assert bytes(rest) == body


@given(answers, st.binary(max_size=50))
def test_an_answer_comes_back(answer: messages.Answer, body: bytes) -> None:
    decoded, rest = messages.decode_answer(*joined(messages.encode(answer, body)))
    assert decoded == answer
    assert bytes(rest) == body


@given(matrices, st.booleans())
def test_rows_come_back_bit_for_bit(numbers: np.ndarray, fortran: bool) -> None:  # type: ignore[type-arg]
    given_rows = np.asfortranarray(numbers) if fortran else numbers
    column: list[str | None] = [None, "x", "", "ü", "y"][: len(numbers)]
    rows = FeatureRows(("a",), given_rows, {"a": column})
    call, body = messages.decode_request(*joined(messages.encode_call("v", rows)))
    assert isinstance(call, Call)
    assert call.texts == {"a": column}
    assert messages.matrix(body, call.rows, call.columns).tobytes() == numbers.tobytes()


@given(st.binary(max_size=200), st.integers(0, 250))
def test_noise_is_an_error_of_ours_or_a_message(noise: bytes, header_bytes: int) -> None:
    for decode in (messages.decode_request, messages.decode_answer):
        try:
            message, rest = decode(memoryview(noise), header_bytes)
        except MessageCorrupt:
            continue
        assert type(message).__module__ == messages.__name__
        assert bytes(rest) == noise[header_bytes:]


@given(answers, st.data())
def test_a_damaged_answer_is_an_error_of_ours_or_an_answer(answer: messages.Answer, data: st.DataObject) -> None:
    frame, header_bytes = joined(messages.encode(answer))
    damaged = bytearray(frame)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        message, _ = messages.decode_answer(memoryview(damaged), header_bytes)
    except MessageCorrupt:
        return
    assert type(message).__module__ == messages.__name__


@given(st.binary(min_size=messages.PREFIX.size, max_size=messages.PREFIX.size), st.integers(1, 2**20))
def test_announced_lengths_are_bounded(prefix: bytes, bytes_max: int) -> None:
    try:
        lengths = messages.lengths(prefix, bytes_max)
    except MessageCorrupt:
        return
    assert 0 < lengths.total_bytes <= bytes_max


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (-1, -3), (3, 0), (0, 3), (10**12, 1)])
def test_a_body_of_another_size_is_refused(rows: int, columns: int) -> None:
    with pytest.raises(MessageCorrupt, match="came with 24 bytes"):
        messages.matrix(memoryview(bytes(24)), rows, columns)


def test_too_much_is_refused_before_it_is_sent() -> None:
    with pytest.raises(BoundExceeded, match="WORKER_MESSAGE_BYTES_MAX"):
        messages.encode(Unload("v"), bytes(WORKER_MESSAGE_BYTES_MAX))
    with pytest.raises(BoundExceeded, match="ROWS_QUEUED_PER_MODEL_MAX"):
        messages.encode_call("v", FeatureRows(("a",), np.zeros((ROWS_QUEUED_PER_MODEL_MAX + 1, 1))))
    with pytest.raises(BoundExceeded, match="text column 'a' has 1 values for 2 rows"):
        messages.encode_call("v", FeatureRows(("a",), np.zeros((2, 1)), {"a": ["x"]}))


@given(st.integers(1, 300), st.integers(1, OUTPUTS_PER_MODEL_MAX))
def test_the_largest_honest_answer_is_within_its_bound(rows: int, outputs: int) -> None:
    values = np.full((rows, outputs), np.nan)
    errors = messages.row_errors(values, ["€" * 500] * outputs, {})
    assert set(errors) == set(range(rows))
    called = Called(rows, outputs, 1.0, errors)
    frame, _ = joined(messages.encode(called, values.reshape(-1).view(np.uint8).data))
    assert len(frame) <= messages.call_answer_bytes_max(rows)


@given(st.text(max_size=3000), st.integers(2, 500))
def test_shortened_text_is_one_bounded_printable_line(text: str, characters_max: int) -> None:
    line = messages.shorten(text, characters_max)
    assert len(line) <= characters_max
    assert line.isprintable()


def test_row_errors_name_the_output_and_keep_what_is_known() -> None:
    values = np.array([[1.0, 2.0], [1.0, np.inf], [np.nan, 2.0]])
    errors = messages.row_errors(values, ["low", "high"], {2: "known"})
    assert errors == {1: "output 'high' is not a finite number", 2: "known"}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=2 * LABEL_BYTES_MAX), max_size=4))
def test_text_classes_are_bounded_by_what_they_take_in_an_inference(labels: list[str]) -> None:
    longest = max((len(orjson.dumps(label)) for label in labels), default=0)
    assert (longest > LABEL_BYTES_MAX) == bool(messages.labels_problem(labels))


def test_text_classes_fit_together_into_the_report_of_a_trial() -> None:
    many = [f"{number:05}" for number in range(7680)]  # of 8 bytes each, with quotes and comma
    assert messages.labels_problem(many[:-1]) == ""
    assert "7680 text classes" in messages.labels_problem(many)
    report = TrialReport(1.0, 1.0, 2**40, "C" * 200, tuple(many[:-1]), (NOTE_MISSING,))
    assert len(encode_report(report).encode()) <= REPORT_BYTES_MAX
