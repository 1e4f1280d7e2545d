"""A whole node, as a process on real Kafka: what its users see of it, over its life and its models' lives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from node_support import (
    MANIFEST,
    TIME_MS,
    Kafka,
    Node,
    drop,
    event,
    headers,
    linear,
    partition_of,
    remove,
    slow,
    status_file,
    wait_until,
    workers,
)

AMOUNT = {"amount": "event.amount"}
SUMS = {"amount": "event.amount", "spent": "sum(transaction.amount, '30d')"}


@pytest.fixture
def make(kafka: str, tmp_path: Path, topic_names: Callable[[str], str]) -> Iterator[Callable[..., Node]]:
    """`make(partitions=1, topics=1, …sections of the config)`: a node that is not started, on topics of its own."""
    made: list[Node] = []

    def one(partitions: int = 1, topics: int = 1, **settings: Any) -> Node:
        broker = Kafka(kafka)
        names = [broker.create(topic_names("events"), partitions) for _ in range(topics)]
        made.append(Node(tmp_path, broker, names, topic_names("node"), **settings))
        return made[-1]

    yield one
    for node in made:
        node.kill()


def exactly_once(inferences: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """The inferences of one model; fails when a trigger has two."""
    chosen = [one for one in inferences if one["model"] == model]
    counts = Counter(one["id"] for one in chosen)
    assert not [identity for identity, count in counts.items() if count > 1]
    return chosen


def test_events_become_inferences_stored_values_and_dead_letters(make: Callable[..., Node]) -> None:
    node = make()
    drop(node.models, "shop/spend", linear(1, 0.5, offset=3), SUMS)
    bad: list[bytes | None] = [
        b"no json",
        b"[1, 2]",
        b'{"customer": "ann", "amount": 1}',
        b'{"type": "transaction", "amount": 1}',
        b'{"type": "transaction", "customer": "ann", "amount": "much"}',
        b'{"type": "transaction", "customer": "ann", "amount": 1e300}',
        b'{"type": "transaction", "customer": "ann", "time": 99999999999999}',
        b'{"type": "transaction", "customer": "ann", "amount": NaN}',
        b"[" * 2000 + b"]" * 2000,
        '{"type": "transaction", "customer": "Zoë"}'.encode("utf-16"),
        json.dumps({"type": "transaction", "customer": "ann", "text": "x" * 5_000_000}).encode(),
        None,
    ]
    reasons = ["not_json", "not_an_object", "missing_type", "missing_customer", "wrong_type", "number_too_large"]
    reasons += ["bad_time", "not_json", "too_deep", "not_utf8", "too_large", "no_value"]
    good = [event('Zoë "the" cat', 0), event("ann", 1), event("ann", 2, kind="search"), event("ann", 3)]
    node.kafka.produce(node.topics[0], [*good[:2], *bad, *good[2:], {"type": "refund", "customer": "ann"}])
    node.start()
    inferences = node.inferences(3)
    first, second, third = inferences
    version = status_file(node.models, "shop/spend")["version"]
    assert first == {
        "id": f"shop/spend/{node.topics[0]}/0/0",
        "tenant": "shop",
        "model": "spend",
        "version": version,
        "customer": 'Zoë "the" cat',
        "topic": node.topics[0],
        "partition": 0,
        "offset": 0,
        "type": "transaction",
        "time": TIME_MS,
        "outputs": {"score": 3.0},
    }
    assert [one["outputs"]["score"] for one in (second, third)] == [1 + 0.5 + 3, 3 + 0.5 * 4 + 3]
    assert third["offset"] == 2 + len(bad) + 1
    assert [record.key.decode() for record in node.kafka.records(f"{node.application}.inferences")] == [
        one["customer"] for one in inferences
    ]

    letters = node.kafka.records(f"{node.application}.dead-letters")
    assert [headers(letter)["reason"] for letter in letters] == reasons
    assert [int(headers(letter)["source_offset"]) for letter in letters] == list(range(2, 2 + len(bad)))
    for letter, original in zip(letters, bad, strict=True):
        told = headers(letter)
        assert told["source_topic"] == node.topics[0]
        assert told["detail"]
        assert letter.value == original if "truncated" not in told else original.startswith(letter.value)  # type: ignore[union-attr]
    assert [headers(letter)["truncated"] for letter in letters if "truncated" in headers(letter)] == [str(len(bad[-2]))]  # type: ignore[arg-type]

    stored = node.get("/v1/customers/ann/inferences?at=last")["inferences"]
    assert [(one["model"], one["outputs"], one["event_time_ms"], one["live"]) for one in stored] == [
        ("spend", {"score": 8.0}, TIME_MS + 3000, True)
    ]
    assert stored[0]["expires_ms"] == TIME_MS + 3000 + 30 * 86_400_000
    assert stored[0]["version"] == version[:12]
    assert node.counter("ignored") == 1
    assert node.counter("events") == 4


def test_sigterm_finishes_the_cycle_and_a_restart_goes_on(make: Callable[..., Node]) -> None:
    node = make(partitions=2, cycle={"events_max": 50})
    drop(node.models, "shop/spend", linear(1, 1), SUMS)
    node.start()
    events = [event(f"c{number % 7}", number) for number in range(6000)]
    node.kafka.produce(node.topics[0], events[:3000], 2)
    wait_until(lambda: node.counter("events") > 200, "some events were taken")
    assert node.stop() == 0, node.log_tail()
    left = exactly_once(node.kafka.inferences(node.application, 2), "spend")
    assert len(left) > 200, "what was taken is committed"
    node.kafka.produce(node.topics[0], events[3000:], 2)
    node.start()
    inferences = exactly_once(node.inferences(6000, 2), "spend")
    sums: Counter[str] = Counter()
    expected = []
    for one in events:
        sums[one["customer"]] += one["amount"]
        expected.append((one["customer"], one["time"], one["amount"] + sums[one["customer"]]))
    assert sorted((one["customer"], one["time"], one["outputs"]["score"]) for one in inferences) == sorted(expected)
    assert node.counter("events") == 6000, "counters live on"
    assert node.status()["counters"]["inferences shop/spend"] == 6000 - len(left), "since the node has started"
    assert node.stop() == 0


def test_models_come_and_go_while_events_flow(make: Callable[..., Node]) -> None:
    """A pair dropped in goes live, the layout grows, a mistake changes nothing, others use its output, it goes."""
    node = make()
    topic = node.topics[0]
    drop(node.models, "shop/plain", linear(1), AMOUNT)
    node.start()
    node.kafka.produce(topic, [event("old", 1), event("older", 2)])
    assert [one["outputs"] for one in node.inferences(2)] == [{"score": 1.0}, {"score": 2.0}]

    drop(node.models, "shop/sums", linear(0, 1), SUMS)
    first = node.live("shop/sums")
    uses = {"base": "coalesce(models.shop.sums.score, -1)", "visits": "count(transaction, '30d')"}
    drop(node.models, "ads/uses", linear(1, 100), uses)
    node.live("ads/uses")
    node.kafka.produce(topic, [event("old", 10), event("new", 11), event("old", 12)])
    inferences = node.inferences(2 + 3 * 3)
    scores = {(one["model"], one["time"] - TIME_MS): one["outputs"]["score"] for one in inferences}
    assert [scores["sums", 1000 * number] for number in (10, 11, 12)] == [10, 11, 22], "old rows start empty"
    node.kafka.produce(topic, [event("old", 13)])
    used = {one["time"] - TIME_MS: one for one in node.inferences(14) if one["model"] == "uses"}
    assert used.keys() == {10_000, 11_000, 12_000, 13_000}
    # Stored is what the cycles before have left: of two events in one cycle the second does not see the first's.
    assert uses_right(used[10_000], fresh=10, stored=(-1,), visits=1)
    assert uses_right(used[11_000], fresh=11, stored=(-1,), visits=1)
    assert uses_right(used[12_000], fresh=22, stored=(-1, 10), visits=2)
    assert uses_right(used[13_000], fresh=35, stored=(22,), visits=3)

    drop(node.models, "shop/sums", linear(0, 2), {"amount": "event.amonut", "spent": "sum(transaction.nothing, '1h')"})
    told = wait_until(
        lambda: told if (told := status_file(node.models, "shop/sums")).get("state") == "refused" else {}, "refused"
    )
    assert "amonut" in str(told["problems"])
    assert "nothing" in str(told["problems"])
    assert told["running"]["version"] == first
    node.kafka.produce(topic, [event("old", 14)])
    scores = {(one["model"], one["time"] - TIME_MS): one for one in node.inferences(17)}
    assert scores["sums", 14_000]["version"] == first
    assert scores["sums", 14_000]["outputs"] == {"score": 10 + 12 + 13 + 14}

    remove(node.models, "shop/plain")
    wait_until(lambda: not status_file(node.models, "shop/plain"), "the answer to a model that is gone goes too")
    node.kafka.produce(topic, [event("old", 15)])
    inferences = node.inferences(19)
    assert {one["model"] for one in inferences if one["time"] == TIME_MS + 15_000} == {"sums", "uses"}
    exactly_once(inferences, "uses")
    assert node.counter("shed") == 0


def test_slots_of_models_that_are_gone_are_taken_back_and_the_others_windows_go_on(make: Callable[..., Node]) -> None:
    """Two that together are more than a row holds, one after the other; over a restart, with rows of each layout."""
    node = make(tenants={"window_bytes_max": 32_768})
    topic = node.topics[0]
    drop(node.models, "shop/sums", linear(0, 1), SUMS)

    def wide(first: int) -> dict[str, str]:
        return {f"sum{day}": f"sum(transaction.amount, '{day}d')" for day in range(first, first + 160)}

    drop(node.models, "wide/first", linear(*([0.0] * 159), 1), wide(20))
    node.start()
    for name in ("shop/sums", "wide/first"):
        node.live(name)
    node.kafka.produce(topic, [event("old", 1), event("both", 2)])
    node.inferences(4)
    drop(node.models, "broad/second", linear(*([0.0] * 159), 1), wide(200))
    wait_until(lambda: status_file(node.models, "broad/second").get("state") == "refused", "rows have no room for both")
    assert "ROW_SLOTS_MAX" in str(status_file(node.models, "broad/second")["problems"])
    full = node.status()["partitions"][0]["row_bytes"]
    remove(node.models, "wide/first")
    wait_until(lambda: not status_file(node.models, "wide/first"), "the first is gone")
    remove(node.models, "broad/second")
    wait_until(lambda: not status_file(node.models, "broad/second"), "the refused one too")
    drop(node.models, "broad/second", linear(*([0.0] * 159), 1), wide(200))
    node.live("broad/second")
    node.kafka.produce(topic, [event("both", 4), event("new", 8)])
    node.inferences(8)
    assert full > 20_000
    assert node.status()["partitions"][0]["row_bytes"] < full + 4_000, "what the first took is taken back"
    node.kill()
    node.start()
    node.kafka.produce(topic, [event(customer, 16) for customer in ("old", "both", "new")])
    last = {
        (one["model"], one["customer"]): one["outputs"]["score"]
        for one in node.inferences(14)
        if one["time"] == TIME_MS + 16_000
    }
    assert last == {
        ("sums", "old"): 17, ("sums", "both"): 22, ("sums", "new"): 24,
        ("second", "old"): 16, ("second", "both"): 20, ("second", "new"): 24,
    }  # fmt: skip


def uses_right(inference: dict[str, Any], fresh: float, stored: tuple[float, ...], visits: int) -> bool:
    """Whether its model had the output of the same event, or a stored one, as it says itself."""
    told = inference["inputs"]["models.shop.sums.score"]
    return inference["outputs"]["score"] - 100 * visits in ((fresh,) if told == "fresh" else stored)


def test_versions_are_swapped_under_load(make: Callable[..., Node]) -> None:
    """Every trigger has one inference, and within a partition no version comes back once a newer one was seen."""
    node = make(partitions=2, cycle={"events_max": 100})
    drop(node.models, "shop/spend", linear(1, offset=0), AMOUNT)
    node.start()
    versions = [node.live("shop/spend")]
    sent = 0

    def load() -> None:
        nonlocal sent
        node.kafka.produce(node.topics[0], [event(f"c{n % 9}", n) for n in range(sent, sent + 200)], 2)
        sent += 200

    def swapped() -> bool:
        """Whether the newest version is live; more events are sent meanwhile."""
        load()
        told = status_file(node.models, "shop/spend")
        if told["state"] == "live" and told["version"] not in versions:
            versions.append(told["version"])
        return len(versions) == swap + 1

    for swap in range(4):
        if swap:
            drop(node.models, "shop/spend", linear(1, offset=swap / 4), AMOUNT)
        wait_until(swapped, f"swap {swap}")
        load()
        wait_until(lambda: node.counter("events") == sent, "each version has had events")
    inferences = exactly_once(node.inferences(sent, 2), "spend")
    assert len(inferences) == sent
    for number in range(2):
        there = sorted(
            (one["offset"], versions.index(one["version"])) for one in inferences if one["partition"] == number
        )
        order = [version for _, version in there]
        assert order == sorted(order)
        assert len(set(order)) == 4
    for one in inferences:
        amount = (one["time"] - TIME_MS) / 1000
        assert one["outputs"]["score"] == amount + versions.index(one["version"]) / 4


def test_what_misses_its_commit_comes_through_the_sequence_log_over_kills(make: Callable[..., Node]) -> None:
    """No inference makes its cycle's deadline of 0 ms; the node is killed with triggers waiting, and workers are."""
    node = make(partitions=2, cycle={"inference_deadline_ms": 0, "events_max": 40})
    drop(node.models, "shop/slow", slow(linear(1, 1)), SUMS)
    drop(node.models, "ads/quick", linear(1), AMOUNT)
    events = [event(f"c{number % 11}", number) for number in range(1500)]
    node.kafka.produce(node.topics[0], events, 2)
    node.start()
    for worker in wait_until(lambda: workers(node), "workers run"):
        os.kill(worker, signal.SIGKILL)
    for taken in (100, 500, 900):
        wait_until(lambda taken=taken: node.counter("events") >= taken, f"{taken} events taken")  # type: ignore[misc]
        node.kill()
        node.start()
    inferences = node.inferences(3000, 2)
    assert len(inferences) == 3000
    wait_until(lambda: node.backlog() == 0, "the sequence log is empty")
    sums: Counter[str] = Counter()
    for one in events:
        sums[one["customer"]] += one["amount"]
        one["sum"] = one["amount"] + sums[one["customer"]]
    expected = {(one["customer"], one["time"]): one["sum"] for one in events}
    for found in exactly_once(inferences, "slow"):
        assert found["outputs"]["score"] == expected[found["customer"], found["time"]]
    for model in ("slow", "quick"):
        for customer in sums:
            times = [one["time"] for one in inferences if one["model"] == model and one["customer"] == customer]
            assert times == sorted(times), "in the customer's order"
    last = {one["customer"]: one for one in events}
    for customer, newest in last.items():
        stored = node.get(f"/v1/customers/{customer}/inferences?at=last")["inferences"]
        assert {one["model"]: one["outputs"]["score"] for one in stored} == {
            "slow": newest["sum"],
            "quick": newest["amount"],
        }
    assert node.stop() == 0


