"""What operators allow a tenant: set over HTTP and by the command line while a node runs, and kept over a restart."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from http_support import NOW_MS, TOKEN, MemoryView, ask, assert_problem
from node_support import Node, drop, event, linear, status_file, wait_until
from test_cli import Ran, headrace

from node.kernel.errors import BoundExceeded, ClusterUnavailable, ConfigError, PeerRefused
from node.kernel.limits import HTTP_BODY_BYTES_MAX
from node.serving.operator_token import FILE, make_token, read_token
from node.serving.server import HttpServer
from node.serving.view import ModelInfo

AMOUNT = {"amount": "event.amount"}
QUOTA = "/v1/tenants/ads/quota"
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}


# --- HTTP -----------------------------------------------------------------------------------------------------------


async def test_what_is_given_is_changed_and_null_takes_it_away(
    client: aiohttp.ClientSession, server: HttpServer
) -> None:
    body = {"weight": 4.0, "models_max": 5}
    answer = await ask(client, server, QUOTA, "PATCH", json=body, headers=OPERATOR)
    assert (answer.status, answer.json()["quota"]) == (200, body)
    answer = await ask(client, server, QUOTA, "PATCH", json={"models_max": None, "rows_s_max": 9}, headers=OPERATOR)
    assert answer.json()["quota"] == {"weight": 4.0, "rows_s_max": 9.0}
    assert answer.json() == (await ask(client, server, QUOTA)).json(), "anybody may look"


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN}]
)
async def test_nobody_else_changes_anything(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView, headers: dict[str, str]
) -> None:
    answer = await ask(client, server, QUOTA, "PATCH", json={"weight": 4.0}, headers=headers)
    detail = assert_problem(answer, 401, "not-an-operator", QUOTA)["detail"]
    assert "operator-token in the node's data_dir" in detail
    assert TOKEN not in detail
    assert view.quota_limits == {}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"weight": 0}',
        b'{"rows": 1}',
        b'{"models_max": 1.5}',
        b'{"weight": NaN}',
        b"\xff",
        b'{"who": ""}',
    ],
)
async def test_a_body_that_says_something_else_changes_nothing(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView, body: bytes
) -> None:
    answer = await ask(client, server, QUOTA, "PATCH", data=body, headers=OPERATOR)
    assert "weight, memory_mb, rows_s_max" in assert_problem(answer, 400, "bad-request", QUOTA)["detail"]
    assert view.quota_limits == {}


async def test_operators_alone_move_stages(client: aiohttp.ClientSession, server: HttpServer, view: MemoryView) -> None:
    path = "/v1/models/ads/bid"
    assert_problem(await ask(client, server, path), 404, "not-found")
    view.models_known = [ModelInfo(tenant="ads", model="bid", version="ab", sha256="abcd", state="live")]
    body = {"move": "promote", "version": "ab", "live": True, "reason": "good", "who": "eve"}
    assert_problem(await ask(client, server, path, "PATCH", json=body), 401, "not-an-operator")
    for wrong in ({}, {"move": "forward"}, {**body, "version": "x"}, {**body, "more": 1}):
        assert_problem(await ask(client, server, path, "PATCH", json=wrong, headers=OPERATOR), 400, "bad-request")
    assert view.history == []
    answer = await ask(client, server, path, "PATCH", json=body, headers=OPERATOR)
    changed = {"at_ms": NOW_MS, "version": "ab", "to": "live", "who": "eve", "reason": "good"}
    assert (answer.status, answer.json()["history"]) == (200, [changed])
    assert answer.json() == (await ask(client, server, path)).json()


async def test_bounds_methods_and_names(client: aiohttp.ClientSession, server: HttpServer) -> None:
    large = b" " * (HTTP_BODY_BYTES_MAX + 1)
    assert_problem(await ask(client, server, QUOTA, "PATCH", data=large, headers=OPERATOR), 413, "body-too-large")
    answer = await ask(client, server, QUOTA, "PUT", json={}, headers=OPERATOR)
    assert_problem(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, HEAD, PATCH"
    path = "/v1/tenants/No%20Name/quota"
    assert_problem(await ask(client, server, path, "PATCH", json={}, headers=OPERATOR), 400, "bad-request")


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (BoundExceeded("512 tenants have quotas"), 409, "refused"),
        (PeerRefused("stale"), 409, "refused"),
        (ClusterUnavailable("no quorum"), 503, "no-quorum"),
    ],
)
async def test_why_it_was_not_taken_is_told(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView, failure: Exception, status: int, kind: str
) -> None:
    view.quota_failure = failure
    answer = await ask(client, server, QUOTA, "PATCH", json={"weight": 4.0}, headers=OPERATOR)
    assert assert_problem(answer, status, kind)["detail"] == str(failure)


def test_the_token_is_the_node_s_own_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    token = make_token(folder)
    assert len(token) == 64
    assert make_token(folder) == read_token(folder) == token
    assert stat.S_IMODE((folder / FILE).stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == [FILE]
    (folder / FILE).write_text("\n")
    with pytest.raises(ConfigError, match="is empty; delete it"):
        read_token(folder)
    with pytest.raises(ConfigError, match="once it has started"):
        read_token(tmp_path)


# --- a node that runs -----------------------------------------------------------------------------------------------


def command_line(*arguments: str) -> Ran:
    return asyncio.run(headrace(*arguments))


def quota(node: Node, command: str, *arguments: str) -> Ran:
    ran = command_line("quota", command, "shop", *arguments, "--config", str(node.config))
    assert (ran.code, ran.err) == (0, "")
    return ran


def patient(node: Node) -> dict[str, Any]:
    """The tenant's last minute, as explain-share tells it."""
    window: dict[str, Any] = node.get("/v1/tenants/shop/share")["windows"][1]
    return window


