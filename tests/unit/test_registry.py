"""The registry: one live version at most, never touched by a bad file, whatever happens in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel import limits
from node.kernel.errors import ManifestError
from node.kernel.types import EventSchema, ModelName, Quota
from tenants.agreement import TrialReport
from tenants.manifest import TenantCaps, TenantSettings
from tenants.registry import (
    Action,
    ConfigureTenant,
    CountRefusal,
    Event,
    GoLive,
    PairGone,
    PairRefused,
    PairSeen,
    QuotaSet,
    RemoveTenant,
    Retire,
    Snapshot,
    StartTrial,
    TenantGone,
    TenantSeen,
    TrialFailed,
    TrialPassed,
    VersionFailing,
    WriteStatus,
    status,
)
from tenants.registry_file import decode, encode
from tenants.reserve import reserve_of
from tenants.transitions import apply

SCHEMA = EventSchema(("transaction", "search"), {"amount": "number", "shop": "text"})
REPORT = TrialReport(300e-6, 1e-6, 1000, "LogisticRegression", ("no", "yes"))
BID, FRAUD, RISK = ModelName("ads", "bid"), ModelName("grocery", "fraud"), ModelName("grocery", "risk")


def manifest(*features: str, extra: str = "") -> bytes:
    lines = "\n".join(f'f{index} = "{feature}"' for index, feature in enumerate(features or ("event.amount",)))
    return f'on = ["transaction"]\n{extra}\n[features]\n{lines}\n'.encode()


def blob(number: int) -> str:
    return f"{number:064x}"


STATES = ("live", "candidate", "waiting", "refused", "failing", "quarantined", "shadow", "canary")


class Run:
    """Applies events and keeps every action, checking what must hold after each."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self.actions: list[Action] = []
        self.live: dict[ModelName, str] = {}
        self.time_ms = 0

    def __call__(self, event: Event) -> list[Action]:
        before = self.snapshot
        self.snapshot, actions = apply(before, event, SCHEMA)
        self.actions.extend(actions)
        assert (self.snapshot is before) == (self.snapshot.number == before.number)
        assert self.snapshot is not before or not actions
        for action in actions:
            if isinstance(action, GoLive):
                self.live[action.version.name] = action.version.version
            elif isinstance(action, Retire) and self.live.get(action.version.name) == action.version.version:
                del self.live[action.version.name]
        assert {version.name: version.version for version, _ in self.snapshot.live} == self.live
        for name in self.snapshot.models:
            assert status(self.snapshot, name)["state"] in STATES
        return list(actions)

    def seen(self, name: ModelName, text: bytes, number: int) -> list[Action]:
        self.time_ms += 1
        return self(PairSeen(name, text, blob(number), self.time_ms))

    def on_trial(self, name: ModelName) -> str:
        newest = self.snapshot.models[name].newest
        assert newest is not None
        return newest.version

    def passed(self, name: ModelName, version: str | None = None) -> list[Action]:
        return self(TrialPassed(name, version or self.on_trial(name), REPORT, self.time_ms))

    def state(self, name: ModelName) -> object:
        return status(self.snapshot, name)["state"]


def test_a_pair_is_tried_then_live_and_its_successor_retires_it() -> None:
    run = Run()
    assert [type(action) for action in run.seen(BID, manifest(), 1)] == [StartTrial, WriteStatus]
    assert run.state(BID) == "candidate"
    first = run.on_trial(BID)
    actions = run.passed(BID)
    assert [type(action) for action in actions] == [GoLive, WriteStatus]
    assert isinstance(actions[0], GoLive)
    assert actions[0].version.labels == ("no", "yes")
    assert run.state(BID) == "live"
    assert run.seen(BID, manifest(), 1) == [], "the same bytes are no news"

    run.seen(BID, manifest(), 2)
    assert run.live[BID] == first, "the running version goes on during the trial"
    actions = run.passed(BID)
    assert [type(action) for action in actions] == [GoLive, Retire, WriteStatus]
    assert isinstance(actions[1], Retire)
    assert actions[1].version.version == first
    assert [type(action) for action in run(PairGone(BID))] == [Retire]
    assert run.snapshot.models == {}