def accounted(node: Node, model: str) -> int:
    """Its triggers of which committed counters tell what became: those of a commit under way are neither there nor in
    the backlog."""
    counters = [partition["counters"] for partition in node.status()["partitions"]]
    return sum(rows for one in counters for name, rows in one.items() if name.endswith(f" {model}"))


def test_every_trigger_is_an_inference_or_counted_as_shed(make: Callable[..., Node]) -> None:
    """A tenant whose model falls behind its bound, then a kill, then the model's deletion with triggers waiting."""
    node = make(cycle={"inference_deadline_ms": 0, "events_max": 40})
    drop(node.models, "shop/slow", slow(linear(1), 400), AMOUNT)
    (node.models / "shop" / "tenant.toml").write_text("rows_queued_max = 100\nrows_waiting_max = 100\n")
    node.kafka.produce(node.topics[0], [event(f"c{number % 11}", number) for number in range(3000)])
    node.start()
    wait_until(lambda: node.counter("events") >= 500, "some events were taken")
    node.kill()
    node.start()
    wait_until(lambda: accounted(node, "shop/slow") >= 3000, "each trigger is accounted for")
    shed = node.counter("shed overload shop/slow")
    inferences = exactly_once(node.kafka.inferences(node.application), "slow")
    assert shed > 0
    assert len(inferences) + shed == 3000
    assert len(inferences) == node.counter("inferences shop/slow")

    node.kafka.produce(node.topics[0], [event("late", number) for number in range(3000, 6000)])
    wait_until(lambda: node.backlog() > 0, "triggers wait")
    remove(node.models, "shop/slow")
    wait_until(lambda: node.counter("events") == 6000 and node.backlog() == 0, "nothing waits")
    node.kafka.produce(node.topics[0], [event("unheard", 6000)])
    wait_until(lambda: node.counter("events") == 6001, "the commit that emptied the backlog has ended")
    before = exactly_once(node.kafka.inferences(node.application), "slow")
    assert len(before) == node.counter("inferences shop/slow")
    drop(node.models, "shop/slow", linear(1), AMOUNT)
    node.live("shop/slow")
    node.kafka.produce(node.topics[0], [event("last", 6001)])
    assert exactly_once(node.inferences(len(before) + 1), "slow")[-1]["customer"] == "last"


