"""Tables put from files on running nodes: looked up by models, flipped and rolled back whole, refused whole."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster_support import running
from node_support import Kafka, Node, drop, event, harness, linear, status_file, wait_until

PRICES = {"price": "tables.products[event.channel].price", "check": "tables.products[event.channel].check"}


def headrace(node: Node, *arguments: str, code: int = 0, config: bool = True) -> str:
    asked = ["--config", str(node.config)] if config else ["--url", node.url]
    done = subprocess.run(
        [sys.executable, "-m", "node", "table", *arguments, *asked],
        cwd=harness.ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}\n{node.log_tail()}"
    return done.stdout + done.stderr


def products(folder: Path, step: int) -> Path:
    """A file whose every row has the price `step` and the same as a check, so that a mixture shows."""
    path = folder / f"products{step}.csv"
    path.write_text("channel,price,check\n" + "".join(f"c{number},{step},{step}\n" for number in range(500)))
    return path


def live(node: Node, name: str = "products") -> str:
    tables = {table["name"]: table for table in node.get("/v1/tables")["tables"]}
    return str(tables[name]["live"]) if name in tables else ""


def outputs(node: Node, count: int) -> list[tuple[float, str]]:
    return [(one["outputs"]["score"], one["tables"]["products"]) for one in node.inferences(count)]


def test_a_table_is_put_flipped_rolled_back_and_dropped(node: Node, tmp_path: Path) -> None:
    drop(node.models, "shop/price", linear(1000, 1), PRICES)
    node.start()
    told = wait_until(lambda: status_file(node.models, "shop/price"))
    assert "there is no table 'products'" in told["problems"][0]
    defaults = ("--default", "price=7", "--default", "check=7")
    said = headrace(node, "put", "products", str(products(tmp_path, 1)), "--key", "channel", *defaults)
    first = live(node)
    assert f"version {first} with 500 rows is live" in said
    wait_until(
        lambda: status_file(node.models, "shop/price")["state"] == "live", "the refused model is looked at again"
    )
    (model,) = node.get("/v1/models")["models"]
    assert (model["cost"]["calls"], model["cost"]["ms_per_call"], model["cost"]["ms_per_row"]) == (0, None, None)
    put = node.get("/v1/openapi.json")["paths"]["/v1/tables/{table}"]["put"]
    assert put["requestBody"] == {"required": True, "content": {"application/octet-stream": {}}}

    node.kafka.produce(node.topics[0], [event("ann", 1, channel="c3"), event("ann", 2, channel="zz"), event("bob", 3)])
    assert outputs(node, 3) == [(1001.0, first), (7007.0, first), (7007.0, first)]

    headrace(node, "put", "products", str(products(tmp_path, 2)))
    second = live(node)
    wait_until(lambda: node.counter("inferences shop/price") == 3, "the store has what was committed")
    assert node.get("/v1/customers/ann/features?model=shop/price")["needs_event"] == ["price", "check"]
    node.kafka.produce(node.topics[0], [event("ann", 4, channel="c3")])
    assert outputs(node, 4)[3] == (2002.0, second)

    bad = tmp_path / "bad.csv"
    bad.write_text("channel,price,check\na,1,1\nb,dear,2\na,3,3\n")
    assert "row 2: column price must be a number, not 'dear'" in headrace(node, "put", "products", str(bad), code=1)
    bad.write_text("channel,price\na,1\n")
    assert "column check is missing" in headrace(node, "put", "products", str(bad), code=1)
    assert live(node) == second

    node.kill()
    node.start()
    node.kafka.produce(node.topics[0], [event("ann", 5, channel="c3")])
    assert outputs(node, 5)[4] == (2002.0, second)
    headrace(node, "rollback", "products")
    assert live(node) == first
    node.kafka.produce(node.topics[0], [event("ann", 6, channel="c3")])
    assert outputs(node, 6)[5] == (1001.0, first)
    assert "is read by shop/price" in headrace(node, "drop", "products", code=1)
    for suffix in (".toml", ".joblib"):
        (node.models / f"shop/price{suffix}").unlink()
    wait_until(lambda: not node.get("/v1/models")["models"], "the model is gone")
    headrace(node, "drop", "products")
    assert node.get("/v1/tables")["tables"] == []
    assert list((tmp_path / "data" / "tables" / "files").iterdir()) == []


def ask(node: Node, method: str, path: str, body: bytes = b"", token: str | None = None) -> tuple[int, bytes]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(node.url + path, data=body or None, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()


def test_only_whoever_has_the_token_changes_tables(node: Node, tmp_path: Path) -> None:
    node.start()
    place = tmp_path / "data" / "operator-token"
    assert place.stat().st_mode & 0o777 == 0o600
    token, content = place.read_text(), b"id,price\n1,2\n"
    path = "/v1/tables/shops?format=csv&key=id"
    for wrong in (None, "", "x" * 64):
        assert ask(node, "PUT", path, content, wrong)[0] == 401
        assert ask(node, "DELETE", "/v1/tables/shops", token=wrong)[0] == 401
    assert ask(node, "PUT", f"{path}&sha256={'0' * 64}", content, token)[0] == 400
    assert ask(node, "PUT", "/v1/tables/Shops?format=csv", content, token)[0] == 400
    assert ask(node, "POST", "/v1/tables/shops/rollback", token=token)[0] == 404
    assert ask(node, "POST", "/v1/tables", token=token)[0] == 405
    assert live(node, "shops") == ""
    status, answer = ask(node, "PUT", path, content, token)
    assert (status, b'"live":true' in answer) == (200, True), answer
    assert not list((tmp_path / "data" / "tables").glob(".upload-*"))


def test_a_cluster_flips_at_one_place_whatever_dies(
    kafka: str, tmp_path: Path, topic_names: Callable[[str], str]
) -> None:
    broker = Kafka(kafka)
    topic = broker.create(topic_names("events"), 4)
    with running(tmp_path, broker, topic, 4, topic_names("cluster")) as cluster:
        nodes = cluster.nodes

        def versions() -> set[str]:
            return {live(nodes[name]) for name in cluster.living()}

        headrace(nodes["n2"], "put", "products", str(products(tmp_path, 1)), "--key", "channel")
        wait_until(lambda: len(versions()) == 1 and "" not in versions(), "one version on all")
        (first,) = versions()
        for model in ("price", "again"):
            drop(nodes["n1"].models, f"shop/{model}", linear(1000, 1), PRICES)
            nodes["n1"].live(f"shop/{model}")

        def send(first_number: int, count: int) -> None:
            events = [
                event(f"k{at % 40}", at, channel=f"c{at % 500}") for at in range(first_number, first_number + count)
            ]
            broker.produce(topic, events, 4)

        send(0, 200)
        cluster.inferences(200, "price")
        put = subprocess.Popen(
            [
                *(sys.executable, "-m", "node", "table", "put", "products", str(products(tmp_path, 2))),
                *("--config", str(nodes["n1"].config), "--wait-s", "60"),
            ],
            cwd=harness.ROOT,
        )
        wait_until(
            lambda: len(nodes["n1"].get("/v1/tables")["tables"][0]["versions"]) == 2, "the second version is put"
        )
        nodes["n3"].kill()
        send(200, 200)
        assert put.wait(60) == 0
        cluster.start("n3")
        wait_until(lambda: len(versions()) == 1 and first not in versions(), "the second version on all three")
        (second,) = versions()
        send(400, 200)
        found = {model: cluster.inferences(600, model) for model in ("price", "again")}
        check(found, {first: 1001.0, second: 2002.0})
        assert {one["tables"]["products"] for one in found["price"] if one["time"] >= event("", 400)["time"]} == {
            second
        }
        headrace(nodes["n3"], "rollback", "products")
        wait_until(lambda: versions() == {first}, "the first version on all")
        for name in nodes:
            files = nodes[name].folder / "data" / "tables" / "files"
            assert len([path for path in files.iterdir() if not path.name.startswith(".")]) == 2


def check(found: dict[str, list[dict[str, Any]]], expected: dict[str, float]) -> None:
    """Each output is of the version it names, and both models' of one event name the same."""
    named: dict[str, set[str]] = {}
    for inferences in found.values():
        for one in inferences:
            version = one["tables"]["products"]
            assert one["outputs"]["score"] == expected[version], one
            named.setdefault(f"{one['partition']}/{one['offset']}", set()).add(version)
    assert all(len(versions) == 1 for versions in named.values())
