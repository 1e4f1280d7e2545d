"""Signatures of calls between nodes: nothing of a call can be changed, no call is taken twice or late."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel.limits import PEER_CLOCK_SKEW_MS_MAX
from replication.peer_auth import CallGuard, Claims, NotAuthentic, PeerKey

SECRET = b"a secret of the cluster, long enough"
NOW_MS = 1_700_000_000_000
EMPTY = hashlib.sha256(b"").hexdigest()

names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40)
paths = st.text("abc/?=&%20", max_size=30).map(lambda text: f"/{text}")
hexes = st.binary(min_size=16, max_size=16).map(bytes.hex)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
claims = st.builds(Claims, names, names, st.integers(0, 10**15 - 1), hexes, digests)
methods = st.sampled_from(["GET", "POST", "PUT", "DELETE"])


def claim(number: int, time_ms: int = NOW_MS, target: str = "two") -> Claims:
    return Claims("one", target, time_ms, f"{number:032x}", EMPTY)


def kind_of(guard: CallGuard, claims: Claims, now_ms: int, key: PeerKey | None = None) -> str:
    header = (key or PeerKey(SECRET)).header("GET", "/x", claims)
    with pytest.raises(NotAuthentic) as refused:
        guard.admit("GET", "/x", header, now_ms)
    return refused.value.kind


@given(methods, paths, claims)
def test_what_was_signed_is_read_back(method: str, path: str, signed: Claims) -> None:
    key = PeerKey(SECRET)
    header = key.header(method, path, signed)
    assert header.isascii()
    assert header.isprintable()
    assert key.claims(method, path, header) == signed


@given(methods, paths, claims, methods, paths, claims)
def test_a_signature_fits_one_call_only(
    method: str, path: str, signed: Claims, other_method: str, other_path: str, other: Claims
) -> None:
    key = PeerKey(SECRET)
    mac = key.header(method, path, signed).rpartition(" ")[2]
    header = f"{key.header(other_method, other_path, other).rpartition(' ')[0]} {mac}"
    if (method, path, signed) == (other_method, other_path, other):
        assert key.claims(other_method, other_path, header) == signed
        return
    with pytest.raises(NotAuthentic, match="does not fit"):
        key.claims(other_method, other_path, header)


@given(claims, st.integers(0, 10_000), st.characters(codec="latin-1"))
def test_a_header_changed_in_one_place_is_refused(signed: Claims, at: int, character: str) -> None:
    key = PeerKey(SECRET)
    header = key.header("GET", "/x", signed)
    at %= len(header)
    changed = header[:at] + character + header[at + 1 :]
    if changed != header:
        with pytest.raises(NotAuthentic):
            key.claims("GET", "/x", changed)


@given(st.text(max_size=300))
def test_any_text_as_a_header_is_refused(header: str) -> None:
    with pytest.raises(NotAuthentic) as refused:
        PeerKey(SECRET).claims("GET", "/x", header)
    assert not refused.value.known


@given(claims, st.binary(max_size=40))
def test_only_the_same_secret_reads_it(signed: Claims, other: bytes) -> None:
    header = PeerKey(SECRET).header("GET", "/x", signed)
    for secret in (other, None):
        if secret != SECRET:
            with pytest.raises(NotAuthentic, match="same cluster secret"):
                PeerKey(secret).claims("GET", "/x", header)


@given(hexes, st.integers(100, 599), names, st.binary(max_size=100), hexes, st.binary(max_size=100))
def test_a_proof_is_for_one_reply(
    nonce: str, status: int, node: str, content: bytes, other_nonce: str, other_content: bytes
) -> None:
    key = PeerKey(SECRET)
    proof = key.proof(nonce, status, node, content)
    assert key.proves(proof, nonce, status, node, content)
    assert not key.proves(proof, nonce, status + 1, node, content)
    assert not key.proves(proof, nonce, status, node + "x", content)
    assert key.proves(proof, other_nonce, status, node, content) == (nonce == other_nonce)
    assert key.proves(proof, nonce, status, node, other_content) == (content == other_content)
    assert not PeerKey(None).proves(proof, nonce, status, node, content)
    assert not key.proves("é", nonce, status, node, content)


def test_the_secret_shows_nowhere() -> None:
    key = PeerKey(SECRET)
    shown = repr(key) + str(vars(key)) + key.header("GET", "/x", claim(1))
    assert SECRET.decode() not in shown
    assert SECRET.hex() not in shown


def test_a_call_is_taken_once() -> None:
    guard = CallGuard(PeerKey(SECRET), "two", NOW_MS)
    header = PeerKey(SECRET).header("GET", "/x", claim(1))
    assert guard.admit("GET", "/x", header, NOW_MS) == claim(1)
    assert kind_of(guard, claim(1), NOW_MS + 1) == "repeated"
    assert kind_of(guard, claim(1), NOW_MS + PEER_CLOCK_SKEW_MS_MAX) == "repeated"
    assert kind_of(guard, claim(1), NOW_MS + PEER_CLOCK_SKEW_MS_MAX + 1) == "clock"


def test_a_call_for_another_node_is_refused_and_says_by_whom() -> None:
    guard = CallGuard(PeerKey(SECRET), "two", NOW_MS)
    assert kind_of(guard, claim(1, target="three"), NOW_MS) == "misdirected"
    assert kind_of(guard, claim(1, target=""), NOW_MS) == "misdirected"
    assert guard.nonces == 0


def test_clocks_may_differ_so_far_and_no_further() -> None:
    guard = CallGuard(PeerKey(SECRET), "two", 0)
    for number, off_ms in enumerate((-PEER_CLOCK_SKEW_MS_MAX, PEER_CLOCK_SKEW_MS_MAX)):
        guard.admit("GET", "/x", PeerKey(SECRET).header("GET", "/x", claim(number, NOW_MS + off_ms)), NOW_MS)
        further = claim(9, NOW_MS + off_ms + (1 if off_ms > 0 else -1))
        assert kind_of(guard, further, NOW_MS) == "clock"


def test_what_was_called_before_the_start_is_not_taken_after_it() -> None:
    """A node that was restarted has forgotten what it took."""
    guard = CallGuard(PeerKey(SECRET), "two", NOW_MS)
    assert kind_of(guard, claim(1, NOW_MS - 1), NOW_MS) == "repeated"


def test_a_clock_set_back_opens_nothing() -> None:
    guard = CallGuard(PeerKey(SECRET), "two", NOW_MS)
    key = PeerKey(SECRET)
    guard.admit("GET", "/x", key.header("GET", "/x", claim(1)), NOW_MS)
    later_ms = NOW_MS + 10 * PEER_CLOCK_SKEW_MS_MAX
    guard.admit("GET", "/x", key.header("GET", "/x", claim(2, later_ms)), later_ms)
    assert guard.nonces == 1
    assert kind_of(guard, claim(1), NOW_MS) == "repeated"


def test_more_calls_than_are_remembered_are_refused_until_some_are_old() -> None:
    guard = CallGuard(PeerKey(SECRET), "two", NOW_MS, nonces_max=3)
    key = PeerKey(SECRET)
    for number in range(3):
        guard.admit("GET", "/x", key.header("GET", "/x", claim(number)), NOW_MS)
    assert kind_of(guard, claim(3), NOW_MS) == "too-many-calls"
    later_ms = NOW_MS + 3 * PEER_CLOCK_SKEW_MS_MAX
    guard.admit("GET", "/x", key.header("GET", "/x", claim(4, later_ms)), later_ms)
    assert guard.nonces == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(-40_000, 40_000), st.integers(-50_000, 90_000)), max_size=40))
def test_no_schedule_of_clocks_lets_a_call_in_twice(steps: list[tuple[int, int, int]]) -> None:
    """Each step: the guard's clock moves (also back), and one of a few calls is sent, perhaps again."""
    key, guard, now_ms = PeerKey(SECRET), CallGuard(PeerKey(SECRET), "two", NOW_MS), NOW_MS
    taken: set[Claims] = set()
    made: dict[int, Claims] = {}
    for number, off_ms, moved_ms in steps:
        now_ms += moved_ms
        call = made.setdefault(number, claim(number, max(0, now_ms + off_ms)))
        for _ in range(2):
            try:
                admitted = guard.admit("GET", "/x", key.header("GET", "/x", call), now_ms)
            except NotAuthentic:
                continue
            assert admitted not in taken
            taken.add(admitted)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40_000), st.integers(-PEER_CLOCK_SKEW_MS_MAX, PEER_CLOCK_SKEW_MS_MAX))))
def test_a_new_call_within_the_skew_is_taken_while_the_clock_goes_on(steps: list[tuple[int, int]]) -> None:
    key, guard, now_ms = PeerKey(SECRET), CallGuard(PeerKey(SECRET), "two", NOW_MS), NOW_MS + PEER_CLOCK_SKEW_MS_MAX
    for number, (moved_ms, off_ms) in enumerate(steps):
        now_ms += moved_ms
        call = claim(number, now_ms + off_ms)
        assert guard.admit("GET", "/x", key.header("GET", "/x", call), now_ms) == call