def test_several_source_topics_and_every_compression(make: Callable[..., Node]) -> None:
    node = make(partitions=2, topics=2)
    drop(node.models, "shop/spend", linear(1, 1), SUMS)
    node.start()
    sent, expected = 0, []
    spent: Counter[str] = Counter()
    for compression in (None, "gzip", "lz4", "zstd", "snappy"):
        for topic in node.topics:
            events = [event(f"c{number % 5}", number, channel="x" * 50) for number in range(sent, sent + 40)]
            node.kafka.produce(topic, events, 2, compression)
            sent += 40
            for one in events:
                spent[one["customer"]] += one["amount"]
                expected.append(
                    (topic, partition_of(one["customer"], 2), one["time"], one["amount"] + spent[one["customer"]])
                )
            wait_until(lambda: node.counter("events") == sent, f"{compression} was read")  # noqa: B023
    inferences = exactly_once(node.inferences(sent, 2), "spend")
    found = [(one["topic"], one["partition"], one["time"], one["outputs"]["score"]) for one in inferences]
    assert sorted(found) == sorted(expected)
    assert {one["topic"] for one in inferences} == set(node.topics)


def test_a_source_topic_that_was_not_read_for_a_while_goes_on_where_it_was_left(make: Callable[..., Node]) -> None:
    """Its events are counted once, and those that came meanwhile are not missed; one that was deleted hurts nobody."""
    node = make(topics=3)
    kept, left, gone = node.topics
    drop(node.models, "shop/spend", linear(1), AMOUNT)
    for place, topic in enumerate(node.topics):
        node.kafka.produce(topic, [event("ann", number) for number in range(10 * place, 10 * place + 10)])
    node.start()
    node.inferences(30)
    assert node.stop() == 0
    node.kafka.delete(gone)
    node.configure_topics([kept])
    node.kafka.produce(kept, [event("ann", number) for number in range(30, 35)])
    node.kafka.produce(left, [event("ann", number) for number in range(35, 40)])
    node.start()
    node.inferences(35)
    (partition,) = wait_until(lambda: [one for one in node.status()["partitions"] if one["counters"]["events"] == 35])
    assert partition["lag"] == 0
    assert partition["progress"].keys() == {kept}
    assert {topic: offset >= 10 for topic, offset in partition["progress_left"].items()} == {left: True, gone: True}
    assert node.stop() == 0
    node.configure_topics([left, kept])
    node.start()
    inferences = exactly_once(node.inferences(40), "spend")
    assert sorted(one["outputs"]["score"] for one in inferences) == list(range(40))
    node.kafka.produce(left, [event("ann", 40)])
    assert len(node.inferences(41)) == 41
    assert node.counter("events") == 41
    assert not node.log_has("were refused"), "nothing is told of a topic that is not read"