def two_versions() -> tuple[Run, str, str]:
    run = Run()
    for number in (1, 2):
        run.seen(BID, manifest(), number)
        run.passed(BID)
    entry = run.snapshot.models[BID]
    assert entry.previous is not None
    return run, entry.previous.version.version, run.live[BID]


def test_a_version_that_fails_by_its_own_fault_gives_way_to_the_one_before() -> None:
    run, first, second = two_versions()
    actions = run(VersionFailing(BID, second, "5 rows killed it", 7, at_fault=True))
    assert [type(action) for action in actions] == [GoLive, Retire, WriteStatus]
    assert run.live[BID] == first
    told = status(run.snapshot, BID)
    assert (told["state"], told["version"]) == ("quarantined", second)
    assert "5 rows killed it" in str(told["problems"])
    assert isinstance(told["running"], dict)
    assert told["running"]["version"] == first
    assert run.seen(BID, manifest(), 2) == [], "the same pair is not tried again"
    run(VersionFailing(BID, first, "so does this", 8, at_fault=True))
    assert run.live[BID] == first, "there is none before it"
    run.seen(BID, manifest(), 3)
    run.passed(BID)
    assert (run.state(BID), run.live[BID] not in (first, second)) == ("live", True)
    entry = run.snapshot.models[BID]
    assert entry.previous is None, "what was failing is nothing to fall back to"


def test_what_is_not_the_model_s_fault_rolls_nothing_back() -> None:
    run, _, second = two_versions()
    run(VersionFailing(BID, second, "its file is not here", 7))
    assert (run.live[BID], run.state(BID)) == (second, "failing")


def test_a_restart_remembers_what_failed_and_what_may_be_fallen_back_to() -> None:
    run, first, second = two_versions()
    restored, problems = decode(encode(run.snapshot), SCHEMA)
    assert problems == ()
    assert restored.models[BID].previous == run.snapshot.models[BID].previous
    run.snapshot = restored
    run(VersionFailing(BID, second, "it crashes", 7, at_fault=True))
    run.snapshot, _ = decode(encode(run.snapshot), SCHEMA)
    assert run.live[BID] == first
    assert [type(action) for action in run.seen(BID, manifest(), 2)] == [WriteStatus]
    assert run.state(BID) == "quarantined"
    assert "it crashes" in str(status(run.snapshot, BID)["problems"])


def test_a_bad_file_never_touches_the_running_version() -> None:
    run = Run()
    run.seen(BID, manifest(), 1)
    run.passed(BID)
    live = run.live[BID]
    assert [type(action) for action in run.seen(BID, manifest("event.amont"), 1)] == [WriteStatus]
    told = status(run.snapshot, BID)
    assert told["state"] == "refused"
    assert "amont" in str(told["problems"])
    assert isinstance(told["running"], dict)
    assert told["running"]["version"] == live

    run.seen(BID, manifest(), 2)
    run(TrialFailed(BID, run.on_trial(BID), "it has 3 columns", 9))
    assert status(run.snapshot, BID)["problems"] == ["bid.joblib: it has 3 columns"]
    assert run.seen(BID, manifest(), 2) == [], "a refused pair is not tried again unchanged"
    run(PairRefused(BID, ("bid.joblib: too large",), 10))
    assert run.live[BID] == live
    assert [type(action) for action in run.seen(BID, manifest(), 1)] == [WriteStatus]
    assert run.state(BID) == "live", "putting the running pair back mends the status"


def tried_again(run: Run, *actions: Action) -> bool:
    assert (run.state(BID) == "candidate") == any(isinstance(action, StartTrial) for action in actions)
    return run.state(BID) == "candidate"


