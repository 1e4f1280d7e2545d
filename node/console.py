"""What the command line shows of a running node: its answers, fetched and laid out as tables.

The bodies are those of `node.serving.view`. They are read as plain JSON: a field that another version of the node
does not have is left blank.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import msgspec
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from node.kernel.errors import HeadraceError, printable
from node.kernel.limits import MODEL_PAGES_MAX

ANSWER_BYTES_MAX = 64 * 1024 * 1024
ANSWER_SECONDS_MAX = 10.0
PIPE_COLUMNS = 200
"""Width where there is no terminal to ask."""


REFUSALS_SHOWN = 3


class NodeUnreachable(HeadraceError):
    """The node did not answer, or not as a node does; the message says at which address and why."""


class NothingThere(NodeUnreachable):
    """The node answered that it has nothing at this path."""


def fetch(url: str, path: str) -> bytes:
    """The body of GET `url` + `path`. Raises NodeUnreachable."""
    return answer_of(url, path)


def answer_of(
    url: str, path: str, method: str = "GET", sent: bytes | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """The body of what a node answers at `url` + `path`. Raises NodeUnreachable."""
    address = checked(url) + path
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(address, sent, dict(headers or {}), method=method)
        with opener.open(request, timeout=ANSWER_SECONDS_MAX) as answer:
            body: bytes = answer.read(ANSWER_BYTES_MAX)
    except urllib.error.HTTPError as error:
        kind = NothingThere if error.code == HTTPStatus.NOT_FOUND else NodeUnreachable
        raise kind(f"{address} answered {error.code}: {_problem_detail(error)}") from error
    except urllib.error.URLError as error:
        raise NodeUnreachable(f"no node answers at {address}: {printable(str(error.reason))}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise NodeUnreachable(f"no node answers at {address}: {printable(str(error) or repr(error))}") from error
    return body


def checked(url: str) -> str:
    """Without a slash at its end. Raises NodeUnreachable for what is no address of a node."""
    address = url.rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise NodeUnreachable(f"{printable(url)} is no address of a node; give one such as http://127.0.0.1:8080")
    return address


def _problem_detail(error: urllib.error.HTTPError) -> str:
    try:
        return printable(str(msgspec.json.decode(error.read(ANSWER_BYTES_MAX))["detail"]))
    except (OSError, ValueError, TypeError, LookupError, http.client.HTTPException):
        return printable(str(error.reason))


def fetch_object(url: str, path: str) -> dict[str, Any]:
    """The answer as a JSON object. Raises NodeUnreachable."""
    body = fetch(url, path)
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except ValueError as error:
        raise NodeUnreachable(f"{url} answered with something else than a node's JSON: {error}") from error


def fetch_models(url: str) -> dict[str, Any]:
    """All pages of /v1/models as one, with `next` where there are more than MODEL_PAGES_MAX. Raises NodeUnreachable."""
    models: list[Any] = []
    answer: dict[str, Any] = {"next": None}
    for _ in range(MODEL_PAGES_MAX):
        after = answer.get("next")
        answer = fetch_object(url, "/v1/models" + (f"?after={quote(str(after), safe='/')}" if after else ""))
        models += answer.get("models", ())
        if not answer.get("next"):
            break
    return {**answer, "models": models}


def fetch_cluster(url: str) -> dict[str, Any] | None:
    """What /v1/cluster answers; None for a node that is on its own. Raises NodeUnreachable."""
    try:
        return fetch_object(url, "/v1/cluster")
    except NothingThere:
        return None


def as_json(answer: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(answer)


def encoded(answer: object) -> bytes:
    """As JSON."""
    return msgspec.json.encode(answer)


def show(*parts: RenderableType) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    for part in parts:
        console.print(part)


def status_view(status: Mapping[str, Any]) -> list[RenderableType]:
    ready = bool(status.get("ready"))
    head = Text.assemble(
        ("ready" if ready else "not ready", "green" if ready else "red"),
        f"  {_text(status.get('node'))}  {_text(status.get('delivery')).replace('_', ' ')}",
        f"  up {_duration(status)}",
    )
    reasons = [Text(f"  {_text(reason)}") for reason in status.get("reasons", ())]
    partitions = _table(
        "partition", "role", "phase", "lag", "events", "late", "dead letters", "backlog rows", "reason",
        right=range(3, 8),
    )  # fmt: skip
    for partition in status.get("partitions", ()):
        counters: Mapping[str, int] = partition.get("counters", {})
        dead = sum(count for name, count in counters.items() if name.split()[0] == "dead_letters")
        backlog = sum(entry.get("rows", 0) for entry in partition.get("backlog", {}).values())
        _add(
            partitions,
            *(partition.get("number"), partition.get("role"), partition.get("phase"), _count(partition.get("lag"))),
            *(_count(counters.get("events", 0)), _count(counters.get("late", 0)), _count(dead), _count(backlog)),
            partition.get("reason"),
        )
        for name, backfill in partition.get("backfills", {}).items():
            reasons.extend(_history(_text(name), backfill, f", partition {partition.get('number')}"))
    tenants = _table(
        *(
            "tenant",
            "worker",
            "weight",
            "CPU s",
            "CPU share",
            "calls",
            "queued",
            "waiting",
            "behind",
            "shed",
            "restarts",
        ),
        right=range(2, 11),
    )
    for tenant in status.get("tenants", ()):
        share = tenant.get("cpu_share")
        _add(
            tenants,
            *(tenant.get("tenant"), tenant.get("worker"), tenant.get("weight"), f"{tenant.get('cpu_seconds', 0):.1f}"),
            "" if share is None else f"{share:.0%}",
            *(_count(tenant.get("calls")), _count(tenant.get("rows_queued")), *_waits(tenant)),
            _count(tenant.get("restarts")),
        )
    return [head, *reasons, partitions, tenants]


def cluster_view(cluster: Mapping[str, Any]) -> list[RenderableType]:
    leader = _text(cluster.get("leader"))
    head = Text.assemble("cluster  ", f"led by {leader}" if leader else ("no leader", "red"))
    if not cluster.get("complete"):
        head.append(f"  as {_text(cluster.get('node'))} knows it: the leader was not reached, so no lags", "yellow")
    nodes = _table("node", "state", "rack", "owns", "stands by", "heard ms ago", "lease", "address", right=(3, 4, 5, 6))
    for member in cluster.get("members", ()):
        _add(
            nodes,
            *(member.get("name"), _member_state(member), member.get("rack")),
            *(_count(member.get("owns")), _count(member.get("stands_by")), _count(member.get("heard_ms"))),
            *(_count(member.get("lease")), member.get("peer_address")),
        )
    partitions = _table("partition", "owner", "epoch", "standbys", "snapshots", "why", right=(2,))
    for partition in cluster.get("partitions", ()):
        replicas = partition.get("replicas", ())
        copies = [_replica(replica) for replica in replicas if replica.get("role") != "owner"]
        snapshots = [f"{_text(one.get('node'))} {_count(one.get('snapshot_offset'))}" for one in replicas]
        _add(
            partitions,
            *(partition.get("number"), partition.get("owner"), _count(partition.get("epoch")), ", ".join(copies)),
            ", ".join(text for text in snapshots if not text.endswith(" ")),
            _why(partition),
        )
    waiting = [Text(_waiting(model), style="yellow") for model in cluster.get("models", ())]
    refused = [
        Text(f"refused: {_text(one.get('command'))}: {_text(one.get('reason'))}", style="yellow")
        for one in list(cluster.get("refusals", ()))[-REFUSALS_SHOWN:]
    ]
    return [head, nodes, *_awaited(cluster.get("awaited", {})), partitions, *waiting, *refused]


def _awaited(awaited: Mapping[str, Any]) -> list[Text]:
    told = "may join and has not come: it counts for a majority as one that is down; start it, or say headrace leave"
    return [
        Text(f"{_text(name)} at {_text(address)} {told} {_text(name)}", style="yellow")
        for name, address in awaited.items()
    ]


def _member_state(member: Mapping[str, Any]) -> str:
    states = [("leads", member.get("leader")), ("draining", member.get("draining"))]
    states += [("silent", member.get("fresh") is False), ("tries models", member.get("tries_models"))]
    return ", ".join(word for word, applies in states if applies) or "member"


def _replica(replica: Mapping[str, Any]) -> str:
    frames, behind_ms = replica.get("frames_behind"), replica.get("ms_behind")
    left = " (not to have it)" if replica.get("role") == "left" else ""
    lag = "" if frames is None else f" {_count(frames)} frames, {_count(behind_ms)} ms behind"
    return f"{_text(replica.get('node'))}{lag}{left}"


def _waiting(model: Mapping[str, Any]) -> str:
    name = f"{_text(model.get('tenant'))}/{_text(model.get('model'))} {_text(model.get('version'))}"
    return f"{name} waits for its file on {', '.join(map(_text, model.get('waits_for', ())))}"


def _why(partition: Mapping[str, Any]) -> str:
    move, reason = partition.get("move"), _text(partition.get("reason"))
    if not move:
        return reason
    return f"{reason}; since {_count(move.get('since_ms'))} ms, waits for {_text(move.get('waits_for'))}"


def log_view(answer: Mapping[str, Any]) -> list[RenderableType]:
    """Tenants' text: each line escaped, so that it can't move a terminal's cursor or look like another line."""
    lines: list[RenderableType] = []
    if dropped := answer.get("dropped"):
        lines.append(Text(f"{_count(dropped)} older lines are gone", style="yellow"))
    for line in answer.get("lines", ()):
        seconds = line.get("time_ms", 0) / 1000
        stamp = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
        lines.append(Text(f"{stamp} {line.get('pid')}  {_text(line.get('text'))}"))
    return lines or [Text("nothing was printed")]