def test_what_waits_is_told_by_its_topic_and_type_whatever_the_config_says_by_then(make: Callable[..., Node]) -> None:
    """Killed with triggers waiting, and started with its topics in another order, and a topic and a type less."""
    node = make(topics=3, cycle={"inference_deadline_ms": 0, "events_max": 40})
    drop(node.models, "shop/spend", linear(1), AMOUNT, MANIFEST.replace('["', '["search", "'))
    node.start()
    node.live("shop/spend")
    node.kafka.produce(node.topics[0], [event("first", 0)])
    node.inferences(1)
    for worker in workers(node):
        os.kill(worker, signal.SIGSTOP)
    expected = {}
    for place, topic in enumerate(node.topics):
        events = [event("ann", place + number, kind) for number in range(100) for kind in ("search", "transaction")]
        node.kafka.produce(topic, events)
        expected |= {(topic, offset): one for offset, one in enumerate(events, 0 if place else 1)}
    wait_until(lambda: node.counter("events") == 601, "all events were taken")
    assert node.backlog() > 400
    node.kill()
    _, second, third = node.topics
    node.configure_topics([third, second])
    text = node.config.read_text()
    assert '["search", "transaction"]' in text
    node.config.write_text(text.replace('["search", "transaction"]', '["transaction"]'))
    node.start()
    found = exactly_once(node.inferences(601), "spend")[1:]
    assert {(one["topic"], one["offset"]) for one in found} == expected.keys()
    for one in found:
        sent = expected[one["topic"], one["offset"]]
        assert one["id"] == f"shop/spend/{one['topic']}/0/{one['offset']}"
        assert (one["type"], one["time"], one["outputs"]["score"]) == (sent["type"], sent["time"], sent["amount"])


