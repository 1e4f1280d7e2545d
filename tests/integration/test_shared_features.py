"""Shared features and outputs on a whole node with real Kafka: computed for all, fresh, listed, and not taken away."""

from __future__ import annotations

from node_support import Node, drop, event, linear, remove, status_file, wait_until

SHARED = """
[features.spent]
version     = 1
expression  = "sum(transaction.amount, '30d')"
description = "Spent within thirty days"
"""


def test_models_share_a_feature_and_use_each_others_output_of_the_same_event(node: Node) -> None:
    drop(node.models, "shop/spend", linear(1.0), {"spent": "features.shop.spent"})
    drop(node.models, "ads/bid", linear(1.0, 1.0), {"a": "features.shop.spent", "b": "models.shop.spend.score"})
    file = node.models / "shop" / "features.toml"
    file.write_text(SHARED)
    node.start()
    node.live("shop/spend")
    node.live("ads/bid")
    node.kafka.produce(node.topics[0], [event("ann", number) for number in range(3)])
    for bid in node.inferences(3, model="bid"):
        spent = sum(range(bid["offset"] + 1))
        assert bid["inputs"]["models.shop.spend.score"] in ("fresh", "stored")
        if bid["inputs"]["models.shop.spend.score"] == "fresh":
            assert bid["outputs"]["score"] == 2 * spent

    (told,) = node.get("/v1/features")["features"]
    assert (told["name"], told["owner"], told["type"]) == ("features.shop.spent.v1", "shop", "number")
    assert told["users"] == ["ads/bid", "shop/spend"]
    assert told["values"] >= 3
    assert told["us_per_value"] > 0

    file.unlink()
    wait_until(lambda: status_file(node.models, "shop/features").get("state") == "refused", "the refusal")
    assert "used by ads/bid, shop/spend" in str(status_file(node.models, "shop/features")["problems"])
    assert node.get("/v1/features")["features"][0]["users"] == ["ads/bid", "shop/spend"]
    assert list(node.get("/v1/features")["refused"]) == ["shop"]
    remove(node.models, "ads/bid")
    remove(node.models, "shop/spend")
    wait_until(lambda: not node.get("/v1/features")["features"], "the feature gone with its users")