def test_a_pair_that_failed_its_trial_is_tried_again_once_it_is_dropped_anew() -> None:
    run = Run()

    def seen(modified: int) -> list[Action]:
        return run(PairSeen(BID, manifest(), blob(1), 1, files=((1, 9), (2, modified))))

    seen(5)
    assert seen(6) == [], "it is on trial"
    for modified in (6, 7):
        run(TrialFailed(BID, run.on_trial(BID), "it needs more memory", 2))
        assert tried_again(run, *seen(modified))
    run(TrialFailed(BID, run.on_trial(BID), "it needs more memory", 2))
    assert seen(7) == [], "nobody did anything about it"
    seen(8)
    run.passed(BID)
    assert seen(9) == [], "what passed needs no other trial"


def test_a_pair_that_failed_its_trial_is_tried_again_with_more_memory() -> None:
    run = Run()
    run(TenantSeen(TenantSettings("ads", memory_mb=256)))
    run.seen(BID, manifest(), 1)
    run(TrialFailed(BID, run.on_trial(BID), "it needs more memory", 2))
    assert not tried_again(run, *run(TenantSeen(TenantSettings("ads", memory_mb=256, weight=2.0))))
    assert not tried_again(run, *run(TenantSeen(TenantSettings("ads", memory_mb=128))))
    actions = run(TenantSeen(TenantSettings("ads", memory_mb=512)))
    assert [type(action) for action in actions] == [ConfigureTenant, StartTrial, WriteStatus]
    run(TrialFailed(BID, run.on_trial(BID), "it needs more memory", 3))
    run(TenantSeen(TenantSettings("ads", asked={"memory_mb": 1024.0})))
    run(TrialFailed(BID, run.on_trial(BID), "it needs more memory", 3))
    caps = {"memory_mb": 1024.0}
    assert not tried_again(run, *run(QuotaSet("ads", Quota(memory_mb=300), caps)))
    assert tried_again(run, *run(QuotaSet("ads", Quota(memory_mb=2048), caps)))


def test_a_trial_that_is_overtaken_is_ignored() -> None:
    run = Run()
    run.seen(BID, manifest(), 1)
    overtaken = run.on_trial(BID)
    run.seen(BID, manifest(), 2)
    assert run.passed(BID, overtaken) == []
    assert run(TrialFailed(BID, overtaken, "no", 1)) == []
    assert run.live == {}
    run.passed(BID)
    assert run.live[BID] != overtaken
    assert run(TrialPassed(FRAUD, overtaken, REPORT, 1)) == []


def test_a_model_waits_for_the_models_it_uses() -> None:
    run = Run()
    uses = manifest("models.ads.bid.score", "models.ads.bid.other")
    assert [type(action) for action in run.seen(FRAUD, uses, 1)] == [WriteStatus]
    assert run.state(FRAUD) == "waiting"
    problems = str(status(run.snapshot, FRAUD)["problems"])
    assert "models.ads.bid.score" in problems
    assert "models.ads.bid.other" in problems
    run.seen(BID, manifest(), 2)
    actions = run.passed(BID)
    assert [type(action) for action in actions] == [GoLive, WriteStatus, WriteStatus]
    problems = str(status(run.snapshot, FRAUD)["problems"])
    assert "models.ads.bid.score" not in problems
    assert "models.ads.bid.other" in problems
    run.seen(BID, manifest(extra='output = ["score", "other"]'), 3)
    actions = run.passed(BID)
    assert any(isinstance(action, StartTrial) and action.version.name == FRAUD for action in actions)
    run.passed(FRAUD)
    assert set(run.live) == {BID, FRAUD}
    assert [type(action) for action in run(PairGone(BID))] == [WriteStatus]
    assert set(run.live) == {BID, FRAUD}, "what others use is not deleted"
    assert "used by grocery/fraud" in str(status(run.snapshot, BID)["problems"])
    assert run(PairGone(BID)) == []
    run(PairGone(FRAUD))
    assert [type(action) for action in run(PairGone(BID))] == [Retire]
    assert run.live == {}


def test_a_model_may_use_its_own_last_output() -> None:
    run = Run()
    assert isinstance(run.seen(BID, manifest("models.ads.bid.score"), 1)[0], StartTrial)