def test_sigterm_while_models_are_on_trial(make: Callable[..., Node]) -> None:
    """A node that still tries the models it found does not go through all of them first."""
    node = make()
    names = [f"shop/model{number}" for number in range(24)]
    for name in names:
        drop(node.models, name, slow(linear(1)), AMOUNT)
    node.start(wait_s_max=0)
    wait_until(node.status, "HTTP answers")
    assert node.stop() == 0, node.log_tail()
    assert not all(status_file(node.models, name) for name in names)


def test_a_second_node_on_the_same_data_dir_ends_and_touches_nothing(make: Callable[..., Node], tmp_path: Path) -> None:
    """Such as one that an operator runs by hand beside the unit: what the first one works on is not cleared away."""
    node = make()
    node.start()
    upload = node.folder / "data" / "tables" / ".upload-under-way"
    upload.mkdir()
    other = tmp_path / "other.toml"
    port = node.url.rpartition(":")[2]
    other.write_text(node.config.read_text().replace(f"port = {port}", "port = 0"))
    command = [sys.executable, "-m", "node", "run", "--config", str(other)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (1, "")
    words = f"[node] data_dir is {node.folder / 'data'}, in which a node runs already; stop that one, or name another"
    assert words in ran.stderr.splitlines()[-1]
    assert upload.is_dir()
    node.kill()
    node.start()
    assert not upload.exists(), "nobody holds it"
