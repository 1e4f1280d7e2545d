"""What `headrace table` makes of answers that are not a node's, and of versions that never go live."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from node.config import Config, parse_config
from node.console import NodeUnreachable
from node.serving.operator_token import make_token
from node.table_console import TableNotLive, drop, rollback

WAIT_S = 20.0


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = parse_config('[events]\ntypes = ["search"]\n', tmp_path)
    make_token(Path(config.node.data_dir))
    return config


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(answer: Answer) -> AsyncIterator[str]:
    """Gives its host and port."""

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(answered, "127.0.0.1")
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def scripted(asked: list[str], status: str, *bodies: bytes) -> Answer:
    """One body a request, the last one for all that come after."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        body = bodies[min(len(asked), len(bodies) - 1)]
        asked.append(head.split(b"\r\n")[0].decode())
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    return answer


async def test_a_url_may_have_a_path(config: Config) -> None:
    asked: list[str] = []
    async with listening(scripted(asked, "200 OK", b"{}")) as address:
        await asyncio.to_thread(drop, config, f"http://{address}/ab:cd/", "prices")
    assert asked == ["DELETE /ab:cd/v1/tables/prices HTTP/1.1"]


async def test_tls_is_spoken_where_the_url_says_so(config: Config) -> None:
    began: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        began.append(await reader.readexactly(1))

    async with listening(answer) as address:
        with pytest.raises(NodeUnreachable, match="no node answers at https://"):
            await asyncio.to_thread(drop, config, f"https://{address}", "prices")
    assert began == [b"\x16"], "the token is sent to nobody in plain text"


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://localhost", "http://", "http://[::1", "http://a:b"])
def test_what_is_no_address_is_told(config: Config, url: str) -> None:
    with pytest.raises(NodeUnreachable):
        drop(config, url, "prices")


@pytest.mark.parametrize("status", ["502 Bad Gateway", "200 OK"])
@pytest.mark.parametrize("body", [b"<html>no node here</html>", b"[]", b"\xff"])
async def test_what_a_proxy_says_is_told(config: Config, status: str, body: bytes) -> None:
    async with listening(scripted([], status, body)) as address:
        with pytest.raises(NodeUnreachable, match=f"answered {status}, with something else than a node's JSON"):
            await asyncio.to_thread(drop, config, f"http://{address}", "prices")


def tables(live: str, **states: str) -> bytes:
    versions = [{"version": version, "state": state} for version, state in states.items()]
    told: dict[str, Any] = {"tables": [{"name": "prices", "live": live, "versions": versions}]}
    return json.dumps(told).encode()


async def test_a_version_that_was_live_already_is_not_waited_for(config: Config) -> None:
    bodies = json.dumps({"version": "b", "rows": 2, "live": True}).encode(), tables("c", c="live", b="retired")
    async with listening(scripted([], "200 OK", *bodies)) as address:
        with pytest.raises(TableNotLive, match="neither live nor waiting any more"):
            await asyncio.to_thread(rollback, config, f"http://{address}", "prices", WAIT_S)


@pytest.mark.parametrize("end", [tables("c", c="live", a="retired"), b'{"tables": []}'], ids=["newer", "dropped"])
async def test_a_version_that_will_never_be_live_is_not_waited_for(config: Config, end: bytes) -> None:
    answer = json.dumps({"version": "b", "rows": 2}).encode()
    bodies = answer, tables("a", a="live", b="retired"), tables("a", a="live", b="passed"), end
    async with listening(scripted([], "200 OK", *bodies)) as address:
        with pytest.raises(TableNotLive, match="neither live nor waiting any more"):
            await asyncio.to_thread(rollback, config, f"http://{address}", "prices", WAIT_S)