def test_names_that_expressions_cannot_tell_apart_are_refused() -> None:
    run = Run()
    run.seen(ModelName("ads", "a-b"), manifest(), 1)
    run.seen(ModelName("ads", "a_b"), manifest(), 2)
    assert run.state(ModelName("ads", "a_b")) == "refused"
    assert "rename" in str(status(run.snapshot, ModelName("ads", "a_b"))["problems"])


def test_bounds_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MODELS_PER_TENANT_MAX", 2)
    monkeypatch.setattr(limits, "TENANTS_MAX", 1)
    run = Run()
    run(TenantSeen(TenantSettings("ads")))
    for number, model in enumerate(("a", "b", "c")):
        run.seen(ModelName("ads", model), manifest(), number)
    assert run.state(ModelName("ads", "b")) == "candidate"
    assert "2 models already" in str(status(run.snapshot, ModelName("ads", "c"))["problems"])
    assert run(TenantSeen(TenantSettings("late"))) == []
    run.seen(ModelName("late", "a"), manifest(), 1)
    assert "1 tenants already" in str(status(run.snapshot, ModelName("late", "a"))["problems"])


def three_outputs(*names: str) -> bytes:
    return manifest(extra=f"output = {list(names)}".replace("'", '"') + '\nmethod = "transform"')


def problems(run: Run, name: ModelName) -> str:
    return str(status(run.snapshot, name)["problems"])


def test_a_model_too_many_for_its_quota_is_refused_and_counted_once_and_said_who_can_do_what() -> None:
    run = Run()
    run(TenantSeen(TenantSettings("ads", models_max=1)))
    run.seen(BID, manifest(), 1)
    run.passed(BID)
    late = ModelName("ads", "late")
    actions = run.seen(late, manifest(), 2)
    assert CountRefusal("ads", "models_max") in actions
    assert run.seen(late, manifest(), 2) == [], "what was told is not told and counted again"
    assert run.state(late) == "refused"
    assert "has 1 models and its quota models_max is 1: delete one, or ask the operator" in problems(run, late)
    assert isinstance(run.seen(BID, manifest("event.amount * 2"), 3)[0], StartTrial), "one in place of another is fine"
    run(TenantSeen(TenantSettings("ads", models_max=2)))
    assert isinstance(run.seen(late, manifest(), 2)[0], StartTrial)


def test_outputs_over_the_quota_of_stored_bytes_are_refused_unless_they_take_no_more_than_before() -> None:
    run = Run()
    run(TenantSeen(TenantSettings("ads", stored_bytes_max=64)))
    run.seen(BID, three_outputs("a", "b"), 1)
    run.passed(BID)
    late = ModelName("ads", "late")
    assert CountRefusal("ads", "stored_bytes_max") in run.seen(late, three_outputs("a", "b", "c"), 2)
    assert "take 40 bytes of each customer's row, all of tenant ads 72, and its quota" in problems(run, late)
    assert isinstance(run.seen(late, three_outputs("a", "b"), 3)[0], StartTrial)
    run(TenantSeen(TenantSettings("ads", stored_bytes_max=24)))
    assert run.snapshot.models[BID].live is not None, "a lower quota takes nothing away"
    assert isinstance(run.seen(BID, three_outputs("a", "x"), 4)[0], StartTrial)
    assert CountRefusal("ads", "stored_bytes_max") in run.seen(BID, three_outputs("a", "b", "c"), 5)


def test_windows_over_the_quota_are_refused_unless_they_take_no_more_than_before() -> None:
    run = Run()
    month, week, day = (f"count(transaction, '{days}d')" for days in (30, 7, 1))
    run(TenantSeen(TenantSettings("ads", window_bytes_max=260)))
    run.seen(BID, manifest(month, f"max(0, {month})", "last(transaction.amount)"), 1)
    run.passed(BID)
    late = ModelName("ads", "late")
    assert CountRefusal("ads", "window_bytes_max") in run.seen(late, manifest(month, week), 2)
    assert "its windows take 248 bytes of each customer's row, all of tenant ads 272, and its" in problems(run, late)
    assert isinstance(run.seen(late, manifest(month, "event.amount"), 3)[0], StartTrial), "what is there costs nothing"
    run.passed(late)
    run(TenantSeen(TenantSettings("ads", window_bytes_max=8)))
    assert run.snapshot.models[BID].live is not None, "a lower quota takes nothing away"
    assert isinstance(run.seen(BID, manifest(month), 4)[0], StartTrial)
    assert CountRefusal("ads", "window_bytes_max") in run.seen(BID, manifest(month, day), 5)
    assert isinstance(run.seen(ModelName("new", "m"), manifest(month, week, day), 6)[0], StartTrial), "another tenant"