def share_view(answer: Mapping[str, Any]) -> list[RenderableType]:
    """A table of the windows, and what each says."""
    quota = f", quota {answer['rows_s_max']:g} rows/s" if answer.get("rows_s_max") else ""
    head = f"{_text(answer.get('tenant'))}: weight {answer.get('weight', 0):g}{quota}"
    parts: list[RenderableType] = [Text(f"{head}, {answer.get('slots')} CPU slots")]
    table = _table(
        *("last", "CPU s asked", "got", "held back", "share", "due", "rows asked", "got", "wait", "held back by"),
        right=range(1, 9),
    )
    for window in answer.get("windows", ()):
        _add(
            table,
            f"{window.get('seconds', 0):.0f} s",
            *(f"{window.get(f'cpu_{what}_seconds', 0):.2f}" for what in ("asked", "got", "held_back")),
            *(_percent(window.get("share_got")), _percent(window.get("share_due"))),
            *(_count(window.get(f"rows_{what}")) for what in ("asked", "got", "waiting")),
            window.get("held_back_by"),
        )
    parts.append(table)
    for window in answer.get("windows", ()):
        parts.append(Text(f"last {window.get('seconds', 0):.0f} s", style="bold"))
        parts.extend(Text(f"  {_text(line)}") for line in window.get("says", ()))
    rows, behind, shed = _waits(answer)
    if behind or shed:
        parts.append(Text(f"in the sequence logs: {rows} rows, {behind or 'none'} behind; shed: {shed or 'none'}"))
    parts.extend(Text(_text(note), style="yellow") for note in answer.get("notes", ()))
    return parts


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def sandbox_view(report: Mapping[str, Any]) -> list[RenderableType]:
    required = set(report.get("required", ()))
    table = _table("layer", "in force", "required", "why not", right=())
    missing: Mapping[str, str] = report.get("missing", {})
    for layer in (*report.get("layers", ()), *missing):
        in_force = layer not in missing
        _add(table, layer, "yes" if in_force else "no", "yes" if layer in required else "", missing.get(layer))
    lacking = ", ".join(report.get("lacking", ()))
    return [table, Text(f"missing and required: {lacking}", style="red")] if lacking else [table]


