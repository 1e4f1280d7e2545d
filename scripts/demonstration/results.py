"""Reads what the node writes, and holds it against what happened later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition

from demonstration.data import Array
from node.kernel.broker import broker_call
from node.kernel.types import ModelName

POLL_RECORDS_MAX = 20_000


@dataclass(frozen=True)
class Quality:
    """How well the scores of one model foretold the labels; None where there is only one class to tell apart."""

    judged: int
    positive_share: float | None
    auc: float | None
    average_precision: float | None

    def as_json(self) -> dict[str, float | int | None]:
        return {
            "judged": self.judged,
            "positive_share": self.positive_share,
            "auc": self.auc,
            "average_precision": self.average_precision,
        }


def quality(scores: Array, truth: Array) -> Quality:
    """Of float64 scores against labels 0.0 and 1.0, of the events where both are known (not NaN)."""
    known = np.isfinite(scores) & np.isfinite(truth)
    scores, truth = scores[known], truth[known]
    if not len(truth) or truth.min() == truth.max():
        return Quality(len(truth), float(truth.mean()) if len(truth) else None, None, None)
    from sklearn.metrics import average_precision_score, roc_auc_score

    return Quality(
        len(truth),
        round(float(truth.mean()), 4),
        round(float(roc_auc_score(truth, scores)), 4),
        round(float(average_precision_score(truth, scores)), 4),
    )


class Results:
    """The inferences of each model, placed by the event that triggered them.

    `scores[model]` is float64 [events], NaN where none has come; `doubled` counts those that came again, as a broker
    without transactions allows. Those of interval models are in `lists`, by the end of the interval and household.
    """

    def __init__(
        self, models: Sequence[ModelName], places: Sequence[Array], events: int, by_interval: Sequence[ModelName] = ()
    ) -> None:
        self.scores = {name: np.full(events, np.nan) for name in models}
        self.lists: dict[ModelName, dict[tuple[int, int], float]] = {name: {} for name in by_interval}
        self.inferences = dict.fromkeys((*models, *by_interval), 0)
        self.versions: list[str] = []
        """Of the table, in the order in which they were first seen."""
        self.version_of = np.full(events, -1)
        """int [events]: which of them the inference of an event names; -1: none."""
        self.dead_letters = 0
        self.doubled = 0
        self.last_arrival = time.monotonic()
        self._seen = {name: np.zeros(events, np.bool_) for name in models}
        self._places = places

    async def read(
        self, consumer: AIOKafkaConsumer, inferences: str, dead_letters: str, taken: Callable[[], None]
    ) -> None:
        """Read both topics from the start, until cancelled; `taken` is called whenever something came."""
        places = [
            TopicPartition(topic, number) for topic in (inferences, dead_letters) for number in range(len(self._places))
        ]
        consumer.assign(places)
        await broker_call("seek in the demo's topics", consumer.seek_to_beginning(*places))
        while True:
            polled = await broker_call(
                "read inferences", consumer.getmany(timeout_ms=200, max_records=POLL_RECORDS_MAX)
            )
            for place, records in polled.items():
                if place.topic == inferences:
                    self.take([orjson.loads(record.value) for record in records])
                else:
                    self.dead_letters += len(records)
            if polled:
                self.last_arrival = time.monotonic()
                taken()
            await asyncio.sleep(0)

    def take(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Records of the inferences topic."""
        for inference in found:
            name = ModelName(inference["tenant"], inference["model"])
            if "interval" in inference:
                self._take_of_interval(name, inference)
                continue
            place = self._places[inference["partition"]][inference["offset"]]
            if self._seen[name][place]:
                self.doubled += 1
                continue
            self._seen[name][place] = True
            self.inferences[name] += 1
            (score,) = inference["outputs"].values()
            self.scores[name][place] = np.nan if score is None else score
            for version in inference.get("tables", {}).values():
                if version not in self.versions:
                    self.versions.append(version)
                self.version_of[place] = self.versions.index(version)

    def _take_of_interval(self, name: ModelName, inference: Mapping[str, Any]) -> None:
        key = (inference["interval"], int(inference["customer"]))
        if key in self.lists[name]:
            self.doubled += 1
            return
        (score,) = inference["outputs"].values()
        self.lists[name][key] = np.nan if score is None else score
        self.inferences[name] += 1

    @property
    def total(self) -> int:
        """Of the models that run on events."""
        return sum(self.inferences[name] for name in self.scores)

    def of_versions(self) -> dict[str, int]:
        """How many inferences name each version of the table."""
        return {version: int((self.version_of == number).sum()) for number, version in enumerate(self.versions)}

    @property
    def mixed(self) -> int:
        """Inferences, in the order of a partition's events, that name an older version than one before them."""
        found = 0
        for places in self._places:
            named = self.version_of[places]
            named = named[named >= 0]
            found += int((named < np.maximum.accumulate(named)).sum()) if len(named) else 0
        return found
