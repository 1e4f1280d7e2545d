"""The one root of Headrace's errors.

Every error says what happened, to what, and what the operator or tenant does next; its message is
complete by itself, so that a log line or a problem document needs nothing beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_SHOWN_MAX: Final = 60


def printable(text: str) -> str:
    """The text with line breaks, control and other invisible characters escaped: one line that is safe to show."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def shown(value: object) -> str:
    """A value of somebody's data for one line of a message: cut off when long, its type when it can't be written."""
    try:
        text = printable(repr(value))
    except RecursionError:  # JSON may be nested deeper than this interpreter writes
        return f"a {type(value).__name__} nested too deep to show"
    return text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 3] + "..."


class HeadraceError(Exception):
    """Root of all errors that Headrace raises on purpose."""


class ConfigError(HeadraceError):
    """The configuration has mistakes; `problems` holds one line for each: where, what, what is allowed."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class ManifestError(HeadraceError):
    """A tenant's manifest can't be taken; `problems` holds one line for each mistake, with its place."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class QuotaRefused(ManifestError):
    """A pair would take its tenant over a quota: `limit` is its name, the message says who can do what."""

    def __init__(self, limit: str, problem: str) -> None:
        super().__init__([problem])
        self.limit = limit


class ModelRefused(HeadraceError):
    """A model file failed its trial; the message is what the tenant reads in the status file."""


class WorkerLost(HeadraceError):
    """A tenant's worker process died or was killed while it held work; the work is tried again."""


class CallFailed(HeadraceError):
    """A model raised on its rows, or gave an output of another shape than it was loaded with."""


class SandboxUnavailable(HeadraceError):
    """A layer of the sandbox that the operator requires can't be had here; no model runs without it."""


class FrameCorrupt(HeadraceError):
    """A changelog record is not a frame of this format; the changelog must be inspected before a restart."""


class StateCorrupt(HeadraceError):
    """A stored row or key can't be read; delete the partition's folder, it is rebuilt from the changelog."""


class CatalogCorrupt(HeadraceError):
    """Bytes that should hold the catalog or a command of it can't be read; wipe the node's journal and rejoin."""


class StoreUnavailable(HeadraceError):
    """The local disk refused a read or write (full, damaged); free space, the partition retries by itself."""


class TableUnavailable(HeadraceError):
    """The live version of a table that a live model reads is not on this node yet; events and readers wait until it
    is."""


class TableRefused(HeadraceError):
    """A table's file or change can't be taken, and nothing was changed; `problems` holds a line for each mistake, with
    its row."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class ExportFailed(HeadraceError):
    """An export could not be written, or there is nothing to export; what was there before is untouched."""


class BrokerUnavailable(HeadraceError):
    """Kafka did not answer within its bound; the partition waits and retries by itself."""


class TopicMissing(HeadraceError):
    """A topic the node needs does not exist and may not be created, or triggers that wait are of one that the config
    has no more; the text says which, and what to do."""


class TopicUnfit(HeadraceError):
    """A topic's own settings would let the broker delete what must stay; change them, the node goes on by itself."""


class ProgressLost(HeadraceError):
    """The source no longer holds the next offset (retention, or the topic was made again)."""


class ChangelogCut(ProgressLost):
    """The changelog starts behind what the store has folded: a snapshot has to be restored first."""


class Fenced(HeadraceError):
    """Another producer took this partition over; this node must not commit for it any more."""


class LeaseLost(HeadraceError):
    """This node has not heard from a quorum for its lease, or is no longer the owner; it must not commit now."""


class PeerUnavailable(HeadraceError):
    """Another node did not answer in time, or not as it should; asking again is safe."""


class PeerRefused(HeadraceError):
    """Another node, or this one, refused what was asked of it; the message has its reason."""


class BoundExceeded(HeadraceError):
    """A request or queue is over a bound of `node.kernel.limits`; the message names the bound."""


class NotFound(HeadraceError):
    """The customer, model or feature that was asked for is not known here."""


class ClusterUnavailable(HeadraceError):
    """No quorum answered in time; the command may or may not be applied, and asking again is safe."""
