"""Versions in stages on a whole node with real Kafka: compared, served to some, promoted and rolled back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from node_support import MANIFEST, Kafka, Node, drop, event, linear, status_file, wait_until
from test_cli import Ran, headrace

from node.kernel.types import ModelName
from node.staging import of_canary

NAME = "shop/spend"
AMOUNT = {"amount": "event.amount"}
CUSTOMERS = [f"customer-{number}" for number in range(40)]
SHADOW = '{ stage = "shadow", rows_min = 60, agreement_min = 0.99 }'
CANARY = '{ stage = "canary", share = 0.5, rows_min = 40, error_rate_max = 0.05 }'
PATIENT = '{ stage = "shadow", rows_min = 1000000 }'
PATIENT_CANARY = '{ stage = "canary", share = 0.5, rows_min = 1000000 }'


@pytest.fixture
def node(kafka: str, tmp_path: Path, topic_names: Callable[[str], str]) -> Iterator[Node]:
    broker = Kafka(kafka)
    made = Node(tmp_path, broker, [broker.create(topic_names("events"))], topic_names("node"))
    drop(made.models, NAME, linear(1.0), AMOUNT)
    made.start()
    made.live(NAME)
    yield made
    made.kill()


class Stream:
    """Events of all customers in turn; each has triggered the model once."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.count = 0

    def make(self, count: int) -> None:
        numbers = range(self.count, self.count + count)
        self.count += count
        self.node.kafka.produce(self.node.topics[0], [event(CUSTOMERS[n % len(CUSTOMERS)], n) for n in numbers])

    def more(self, count: int = 40) -> None:
        """And wait until they are answered."""
        self.make(count)
        self.wait()

    def wait(self) -> None:
        wait_until(lambda: self.answered() >= self.count, f"{self.count} answers")

    def answered(self) -> int:
        return self.node.counter(f"inferences {NAME}") + self.node.counter(f"failed {NAME}")

    def more_until(self, condition: Callable[[], object], what: str) -> None:
        """Events, until it is so; each lot once the one before was answered."""

        def happened() -> object:
            if condition():
                return True
            self.more()
            return condition()

        wait_until(happened, what)

    def answered_once(self, failed: int = 0) -> list[dict[str, Any]]:
        """All inferences, when each trigger has one; `failed` triggers have none."""
        found = self.node.inferences(self.count - failed)
        assert Counter(Counter(one["id"] for one in found).values()) == {1: self.count - failed}
        return found


def stage_of(node: Node) -> str:
    stage = status_file(node.models, NAME).get("stage")
    return str(stage["stage"]) if stage else ""


def staged(name: Node, *stages: str, model: Any = None, features: dict[str, str] = AMOUNT) -> str:
    """Drop a version that goes through these stages; its number once the first has begun."""
    head = MANIFEST.replace("[features]", f"[rollout]\nstages = [{', '.join(stages)}]\n[features]")
    drop(name.models, NAME, model or linear(1.0), features, head)
    wait_until(lambda: stage_of(name), "the first stage")
    return str(status_file(name.models, NAME)["stage"]["version"])


def history(node: Node) -> list[tuple[str, str, str]]:
    return [(one["version"], one["to"], one["who"]) for one in node.get(f"/v1/models/{NAME}")["history"]]


def test_a_good_version_goes_live_by_itself_through_a_kill_and_each_trigger_is_answered_once(node: Node) -> None:
    stream, first = Stream(node), str(status_file(node.models, NAME)["version"])
    stream.more()
    second = staged(node, SHADOW, CANARY)
    stream.more()
    wait_until(lambda: _seen(node)["verdict_reason"] == "40 of 60 rows seen", "a comparison of each row")
    seen = _seen(node)
    assert (seen["stage"], seen["number"], seen["of"], seen["verdict"]) == ("shadow", 1, 2, "keep")
    assert (seen["compared"], seen["agreement"], seen["errors"], seen["dropped"]) == (40, 1.0, 0, 0)
    assert seen["p99_ms"] > 0
    assert seen["cost_ratio"] > 0
    assert "headrace_stage_agreement{" in _metrics(node)

    node.kill()
    node.start()
    assert stage_of(node) == "shadow"
    early = stream.count
    stream.more_until(lambda: stage_of(node) == "canary 0.5", "the canary")
    by_shadow = {one["version"] for one in stream.answered_once() if one["offset"] < early}
    assert by_shadow == {first}, "a shadow publishes nothing"

    before = stream.count
    stream.more_until(lambda: node.live(NAME) == second if not stage_of(node) else False, "the second version live")
    stream.more()
    found = stream.answered_once()
    served = dict(zip(CUSTOMERS, of_canary(CUSTOMERS, ModelName("shop", "spend"), 0.5).tolist(), strict=True))
    by_canary = [one for one in found if one["offset"] >= before and one["version"] == second]
    assert len(by_canary) >= 40
    for one in found:
        if one["version"] == first:
            assert one["offset"] < before or not served[one["customer"]], "who has the canary keeps it"
    last = found[-40:]
    assert {one["version"] for one in last} == {second}
    assert history(node) == [
        (first, "live", "tenant"),
        (second, "shadow", "tenant"),
        (second, "canary 0.5", "auto"),
        (second, "live", "auto"),
    ]