def counting(*days: int) -> bytes:
    return manifest(*(f"count(transaction, '{day}d')" for day in days))


def test_what_may_still_fail_its_trial_neither_counts_nor_makes_room_for_more() -> None:
    run = Run()
    run(TenantSeen(TenantSettings("ads", window_bytes_max=260)))
    run.seen(BID, counting(30, 7), 1)
    run.passed(BID)
    run.seen(BID, counting(60, 50), 2)
    other = ModelName("ads", "other")
    assert isinstance(run.seen(other, counting(30), 3)[0], StartTrial), "the update may fail yet"
    assert CountRefusal("ads", "window_bytes_max") in run.seen(BID, counting(60, 50, 40), 4)
    assert CountRefusal("ads", "window_bytes_max") in run.seen(other, counting(60, 50), 5)
    assert isinstance(run.seen(other, counting(30), 6)[0], StartTrial)
    assert isinstance(run.seen(BID, counting(60, 50), 7)[0], StartTrial)
    run.passed(BID)
    run.passed(other)
    assert "all of tenant ads" in problems(run, other), "which beside this update is too much"


def test_what_waits_for_another_model_makes_no_room_for_more() -> None:
    run = Run()
    run(TenantSeen(TenantSettings("ads", window_bytes_max=260)))
    run.seen(BID, counting(30), 1)
    run.passed(BID)
    other = ModelName("ads", "other")
    run.seen(other, manifest("models.grocery.fraud.score", "count(transaction, '60d')"), 2)
    assert run.state(other) == "waiting"
    assert isinstance(run.seen(BID, counting(30, 90), 3)[0], StartTrial)
    assert CountRefusal("ads", "window_bytes_max") in run.seen(BID, counting(30, 60, 90), 4)


def test_a_version_beside_the_live_one_counts_with_it() -> None:
    run = Run()
    run(TenantSeen(TenantSettings("ads", window_bytes_max=260)))
    run.seen(BID, counting(30, 7), 1)
    run.passed(BID)
    shadow = counting(60, 50) + b'[rollout]\nstages = [{ stage = "shadow" }]\n'
    assert CountRefusal("ads", "window_bytes_max") in run.seen(BID, shadow, 2)
    assert isinstance(run.seen(BID, shadow.replace(b"50d", b"30d").replace(b"60d", b"7d"), 3)[0], StartTrial)


def test_windows_of_the_profile_are_nobodys() -> None:
    schema = EventSchema(SCHEMA.types, SCHEMA.fields, {"orders": "count(transaction, '30d')"})
    snapshot, _ = apply(Snapshot(), TenantSeen(TenantSettings("ads", window_bytes_max=125)), schema)
    for text, state in (
        (manifest("profile.orders", "count(transaction, '30d')", "count(transaction, '7d')"), "candidate"),
        (manifest("profile.orders", "count(transaction, '60d')"), "refused"),
    ):
        snapshot, _ = apply(snapshot, PairSeen(BID, text, blob(1), 1), schema)
        assert status(snapshot, BID)["state"] == state


def test_what_a_version_falls_back_to_is_kept_for_until_its_model_is_gone() -> None:
    run = Run()
    assert reserve_of(run.snapshot, SCHEMA) == ()
    for number, feature in enumerate(("event.amount", "count(transaction)", "count(search)")):
        run.seen(BID, manifest(feature), number)
        run.passed(BID)
    assert [one.text for one in reserve_of(run.snapshot, SCHEMA)] == [manifest("count(transaction)")]
    run(VersionFailing(BID, run.live[BID], "rows kill it", 9, at_fault=True))
    assert reserve_of(run.snapshot, SCHEMA) == ()
    run.seen(BID, manifest("count(search)"), 7)
    run.passed(BID)
    run(PairGone(BID))
    assert reserve_of(run.snapshot, SCHEMA) == ()


