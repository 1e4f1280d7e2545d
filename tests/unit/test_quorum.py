"""Proof of contact with a quorum: never newer than the contact, whatever delays, pauses and clocks there are."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.quorum import NEVER, QuorumContact

LEADER = "leader"


class Follower:
    def __init__(self, name: str, clock_ms: float) -> None:
        self.name = name
        self.clock_ms = clock_ms
        self.contact = QuorumContact()
        self.heartbeats: deque[dict[str, float | None]] = deque()
        self.answers: deque[dict[str, float | None]] = deque()
        self.handled_ms = NEVER


class Scene:
    """A leader and followers; messages wait until they are handled. Real time is the leader's clock."""

    def __init__(self, clocks_ms: list[float]) -> None:
        self.now_ms = 0.0
        self.contact = QuorumContact()
        self.followers = [Follower(f"follower{n}", clock_ms) for n, clock_ms in enumerate(clocks_ms)]
        self.heard_ms = dict.fromkeys((f.name for f in self.followers), NEVER)

    def send(self, follower: Follower) -> None:
        age_ms = self.contact.quorum_age_ms(self.now_ms)
        echo_ms = self.contact.stamp_from(follower.name)
        follower.heartbeats.append({"stamp": self.now_ms, "echo": echo_ms, "age": age_ms})

    def handle(self, follower: Follower) -> None:
        if not follower.heartbeats:
            return
        message = follower.heartbeats.popleft()
        assert message["stamp"] is not None
        follower.contact.follower_heard(LEADER, message["stamp"], message["echo"], message["age"])
        follower.handled_ms = self.now_ms
        stamp_ms = self.now_ms + follower.clock_ms
        follower.answers.append({"stamp": stamp_ms, "echo": follower.contact.stamp_from(LEADER)})

    def hear(self, follower: Follower) -> None:
        if not follower.answers:
            return
        message = follower.answers.popleft()
        assert message["stamp"] is not None
        self.contact.leader_heard(follower.name, 1, message["stamp"], message["echo"], self.now_ms)
        self.heard_ms[follower.name] = self.now_ms
        self.contact.settle([each.name for each in self.followers], self.now_ms)

    def check(self) -> None:
        """A majority, the leader included, handled a heartbeat at or after the proof."""
        handled = sorted([self.now_ms, *(each.handled_ms for each in self.followers)], reverse=True)
        assert self.contact.last_quorum_ms <= handled[len(handled) // 2]
        for each in self.followers:
            proof_ms = each.contact.last_quorum_ms - each.clock_ms
            assert proof_ms <= self.contact.last_quorum_ms + 1e-6
            assert proof_ms <= self.heard_ms[each.name] + 1e-6


@given(
    st.lists(st.integers(-10_000, 10_000), min_size=1, max_size=5),
    st.lists(st.tuples(st.sampled_from(["send", "handle", "hear"]), st.integers(0, 4), st.integers(0, 500))),
)
def test_a_proof_is_never_newer_than_the_contact(clocks_ms: list[int], steps: list[tuple[str, int, int]]) -> None:
    scene = Scene([float(clock_ms) for clock_ms in clocks_ms])
    for step, number, later_ms in steps:
        scene.now_ms += later_ms
        getattr(scene, step)(scene.followers[number % len(scene.followers)])
        scene.check()


@pytest.mark.parametrize(
    ("followers", "answering", "proven"), [(2, 0, False), (2, 1, True), (3, 1, False), (3, 2, True)]
)
def test_a_majority_proves_a_quorum(followers: int, answering: int, proven: bool) -> None:
    scene = Scene([0.0] * followers)
    for _ in range(2):
        for follower in scene.followers[:answering]:
            scene.now_ms += 10
            scene.send(follower)
            scene.handle(follower)
            scene.hear(follower)
    scene.contact.settle([each.name for each in scene.followers], scene.now_ms)
    assert (scene.contact.last_quorum_ms > NEVER) is proven
    scene.send(scene.followers[0])
    scene.handle(scene.followers[0])
    assert (scene.followers[0].contact.last_quorum_ms > NEVER) is proven


def test_alone_is_a_quorum_and_a_new_term_starts_anew() -> None:
    contact = QuorumContact()
    contact.settle([], 7.0)
    assert contact.last_quorum_ms == 7.0
    contact.leader_heard("a", 1, 0.0, 10.0, 20.0)
    contact.begin(2)
    contact.settle(["a", "b"], 30.0)
    assert contact.last_quorum_ms == 7.0
    assert contact.heard_ms == {}
