"""(P) What stands in a status file."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from node.kernel import limits


def status_content(told: Mapping[str, object]) -> bytes:
    """As JSON to be read by people, within STATUS_FILE_BYTES_MAX. Raises UnicodeError."""
    content = msgspec.json.format(msgspec.json.encode(told), indent=2)
    return content if len(content) <= limits.STATUS_FILE_BYTES_MAX else msgspec.json.encode(_shortened(told))


def _shortened(told: Mapping[str, object]) -> dict[str, object]:
    """A status that is too long for its file, without the columns and with the first problems only."""
    problems = told.get("problems")
    first = [str(problem)[:500] for problem in problems[:40]] if isinstance(problems, list | tuple) else []
    keys = {"model", "state", "version", "sha256", "written_at_ms"} & told.keys()
    kept = {key: told[key] for key in sorted(keys)}
    return {**kept, "problems": first, "shortened": True}