def test_a_canary_keeps_its_customers_through_a_kill_and_each_trigger_is_answered_once(node: Node) -> None:
    first = str(status_file(node.models, NAME)["version"])
    second = staged(node, PATIENT_CANARY)
    stream = Stream(node)
    stream.more()
    unanswered = []
    for _ in range(2):  # right after they were made
        stream.make(4_000)
        unanswered.append(stream.count - stream.answered())
        node.kill()
        node.start()
    stream.wait()
    assert any(unanswered), "none of the kills came before all was answered"
    assert stage_of(node) == "canary 0.5"
    served = dict(zip(CUSTOMERS, of_canary(CUSTOMERS, ModelName("shop", "spend"), 0.5).tolist(), strict=True))
    assert len(set(served.values())) == 2
    for one in stream.answered_once():
        assert one["version"] == (second if served[one["customer"]] else first)


@pytest.mark.parametrize(
    ("stages", "model", "features", "why"),
    [
        ((SHADOW, CANARY), linear(2.0), AMOUNT, "agree"),
        ((CANARY,), linear(1.0), {"amount": "event.amount / 0"}, "in stage canary 0.5: "),
    ],
    ids=["another answer", "rows fail"],
)
def test_a_bad_version_is_rolled_back_by_itself(
    node: Node, stages: tuple[str, ...], model: Any, features: dict[str, str], why: str
) -> None:
    first = str(status_file(node.models, NAME)["version"])
    second = staged(node, *stages, model=model, features=features)
    stream = Stream(node)
    stream.more_until(lambda: status_file(node.models, NAME)["state"] == "quarantined", "the quarantine")
    told = status_file(node.models, NAME)
    assert why in told["problems"][0]
    assert told["running"]["version"] == first
    failed = node.counter(f"failed {NAME}")
    assert (failed > 0) == (len(stages) == 1), "what a shadow fails on is nobody's loss"
    stream.more()
    assert {one["version"] for one in stream.answered_once(failed)} == {first}
    assert history(node)[-1] == (second, "quarantined", "auto")
    assert [one["state"] for one in node.get(f"/v1/models/{NAME}")["versions"]] == ["live", "quarantined"]


def test_operators_promote_and_roll_back(node: Node) -> None:
    first = str(status_file(node.models, NAME)["version"])
    second = staged(node, PATIENT, CANARY)
    ran = command(node, "promote", "--version", second[:6], "--reason", "it is good")
    assert "canary 0.5 by" in ran.out
    assert "it is good" in ran.out
    assert stage_of(node) == "canary 0.5"
    assert "no version 0123 of shop/spend" in command(node, "promote", "--version", "0123", code=1).err
    command(node, "promote", "--live")
    assert node.live(NAME) == second
    ran = command(node, "rollback", "--reason", "sales fell")
    assert f"{first[:12]} live by" in ran.out.splitlines()[-1]
    assert status_file(node.models, NAME)["running"]["version"] == first
    assert "sales fell" in str(status_file(node.models, NAME)["problems"])
    assert "was live before" in command(node, "rollback", code=1).err
    stream = Stream(node)
    stream.more()
    assert {one["version"] for one in stream.answered_once()} == {first}


def test_a_filtered_window_has_no_hole_after_a_rollback(node: Node) -> None:
    def bought(made: int) -> list[float]:
        """What the live version says of five events on the web, after as many as were made."""
        events = [event("ann", number, channel="web") for number in range(made, made + 5)]
        node.kafka.produce(node.topics[0], events)
        return [one["outputs"]["score"] for one in node.inferences(made + 5)[made:]]

    plain = str(status_file(node.models, NAME)["version"])
    drop(node.models, NAME, linear(1.0), {"web": "count(transaction, '30d', where=event.channel == 'web')"})
    counting = node.live(NAME, differs_from=plain)
    assert bought(0) == [1.0, 2.0, 3.0, 4.0, 5.0]
    drop(node.models, NAME, linear(2.0), AMOUNT)
    node.live(NAME, differs_from=counting)
    assert bought(5) == [10.0, 12.0, 14.0, 16.0, 18.0]
    command(node, "rollback")
    assert status_file(node.models, NAME)["running"]["version"] == counting
    assert bought(10) == [11.0, 12.0, 13.0, 14.0, 15.0]


def test_a_version_with_other_outputs_is_told_to_replace_the_live_one_plainly(node: Node) -> None:
    head = MANIFEST.replace('output = "score"', 'output = "risk"').replace(
        "[features]", f"[rollout]\nstages = [{SHADOW}]\n[features]"
    )
    drop(node.models, NAME, linear(1.0), AMOUNT, head)
    wait_until(lambda: status_file(node.models, NAME)["state"] == "refused", "the refusal")
    assert "leave [rollout] out" in str(status_file(node.models, NAME)["problems"])


def command(node: Node, name: str, *arguments: str, code: int = 0) -> Ran:
    ran = asyncio.run(headrace(name, NAME, *arguments, "--config", str(node.config)))
    assert ran.code == code, ran
    return ran


def _seen(node: Node) -> dict[str, Any]:
    stages = [one["stage"] for one in node.get(f"/v1/models/{NAME}")["versions"] if one["stage"]]
    return dict(stages[0])


def _metrics(node: Node) -> str:
    import urllib.request

    with urllib.request.urlopen(node.url + "/metrics", timeout=10) as answer:
        return str(answer.read().decode())
