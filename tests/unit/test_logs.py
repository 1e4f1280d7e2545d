"""Log entries are one JSON object a line, from us and from libraries alike, and hold no secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from node.logs import MASK, configure_logging, mask_secrets


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def entries(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_our_entries_and_those_of_libraries_look_alike(stream: io.StringIO) -> None:
    configure_logging("json", "info", "node-1", stream)
    structlog.get_logger("node.cycle").info("committed", partition=3, rows=b"\xff", big=2**80)
    structlog.get_logger("node.cycle").debug("not said")
    logging.getLogger("library").warning("retry %d of %s", 2, "five")
    logging.getLogger("aiokafka.consumer").info("not said either")
    ours, theirs = entries(stream)
    assert ours.items() >= {"event": "committed", "level": "info", "logger": "node.cycle", "node": "node-1"}.items()
    assert (ours["partition"], ours["rows"]) == (3, r"b'\xff'")
    assert theirs.items() >= {"event": "retry 2 of five", "level": "warning", "logger": "library"}.items()
    assert set(theirs) == {"event", "level", "logger", "node", "time"}


def test_an_exception_stays_on_one_line_and_keeps_its_traceback(stream: io.StringIO) -> None:
    configure_logging("json", "info", "n", stream)
    try:
        raise ValueError("over\nthere, at kafka://user:hunter2@host")
    except ValueError:
        structlog.get_logger("x").exception("broke")
        logging.getLogger("y").exception("broke")
    for entry in entries(stream):
        assert "ValueError: over\nthere" in entry["exception"]
        assert "Traceback" in entry["exception"]
        assert "hunter2" not in entry["exception"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_secrets_are_masked(stream: io.StringIO, log_format: Any) -> None:
    configure_logging(log_format, "info", "n", stream)
    structlog.get_logger("x").info(
        "connecting to https://user:hunter2@host/path",
        sasl_plain_password="hunter2",
        options={"api_key": "hunter2", "inner": [{"Token": b"hunter2"}], "host": "h"},
        Authorization="Bearer hunter2",
    )
    assert "hunter2" not in stream.getvalue()
    assert stream.getvalue().count(MASK) == 5
    assert "https://***@host/path" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://key:pa/ss@host/b", "s3://***@host/b"),
        ("to 's3://key:p@ss@host/b' and on", "to 's3://***@host/b' and on"),
        ("a://u:x@h b://u:/@y@h\nann@shop", "a://***@h b://***@h\nann@shop"),
        ("a://u:x@h,b://u:y@i", "a://***@i"),
        ("see https://host/path, or ask ann@shop", "see https://host/path, or ask ann@shop"),
        ("://" * 20_000 + "x", "://" * 20_000 + "x"),
        ("a:" * 50_000 + "://", "a:" * 50_000 + "://"),
    ],
    ids=["slash", "at", "words", "list", "plain", "long", "longer"],
)
def test_a_password_in_a_url_may_have_any_sign_but_a_blank(text: str, masked: str) -> None:
    assert mask_secrets(None, "", {"event": text, "in": [text]}) == {"event": masked, "in": [masked]}


deep = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
)


@given(st.dictionaries(st.text(max_size=5), deep, max_size=4), st.sampled_from(["password", "sasl_password_x"]))
def test_masking_keeps_the_rest_and_never_raises(entry: dict[str, Any], secret: str) -> None:
    masked = mask_secrets(None, "", {**entry, secret: "s3cret", "count": 4})
    assert (masked[secret], masked["count"], set(masked)) == (MASK, 4, {*entry, secret, "count"})
    json.dumps(masked)
