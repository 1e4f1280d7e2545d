"""Models that use each other's outputs: their order, rings, and what a tenant keeps to itself."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.kernel.types import EventSchema, ModelName
from tenants.agreement import TrialReport
from tenants.manifest import TenantSettings
from tenants.model_graph import order, ring, uses_of
from tenants.registry import (
    FeaturesSeen,
    PairGone,
    PairSeen,
    Snapshot,
    TenantGone,
    TenantSeen,
    TrialPassed,
    features_status,
    status,
)
from tenants.registry_file import decode, encode
from tenants.transitions import apply

SCHEMA = EventSchema(("buy",), {"amount": "number", "shop": "text"})
REPORT = TrialReport(300e-6, 1e-6, 1000, "LogisticRegression")
A, B, C = ModelName("ads", "a"), ModelName("bank", "b"), ModelName("club", "c")
graphs = st.integers(1, 7).flatmap(
    lambda count: st.lists(st.sets(st.integers(0, count - 1), max_size=3), min_size=count, max_size=count)
)


def named(graph: list[set[int]]) -> dict[ModelName, list[ModelName]]:
    names = [ModelName("t", f"m{number}") for number in range(len(graph))]
    return {
        name: [names[used] for used in uses if names[used] != name] for name, uses in zip(names, graph, strict=True)
    }


def reaches(uses: dict[ModelName, list[ModelName]], start: ModelName) -> set[ModelName]:
    found: set[ModelName] = set()
    waiting = list(uses[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += uses[name]
    return found


@given(graphs)
def test_a_model_comes_after_all_it_uses_and_every_ring_is_found(graph: list[set[int]]) -> None:
    uses = named(graph)
    in_rings = {name for name in uses if name in reaches(uses, name)}
    found = ring(uses)
    assert bool(found) == bool(in_rings)
    if found:
        assert found[0] == found[-1]
        assert all(after in uses[before] for before, after in itertools.pairwise(found))
        with pytest.raises(ValueError, match="use each other"):
            order(uses)
        return
    places = {name: place for place, name in enumerate(order(uses))}
    assert places.keys() == uses.keys()
    assert all(places[used] < places[name] for name, others in uses.items() for used in others)


def text(*features: str, extra: str = "") -> bytes:
    lines = "\n".join(f'f{place} = "{feature}"' for place, feature in enumerate(features or ("event.amount",)))
    return f'on = ["buy"]\n{extra}\n[features]\n{lines}\n'.encode()


class Run:
    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self.numbers = 0

    def seen(self, name: ModelName, content: bytes) -> dict[str, object]:
        """The pair, and its trial if there is one."""
        self.numbers += 1
        self.snapshot, _ = apply(self.snapshot, PairSeen(name, content, f"{self.numbers:064x}", 1), SCHEMA)
        newest = self.snapshot.models[name].newest
        if newest is not None and newest.state == "candidate":
            self.snapshot, _ = apply(self.snapshot, TrialPassed(name, newest.version, REPORT, 1), SCHEMA)
        return status(self.snapshot, name)

    def features(self, tenant: str, content: str) -> dict[str, object]:
        self.snapshot, _ = apply(self.snapshot, FeaturesSeen(tenant, content), SCHEMA)
        return features_status(self.snapshot, tenant)


def test_a_ring_of_models_is_refused_with_their_names() -> None:
    run = Run()
    assert run.seen(A, text())["state"] == "live"
    assert run.seen(B, text("models.ads.a.score"))["state"] == "live"
    assert run.seen(C, text("models.bank.b.score"))["state"] == "live"
    told = run.seen(A, text("models.club.c.score"))
    assert told["state"] == "refused"
    assert "ads/a -> club/c -> bank/b -> ads/a" in str(told["problems"])
    manifests = [manifest for _, manifest in run.snapshot.live]
    assert order(uses_of(manifests, run.snapshot.definitions)) == [A, B, C]


def test_two_models_that_wait_for_each_other_are_a_ring_too() -> None:
    run = Run()
    assert run.seen(A, text("models.bank.b.score"))["state"] == "waiting"
    told = run.seen(B, text("models.ads.a.score"))
    assert told["state"] == "refused"
    assert "in a ring" in str(told["problems"])
    assert run.seen(B, text())["state"] == "live"
    assert run.snapshot.models[A].newest is not None
    assert run.snapshot.models[A].newest.state == "candidate"


def test_a_ring_through_a_shared_feature_is_found() -> None:
    run = Run()
    run.seen(A, text())
    shared = '[features.x]\nversion = 1\nexpression = "models.ads.a.score"\ndescription = "x"\n'
    assert run.features("bank", shared)["state"] == "live"
    assert run.seen(B, text("features.bank.x"))["state"] == "live"
    assert "in a ring" in str(run.seen(A, text("models.bank.b.score"))["problems"])


def test_windows_of_shared_features_are_of_whoever_shares_them() -> None:
    run = Run()

    def shared(days: int) -> str:
        return f'[features.x]\nversion = 1\nexpression = "count(buy, \'{days}d\')"\ndescription = "x"\n'

    for tenant in ("ads", "bank"):
        run.snapshot, _ = apply(run.snapshot, TenantSeen(TenantSettings(tenant, window_bytes_max=130)), SCHEMA)
    assert run.features("bank", shared(30))["state"] == "live"
    assert run.seen(A, text("features.bank.x", "count(buy, '30d')"))["state"] == "live"
    assert run.seen(B, text("count(buy, '7d')"))["state"] == "refused"
    assert run.seen(B, text("count(buy, '30d')"))["state"] == "live"
    told = run.features("bank", shared(30) + shared(7).replace("x]", "y]"))
    assert told["state"] == "refused"
    assert "the windows of tenant bank take 248 bytes of each customer's row, and its quota" in str(told["problems"])
    assert told["in_force"] == ["features.bank.x.v1"]


def test_outputs_are_for_those_they_are_shared_with_and_are_not_taken_away() -> None:
    run = Run()
    run.seen(A, text(extra='shared_with = ["bank"]'))
    assert run.seen(B, text("models.ads.a.score"))["state"] == "live"
    told = run.seen(C, text("models.ads.a.score"))
    assert told["state"] == "refused"
    assert "not shared with tenant club" in str(told["problems"])
    told = run.seen(A, text(extra="shared_with = []"))
    assert "models.ads.a.score is used by bank/b, so it can't be kept from them" in str(told["problems"])
    told = run.seen(A, text(extra='output = "other"'))
    assert "models.ads.a.score is used by bank/b, so it can't be left out" in str(told["problems"])
    for event in (PairGone(A), TenantGone("ads")):
        run.snapshot, _ = apply(run.snapshot, event, SCHEMA)
        assert A in {version.name for version, _ in run.snapshot.live}
    run.snapshot, _ = apply(run.snapshot, TenantGone("bank"), SCHEMA)
    run.snapshot, _ = apply(run.snapshot, TenantGone("ads"), SCHEMA)
    assert run.snapshot.live == ()


def test_a_shared_feature_is_no_way_to_outputs_that_are_kept_from_its_owner() -> None:
    run, shared = Run(), '[features.x]\nversion = 1\nexpression = "models.ads.a.score"\ndescription = "x"\n'
    assert run.features("club", shared)["state"] == "live", "there is no such model yet"
    run.seen(A, text(extra='shared_with = ["bank"]'))
    told = run.seen(C, text("features.club.x"))
    assert told["state"] == "refused"
    assert "features.club.x.v1 uses models.ads.a.score, which is not shared with tenant club" in str(told["problems"])
    told = run.features("club", shared.replace("ads.a.score", "ads.a.score + 1").replace("= 1", "= 2"))
    assert told["state"] == "refused"
    assert "features.club.x.v2 uses models.ads.a.score, which is not shared with" in str(told["problems"])
    assert run.features("bank", shared)["state"] == "live"
    assert run.seen(C, text("features.bank.x"))["state"] == "live", "bank answers for what it shares"
    told = run.seen(A, text(extra="shared_with = []"))
    assert "models.ads.a.score is used by club/c, so it can't be kept from them" in str(told["problems"])


def test_a_features_file_that_takes_away_what_is_used_is_refused_and_the_old_stays_over_restarts() -> None:
    run = Run()
    shared = '[features.x]\nversion = 1\nexpression = "event.amount"\ndescription = "x"\n'
    assert run.features("bank", shared) == {
        "tenant": "bank", "state": "live", "problems": [], "in_force": ["features.bank.x.v1"],
    }  # fmt: skip
    assert run.seen(A, text("features.bank.x"))["state"] == "live"
    told = run.features("bank", "")
    assert told["state"] == "refused"
    assert "features.bank.x is used by ads/a" in str(told["problems"])
    assert told["in_force"] == ["features.bank.x.v1"]
    restored, problems = decode(encode(run.snapshot), SCHEMA)
    assert (restored.live, problems) == (run.snapshot.live, ())
    assert restored.definitions == run.snapshot.definitions
    run.snapshot, _ = apply(run.snapshot, PairGone(A), SCHEMA)
    assert run.features("bank", "") == {"tenant": "bank", "state": "live", "problems": [], "in_force": []}