def models_view(answer: Mapping[str, Any]) -> list[RenderableType]:
    models = _table(
        *(
            "model",
            "version",
            "state",
            "on",
            "outputs",
            "ms/row",
            "calls",
            "rows",
            "queued",
            "waiting",
            "behind",
            "shed",
        ),
        right=range(5, 12),
    )
    reasons: list[RenderableType] = []
    for model in answer.get("models", ()):
        cost: Mapping[str, Any] = model.get("cost", {})
        name = f"{_text(model.get('tenant'))}/{_text(model.get('model'))}"
        per_row = cost.get("ms_per_row")
        _add(
            models,
            *(name, model.get("version"), model.get("state")),
            *(", ".join(map(_text, model.get("events", ()))), ", ".join(map(_text, model.get("outputs", ())))),
            "" if per_row is None else f"{per_row:.3f}",
            *(_count(cost.get("calls")), _count(cost.get("rows")), _count(cost.get("rows_queued")), *_waits(model)),
        )
        reasons.extend(Text(f"{name}: {_text(reason)}", style="yellow") for reason in model.get("reasons", ()))
        reasons.extend(_history(name, model.get("backfill") or {}))
    if answer.get("next"):
        reasons.append(
            Text(f"there are more, after {_text(answer['next'])}: ask for /v1/models?after=", style="yellow")
        )
    return [models, *reasons]


