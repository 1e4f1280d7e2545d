"""(P) How nodes know each other's calls: a signature over all of a request, good once and for a short time.

A request carries one header: sender, target node, time, nonce, the sha256 of its body, and the HMAC-SHA256 (RFC 2104)
of these with method, path and query. The key is derived from the cluster's secret. A reply carries the HMAC of the
request's nonce with status, node and content, so that a caller knows who answered, and to what. Neither is
encrypted: peers talk over a private or tunnelled network. Without a secret (loopback only) the same header is asked for
under a key that anybody can make: a browser can't be led to send it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from node.kernel.errors import HeadraceError
from node.kernel.limits import NAME_BYTES_MAX, PEER_CLOCK_SKEW_MS_MAX, PEER_NONCES_MAX

_CALL = b"headrace peer call 1"
_REPLY = b"headrace peer reply 1"
_FORMAT = "1"
_NUMBER = re.compile(r"[0-9]{1,15}")
_NONCE = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class NotAuthentic(HeadraceError):
    """A call that is not answered; `kind` is for programs, and `known` tells whether its sender has the secret."""

    def __init__(self, kind: str, reason: str, nonce: str = "") -> None:
        super().__init__(reason)
        self.kind = kind
        self.nonce = nonce

    @property
    def known(self) -> bool:
        return bool(self.nonce)


@dataclass(frozen=True, slots=True)
class Claims:
    """What a call says of itself. `nonce` is 32 hex digits, never used before; `body_sha256` is in hex."""

    sender: str
    target: str
    time_ms: int
    nonce: str
    body_sha256: str


class PeerKey:
    """Signs calls and replies. Its secret shows nowhere."""

    def __init__(self, secret: bytes | None) -> None:
        self._call_key = _derived(secret or b"", _CALL)
        self._reply_key = _derived(secret or b"", _REPLY)

    def header(self, method: str, raw_path: str, claims: Claims) -> str:
        """The value of the call's header; `raw_path` as it is sent, with its query."""
        fields = (
            _FORMAT,
            quote(claims.sender, safe=""),
            quote(claims.target, safe=""),
            str(claims.time_ms),
            claims.nonce,
            claims.body_sha256,
        )
        return " ".join((*fields, self._call_mac(method, raw_path, fields)))

    def claims(self, method: str, raw_path: str, header: str) -> Claims:
        """What the header says, once its signature is found right. Raises NotAuthentic."""
        if not header:
            raise NotAuthentic("unauthenticated", "this is for nodes of the cluster; the call has no signature")
        fields = header.split(" ")
        if len(fields) != 7 or not header.isascii() or fields[0] != _FORMAT:
            raise NotAuthentic("unauthenticated", "the signature is not as this release makes them; upgrade the nodes")
        if not hmac.compare_digest(fields[6], self._call_mac(method, raw_path, tuple(fields[:6]))):
            raise NotAuthentic(
                "unauthenticated", "the signature does not fit the call; give all nodes the same cluster secret"
            )
        _, sender, target, time_ms, nonce, body_sha256, _ = fields
        well_formed = _NUMBER.fullmatch(time_ms) and _NONCE.fullmatch(nonce) and _SHA256.fullmatch(body_sha256)
        if not well_formed or len(sender) > 3 * NAME_BYTES_MAX:
            raise NotAuthentic("unauthenticated", "the signed fields are not as this release makes them")
        return Claims(unquote(sender), unquote(target), int(time_ms), nonce, body_sha256)

    def _call_mac(self, method: str, raw_path: str, fields: tuple[str, ...]) -> str:
        text = "\n".join((method, raw_path, *fields))
        return hmac.new(self._call_key, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()

    def proof(self, nonce: str, status: int, node: str, content: bytes) -> str:
        """What shows that `node` of the cluster gave this reply to the call with that nonce."""
        text = f"{nonce}\n{status}\n{quote(node, safe='')}\n{hashlib.sha256(content).hexdigest()}"
        return hmac.new(self._reply_key, text.encode(), hashlib.sha256).hexdigest()

    def proves(self, proof: str, nonce: str, status: int, node: str, content: bytes) -> bool:
        return proof.isascii() and hmac.compare_digest(proof, self.proof(nonce, status, node, content))


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return hmac.new(secret, purpose, hashlib.sha256).digest()


class CallGuard:
    """Takes each call once, and only calls for this node of the last PEER_CLOCK_SKEW_MS_MAX.

    Nonces are kept in buckets by the call's own time and dropped a bucket at once, when it is too old to be taken
    anyway. What was called before this node started, or before the last bucket dropped, is refused: its nonce may be
    forgotten, also where the clock was set back.
    """

    def __init__(self, key: PeerKey, node: str, now_ms: int, nonces_max: int = PEER_NONCES_MAX) -> None:
        self._key = key
        self._node = node
        self._time_ms_min = now_ms
        self._nonces_max = nonces_max
        self._seen: dict[int, set[str]] = {}

    @property
    def nonces(self) -> int:
        return sum(len(bucket) for bucket in self._seen.values())

    def admit(self, method: str, raw_path: str, header: str, now_ms: int) -> Claims:
        """What the call claims; its body is still to be compared. Raises NotAuthentic."""
        claims = self._key.claims(method, raw_path, header)
        if claims.target != self._node:
            reason = f"this is node {self._node}, the call is for {claims.target or 'a node not yet known'}"
            raise NotAuthentic("misdirected", reason, claims.nonce)
        self._check_time(claims, now_ms)
        bucket = self._seen.setdefault(claims.time_ms // PEER_CLOCK_SKEW_MS_MAX, set())
        if claims.nonce in bucket:
            raise NotAuthentic("repeated", "this very call was taken before; make it anew", claims.nonce)
        if self.nonces >= self._nonces_max:
            reason = f"{self._nonces_max} calls came within {2 * PEER_CLOCK_SKEW_MS_MAX} ms (PEER_NONCES_MAX)"
            raise NotAuthentic("too-many-calls", f"{reason}; call less often", claims.nonce)
        bucket.add(claims.nonce)
        return claims

    def _check_time(self, claims: Claims, now_ms: int) -> None:
        off_ms = claims.time_ms - now_ms
        if abs(off_ms) > PEER_CLOCK_SKEW_MS_MAX:
            reason = (
                f"the clock of {claims.sender} is {off_ms} ms off that of {self._node}, more than "
                f"{PEER_CLOCK_SKEW_MS_MAX} (PEER_CLOCK_SKEW_MS_MAX); set the hosts' clocks"
            )
            raise NotAuthentic("clock", reason, claims.nonce)
        self._drop_old(now_ms)
        if claims.time_ms < self._time_ms_min:
            reason = f"the call was made before {self._node} could tell whether it is new; make it anew"
            raise NotAuthentic("repeated", reason, claims.nonce)

    def _drop_old(self, now_ms: int) -> None:
        oldest = (now_ms - PEER_CLOCK_SKEW_MS_MAX) // PEER_CLOCK_SKEW_MS_MAX
        for number in [number for number in self._seen if number < oldest]:
            del self._seen[number]
            self._time_ms_min = max(self._time_ms_min, (number + 1) * PEER_CLOCK_SKEW_MS_MAX)