def test_a_tenant_keeps_for_fallbacks_what_is_within_its_quota_those_of_the_newest_versions_first() -> None:
    run = Run()
    run(TenantSeen(TenantSettings("ads", window_bytes_max=300)))
    run(TenantSeen(TenantSettings("other", window_bytes_max=152)))
    names = [ModelName("ads", f"model{number}") for number in range(4)] + [ModelName("other", "model0")]
    for name, days in zip(names, (30, 40, 50, 60, 70), strict=True):
        run.seen(name, counting(days), 1)
        run.passed(name)
        run.seen(name, manifest(), 2)
        run.passed(name)
    kept = [one.name for one in reserve_of(run.snapshot, SCHEMA)]
    assert kept == [names[3], names[2], names[4]], "128 and 112 bytes, and another tenant's"
    run(TenantSeen(TenantSettings("ads", window_bytes_max=1000)))
    assert len(reserve_of(run.snapshot, SCHEMA)) == len(names)
    run(TenantSeen(TenantSettings("ads", window_bytes_max=1000, stored_bytes_max=24)))
    assert [one.name for one in reserve_of(run.snapshot, SCHEMA)] == [names[3], names[4]], "each has an output"


def test_fallbacks_with_the_same_windows_are_kept_for_together() -> None:
    run = Run()
    run(TenantSeen(TenantSettings("ads", window_bytes_max=130)))
    for model in range(9):
        for number in range(2):
            run.seen(ModelName("ads", f"model{model}"), counting(30), number)
            run.passed(ModelName("ads", f"model{model}"))
    assert len(reserve_of(run.snapshot, SCHEMA)) == 9


def test_an_operator_s_quota_changes_what_holds_and_is_kept() -> None:
    run = Run()
    caps = TenantCaps(weight_max=4.0).limits()
    run(TenantSeen(TenantSettings("ads", asked={"weight": 9.0}).under(caps)))
    assert run.snapshot.settings("ads").weight == 4.0
    (configured,) = run(QuotaSet("ads", Quota(weight=8.0, rows_s_max=50.0, who="eve", at_ms=5), caps))
    assert isinstance(configured, ConfigureTenant)
    assert (configured.settings.weight, configured.settings.rows_s_max) == (8.0, 50.0)
    assert run(QuotaSet("ads", Quota(weight=8.0, rows_s_max=50.0, who="eve", at_ms=5), caps)) == []
    assert run(QuotaSet("new", Quota(models_max=0), caps)) == []
    assert run.snapshot.settings("new").models_max == 0, "also for a tenant that comes later"
    (seen,) = run(TenantSeen(TenantSettings("ads", asked={"weight": 2.0}).under(caps)))
    assert isinstance(seen, ConfigureTenant)
    assert (seen.settings.weight, seen.settings.rows_s_max) == (2.0, 50.0), "it may ask for less"
    kept, _ = decode(encode(run.snapshot), SCHEMA)
    assert kept.quotas == run.snapshot.quotas
    assert kept.tenants == run.snapshot.tenants
    (cleared,) = run(QuotaSet("ads", Quota(), caps))
    assert isinstance(cleared, ConfigureTenant)
    assert cleared.settings == TenantSettings("ads", asked={"weight": 2.0}).under(caps)
    assert list(run.snapshot.quotas) == ["new"]


def test_tenants_come_change_and_go() -> None:
    run = Run()
    settings_ = TenantSettings("ads", weight=2.0)
    assert run(TenantSeen(settings_)) == [ConfigureTenant(settings_)]
    assert run(TenantSeen(settings_)) == []
    run.seen(BID, manifest(), 1)
    run.passed(BID)
    actions = run(TenantGone("ads"))
    assert [type(action) for action in actions] == [Retire, RemoveTenant]
    assert run(TenantGone("ads")) == []