def test_quotas_are_changed_while_events_flow_and_kept(node: Node) -> None:
    (node.models / "shop").mkdir()
    (node.models / "shop" / "tenant.toml").write_text("weight = 3.0\n")
    drop(node.models, "shop/plain", linear(1), AMOUNT)
    node.start()
    node.live("shop/plain")
    ran = command_line("quota", "show", "to_come", "--url", node.url)
    assert [line for line in ran.out.splitlines() if "4096 (as the config allows all tenants, it has 0)" in line] == [
        f"{limit} = 4096 (as the config allows all tenants, it has 0)"
        for limit in ("stored_bytes_max", "window_bytes_max")
    ]
    ran = quota(node, "set", "--rows-s-max", "10", "--models-max", "1", "--weight", "2", "--memory-mb", "700")
    assert "rows_s_max = 10 (quota 10)" in ran.out
    assert "weight = 2 (quota 2, its tenant.toml asks for 3)" in ran.out
    for text in ("nan", "inf"):
        ran = command_line("quota", "set", "shop", "--weight", text, "--config", str(node.config))
        assert (ran.code, ran.out, ran.err) == (1, "", f"weight can't be {text}; give a number\n")
    assert next(one["weight"] for one in node.status()["tenants"] if one["tenant"] == "shop") == 2.0

    drop(node.models, "shop/late", linear(2), AMOUNT)
    wait_until(lambda: status_file(node.models, "shop/late").get("state") == "refused", "one model too many")
    (problem,) = status_file(node.models, "shop/late")["problems"]
    assert "tenant shop has 1 models and its quota models_max is 1: delete one, or ask the operator" in problem
    assert (
        "models_max = 1 (quota 1, it has 1, 1 models were refused)"
        in command_line("quota", "show", "shop", "--url", node.url).out
    )
    assert node.status()["tenants"][0]["refused"] == {"models_max": 1}

    node.kafka.produce(node.topics[0], [event(f"c{number}", number) for number in range(400)])
    wait_until(lambda: node.counter("events") == 400, "all events taken in")
    wait_until(lambda: patient(node)["held_seconds"]["quota"] > 0.5, "the quota is told to hold rows back")
    told = patient(node)
    assert told["held_back_by"] == "quota"
    assert told["rows_got"] <= 10 * (1 + told["seconds"])
    ran = command_line("explain-share", "shop", "--url", node.url)
    assert "its quota of 10 rows a second (rows_s_max, which the operator may raise)" in ran.out
    assert node.stop() == 0

    node.start()
    assert "rows_s_max = 10 (quota 10)" in command_line("quota", "show", "shop", "--url", node.url).out
    quota(node, "clear", "rows_s_max")
    assert len(node.inferences(400, model="plain")) == 400, "what was over the quota waited and is not lost"
    assert node.counter("shed overload shop/plain") == 0
    ran = quota(node, "clear")
    assert "models_max = 64 (as the config allows all tenants, it has 1" in ran.out
    assert "set by" not in ran.out
    wait_until(lambda: status_file(node.models, "shop/late").get("state") == "live", "the refused model is taken now")


def test_mistakes_at_the_command_line_are_a_line_each(node: Node) -> None:
    config = str(node.config)
    for arguments, words in [
        (["set", "shop", "--config", config], "nothing to set"),
        (["set", "shop", "--weight", "2", "--config", config], "once it has started"),
        (["clear", "shop", "weigth", "--config", config], "weigth is no quota; there are weight, memory_mb"),
    ]:
        ran = command_line("quota", *arguments)
        assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
        assert words in ran.err
