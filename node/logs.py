"""Structured logs on standard error: JSON, one object a line, or text for eyes. Secrets are masked, always.

Libraries that use the standard `logging` come out the same way.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Literal, TextIO

import msgspec
import structlog

MASK = "***"
VALUE_DEPTH_MAX = 8
"""Values nested deeper in a log entry are shown as their type only."""

_SECRET_KEY = re.compile(r"passw|secret|token|credential|authorization|api_?key|private_key", re.IGNORECASE)
_WORD = re.compile(r"\S+")
_QUIET = {
    **dict.fromkeys(("kafka", "aiohttp.access", "asyncio", "watchfiles", "pysyncobj"), logging.WARNING),
    "aiokafka": logging.CRITICAL,
}
"""Libraries whose messages below a level are about themselves. While a broker is gone the Kafka client says so a
hundred times a second; what becomes of its calls is told by those who made them."""


def configure_logging(
    log_format: Literal["json", "console"], log_level: str, node: str, stream: TextIO | None = None
) -> None:
    """Set up structlog and `logging` for the process; each entry names the node. Replaces an earlier setup."""
    stream = stream or sys.stderr
    level = logging.getLevelNamesMapping()[log_level.upper()]
    entry: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper("iso", utc=True, key="time"),
        _named(node),
    ]
    structlog.configure(
        processors=[*entry, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.PositionalArgumentsFormatter(), *entry],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                mask_secrets,
                _renderer(log_format, stream),
            ],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name, least in _QUIET.items():
        logging.getLogger(name).setLevel(max(level, least) if level > logging.DEBUG else level)


def _named(node: str) -> structlog.typing.Processor:
    def add_node(_logger: Any, _method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        entry.setdefault("node", node)
        return entry

    return add_node


def _renderer(log_format: Literal["json", "console"], stream: TextIO) -> structlog.typing.Processor:
    if log_format == "console":
        return structlog.dev.ConsoleRenderer(colors=stream.isatty())

    def render(_logger: Any, _method: str, entry: MutableMapping[str, Any]) -> str:
        return msgspec.json.encode(entry).decode()

    return render


def mask_secrets(_logger: Any, _method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The entry with the values of keys that name secrets, and the user part of URLs, replaced by `MASK`."""
    return {key: _masked(str(key), value, VALUE_DEPTH_MAX) for key, value in entry.items()}


def _masked(key: str, value: Any, depth: int) -> Any:
    if _SECRET_KEY.search(key) and value not in (None, "") and not isinstance(value, bool):
        return MASK
    if isinstance(value, str):
        masked = _WORD.sub(_without_user, value) if "://" in value else value
        return masked.encode(errors="replace").decode()
    if isinstance(value, bytes):
        return _masked(key, repr(value), depth)
    if isinstance(value, int | float | None):
        return value
    if depth == 0:
        return type(value).__name__
    if isinstance(value, dict):
        return {str(name): _masked(str(name), inner, depth - 1) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked(key, inner, depth - 1) for inner in value]
    return _masked(key, repr(value), depth)


def _without_user(word: re.Match[str]) -> str:
    """Masked up to the last '@': a password may have one in it, and '/' as well. Rather too much than too little."""
    before, mark, after = word[0].partition("://")
    _, at, rest = after.rpartition("@")
    return f"{before}{mark}{MASK}@{rest}" if at else word[0]