def test_a_failing_version_is_told_and_may_recover() -> None:
    run = Run()
    run.seen(BID, manifest(), 1)
    run.passed(BID)
    assert run(VersionFailing(BID, "another", "why")) == []
    run(VersionFailing(BID, run.live[BID], "can't load"))
    assert run.state(BID) == "failing"
    assert status(run.snapshot, BID)["problems"] == ["can't load"]
    run(VersionFailing(BID, run.live[BID], ""))
    assert run.state(BID) == "live"


def test_what_is_kept_is_live_again_without_a_trial_and_damage_is_told() -> None:
    run = Run()
    run(TenantSeen(TenantSettings("ads", weight=3.0)))
    run.seen(BID, manifest("event.amount", "event.shop"), 1)
    run.passed(BID)
    run.seen(FRAUD, manifest(), 2)
    kept = encode(run.snapshot)
    restored, problems = decode(kept, SCHEMA)
    assert problems == ()
    assert restored.live == run.snapshot.live
    assert restored.tenants == run.snapshot.tenants
    assert set(restored.models) == {BID}, "candidates are found again by the scan"
    again, actions = apply(restored, PairSeen(BID, manifest("event.amount", "event.shop"), blob(1), 5), SCHEMA)
    assert again is restored
    assert actions == ()

    narrower, problems = decode(kept, EventSchema(("transaction",), {"amount": "number"}))
    assert narrower.models == {}
    assert "shop" in problems[0]
    with pytest.raises(ManifestError, match="damaged"):
        decode(kept[:-5], SCHEMA)


names = st.sampled_from([BID, FRAUD, RISK, ModelName("ads", "b-d"), ModelName("ads", "b_d")])
texts = st.sampled_from(
    [
        manifest(),
        manifest("event.shop"),
        manifest("models.ads.bid.score"),
        manifest("models.grocery.fraud.score"),
        manifest("nonsense("),
        b"\xff",
    ]
)
happenings = st.one_of(
    st.tuples(st.just("seen"), names, texts, st.integers(0, 2)),
    st.tuples(st.just("seen"), names, texts, st.integers(0, 2)),
    st.tuples(st.just("passed"), names),
    st.tuples(st.just("passed"), names),
    st.tuples(st.just("failed"), names),
    st.tuples(st.just("gone"), names),
    st.tuples(st.just("failing"), names, st.booleans()),
    st.tuples(st.just("tenant gone"), st.sampled_from(["ads", "grocery"])),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(happenings, max_size=40))
def test_any_order_of_events_keeps_one_live_version_and_survives_a_restart(run_of: list[tuple[object, ...]]) -> None:
    run = Run()
    for happening in run_of:
        running = dict(run.live)
        match happening:
            case ("seen", ModelName() as name, bytes(text), int(number)):
                run.seen(name, text, number)
                assert run.live == running, "a new pair alone changes nothing that runs"
            case ("passed", ModelName() as name) if name in run.snapshot.models and run.snapshot.models[name].newest:
                run.passed(name, run.on_trial(name) or "none")
            case ("failed", ModelName() as name) if name in run.snapshot.models and run.snapshot.models[name].newest:
                run(TrialFailed(name, run.on_trial(name), "no", 1))
                assert run.live == running
            case ("gone", ModelName() as name):
                run(PairGone(name))
            case ("failing", ModelName() as name, bool(at_fault)):
                run(VersionFailing(name, run.live.get(name, ""), "why", run.time_ms, at_fault))
            case ("tenant gone", str(tenant)):
                run(TenantGone(tenant))
        for name, entry in run.snapshot.models.items():
            assert entry.live is not None or entry.newest is not None
            if entry.newest is not None and entry.newest.state == "waiting":
                assert entry.newest.problems
            if entry.live is not None and entry.newest is not None:
                assert entry.newest.version != entry.live.version.version, str(name)
        restored, _ = decode(encode(run.snapshot), SCHEMA)
        assert restored.live == run.snapshot.live
