"""`headrace table`: putting a file as a table's next version, rolling back, dropping and listing, on a running node.

Address and token come from the node's own config file: whoever can read its data_dir may change its tables.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote, urlencode, urlsplit

import msgspec
from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from node.console import NodeUnreachable, _add, _count, _table, _text, checked, fetch_object
from node.kernel.errors import HeadraceError, TableRefused, printable
from node.kernel.limits import MIB, TABLE_UPLOAD_MS_MAX

if TYPE_CHECKING:
    from node.config_sections import Config

_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson"}
_LOOK_S = 0.2


class TableNotLive(HeadraceError):
    """The version was put, and is not live on all nodes yet; the message says what it waits for."""


def url_of(config: Config) -> str:
    host = config.http.host
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{local}]' if ':' in local else local}:{config.http.port}"


def format_of(path: Path, told: str) -> str:
    """Raises TableRefused when the name does not tell."""
    found = told or _SUFFIXES.get(path.suffix.lower(), "")
    if found not in ("parquet", "csv", "ndjson"):
        raise TableRefused([f"what is {path.name}? say --format parquet, csv or ndjson"])
    return found


def put(config: Config, url: str, name: str, path: Path, query: Mapping[str, str], wait_s: float) -> str:
    """Upload and wait until the version is live; a line for the operator. Raises TableRefused, NodeUnreachable."""
    try:
        with path.open("rb") as file:
            size, sha256 = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            asked = urlencode({key: value for key, value in {**query, "sha256": sha256}.items() if value})
            with _progress() as bar:
                task = bar.add_task(name, total=size)
                answer = _ask(
                    config,
                    url,
                    "PUT",
                    f"{_path(name)}?{asked}",
                    _pieces(file, lambda sent: bar.update(task, advance=sent)),
                    size,
                )
    except OSError as failure:
        raise TableRefused([f"{path} can't be read: {failure.strerror}"]) from None
    return _when_live(url, name, answer, wait_s)


def rollback(config: Config, url: str, name: str, wait_s: float) -> str:
    return _when_live(url, name, _ask(config, url, "POST", f"{_path(name)}/rollback"), wait_s)


def drop(config: Config, url: str, name: str) -> str:
    _ask(config, url, "DELETE", _path(name))
    return f"{name}: dropped"


def follow(config: Config, url: str, name: str, query: Mapping[str, str]) -> str:
    asked = urlencode({key: value for key, value in query.items() if value})
    answer = _ask(config, url, "POST", f"{_path(name)}/feed?{asked}")
    return f"{name}: follows topic {answer['topic']}; `headrace table list` shows how far"


def unfollow(config: Config, url: str, name: str) -> str:
    _ask(config, url, "DELETE", f"{_path(name)}/feed")
    return f"{name}: follows no topic any more"


def milliseconds(text: str) -> str:
    """Raises TableRefused for what is no number with ms, s, m or h."""
    found = re.fullmatch(r"([0-9]{1,6})(ms|s|m|h)", text)
    if not found:
        raise TableRefused([f"--every is a time such as 10s or 5m, not {text!r}"])
    return str(int(found[1]) * {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}[found[2]])


def tables_view(answer: Mapping[str, Any]) -> list[RenderableType]:
    shown = _table("table", "version", "state", "rows", "bytes", "key", "columns", "waits for", right=(3, 4))
    notes: list[RenderableType] = []
    for table in answer.get("tables", ()):
        for number, version in enumerate(table.get("versions", ())):
            columns = ", ".join(f"{_text(name)} {_text(kind)}" for name, kind in table.get("columns", {}).items())
            _add(
                shown,
                *(table.get("name"), version.get("version"), version.get("state"), _count(version.get("rows"))),
                *(_count(version.get("bytes")), "" if number else f"{_text(table.get('key'))} {table.get('key_type')}"),
                *("" if number else columns, ", ".join(table.get("waits_for", ())) if not number else ""),
            )
        if table.get("feed"):
            notes.append(Text(_feed_line(_text(table.get("name")), table["feed"])))
            notes += [Text(f"  {_text(problem)}", style="yellow") for problem in table["feed"].get("problems", ())]
        if table.get("absent"):
            notes.append(Text(f"{_text(table.get('name'))}: {_text(table.get('absent'))}", style="yellow"))
    return [shown, *notes]


def _feed_line(name: str, feed: Mapping[str, Any]) -> str:
    line = f"{name} follows topic {_text(feed.get('topic'))}, as of offsets {_text(feed.get('offsets'))}"
    if feed.get("by"):
        line += f"; fed by {_text(feed['by'])}, {_count(feed.get('behind'))} behind"
        line += f", {_count(feed.get('refused'))} records refused"
    return line + (f"; {_text(feed['reason'])}" if feed.get("reason") else "")


def _path(name: str) -> str:
    return f"/v1/tables/{quote(name, safe='')}"


def _progress() -> Progress:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))


def _pieces(file: BinaryIO, sent: Callable[[int], None]) -> Iterator[bytes]:
    while piece := file.read(MIB):
        yield piece
        sent(len(piece))


def _ask(
    config: Config, url: str, method: str, path: str, body: Iterator[bytes] | None = None, size: int = 0
) -> dict[str, Any]:
    """Raises TableRefused with the node's reasons, NodeUnreachable."""
    from node.serving.operator_token import read_token

    headers = {"Authorization": f"Bearer {read_token(Path(config.node.data_dir))}", "Content-Length": str(size)}
    address = checked(url)
    try:
        with contextlib.closing(_connection(address)) as connection:
            # Refused before all was sent: the answer says why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, urlsplit(address).path + path, body=body, headers=headers)
            answer = connection.getresponse()
            content = answer.read(16 * MIB)
    except (OSError, ValueError, http.client.HTTPException) as failure:
        raise NodeUnreachable(f"no node answers at {url}: {printable(str(failure) or repr(failure))}") from None
    told = _told(content)
    if told is None:
        reason = f"{url} answered {answer.status} {answer.reason}, with something else than a node's JSON"
        raise NodeUnreachable(printable(reason))
    if answer.status == 200:
        return told
    raise TableRefused([printable(str(line)) for line in (told.get("reasons") or [told.get("detail", answer.reason)])])


def _connection(address: str) -> http.client.HTTPConnection:
    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.netloc, timeout=TABLE_UPLOAD_MS_MAX / 1000)


def _told(content: bytes) -> dict[str, Any] | None:
    """None for what is no JSON object, such as the page of a proxy."""
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except ValueError:
        return None


def _when_live(url: str, name: str, answer: Mapping[str, Any], wait_s: float) -> str:
    deadline, version = time.monotonic() + wait_s, answer["version"]
    waited = bool(answer.get("live"))
    while True:
        tables = {table["name"]: table for table in fetch_object(url, "/v1/tables").get("tables", ())}
        table = tables.get(name, {})
        if table.get("live") == version:
            return f"{name}: version {version} with {_count(answer.get('rows'))} rows is live"
        waiting = [one["version"] for one in table.get("versions", ()) if one["state"] == "passed"]
        if waited and version not in waiting:  # before it was seen to wait, the node may not have heard of it yet
            reason = "a newer one was put, or the table was dropped"
            raise TableNotLive(f"{name}: version {version} is neither live nor waiting any more: {reason}")
        waited = version in waiting
        if time.monotonic() > deadline:
            waits = ", ".join(table.get("waits_for", ())) or "the leader"
            raise TableNotLive(f"{name}: version {version} is put and not live yet; it waits for {waits}")
        time.sleep(_LOOK_S)