def _history(name: str, backfill: Mapping[str, Any], partition: str = "") -> list[Text]:
    """What is not as the model asks for: windows that are not filled from history yet, or history that is gone."""
    lines = []
    taken = f"{float(backfill.get('percent', 0)):.1f}%, {_count(backfill.get('events'))} events"
    if backfill.get("warming"):
        lines.append(f"{name}{partition}: warming: its windows are being filled from history ({taken})")
    if backfill.get("floor_ms"):
        lines.append(
            f"{name}{partition}: history was cut by the topics' retention: the oldest event there was is of "
            f"{datetime.fromtimestamp(backfill['floor_ms'] / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
        )
    if backfill.get("lost"):
        lines.append(
            f"{name}{partition}: {_count(backfill['lost'])} events were deleted before they could be read again"
        )
    return [Text(line, style="yellow") for line in lines]


def features_view(answer: Mapping[str, Any]) -> list[RenderableType]:
    table = _table("feature", "type", "definition", "for", "users", "from outputs", "values", "us/value", right=(6, 7))
    for feature in answer.get("features", ()):
        granted, cost = feature.get("shared_with"), feature.get("us_per_value")
        _add(
            table,
            *(feature.get("name"), feature.get("type"), feature.get("definition")),
            "all" if granted is None else ", ".join(map(_text, granted)),
            *(", ".join(map(_text, feature.get(part, ()))) for part in ("users", "inputs")),
            *(_count(feature.get("values")), "" if cost is None else f"{cost:.3f}"),
        )
    reasons = [
        Text(f"{_text(tenant)}: {_text(line)}", style="yellow")
        for tenant, lines in answer.get("refused", {}).items()
        for line in lines
    ]
    return [table, *reasons]


def _waits(one: Mapping[str, Any]) -> tuple[str, str, str]:
    """Of a model or tenant: rows in the sequence log, how long the oldest has waited, and what was shed and why."""
    waiting: Mapping[str, Any] = one.get("waiting", {})
    shed = ", ".join(f"{_count(rows)} {_text(reason)}" for reason, rows in sorted(waiting.get("shed", {}).items()))
    rows = waiting.get("rows", 0)
    return _count(rows), f"{waiting.get('seconds', 0):.1f} s" if rows else "", shed


def _table(*headings: str, right: Iterable[int]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    numbers = set(right)
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="right" if position in numbers else "left", overflow="fold")
    return table


def _add(table: Table, *cells: object) -> None:
    table.add_row(*(Text(_text(cell)) for cell in cells))


def _text(value: object) -> str:
    """Names and reasons come from tenants: shown without markup or escape sequences."""
    return "" if value is None else printable(str(value))


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _duration(status: Mapping[str, Any]) -> str:
    seconds = max(0, status.get("now_ms", 0) - status.get("started_ms", 0)) // 1000
    days, seconds = divmod(seconds, 86_400)
    hours, seconds = divmod(seconds, 3600)
    minutes, seconds = divmod(seconds, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{count} {unit}" for count, unit in parts[:2])
