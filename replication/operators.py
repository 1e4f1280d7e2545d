"""What operators may ask of a running node, on the peer port: signed with the cluster's secret as any call there is.

Changes are proposed to the catalog by whichever node was asked. What takes longer than a call may (a snapshot, a
check of a partition) is a job: the call starts it, and further ones ask how it goes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final, Literal, Protocol, TypeAlias, TypeVar

import msgspec
import structlog
from msgspec import Meta

from node.kernel.errors import HeadraceError, NotFound, PeerRefused
from node.kernel.limits import MOVES_MAX, NODES_MAX, OPERATOR_JOBS_KEPT_MAX, OPERATOR_JOBS_MAX, STANDBY_COUNT_MAX
from replication.catalog import Catalog
from replication.commands import Command, DrainNode, Name, SetSettings, Settings
from replication.peer_messages import PeerCall, PeerReply, PeerRoute

log = structlog.get_logger(__name__)

STATUS_PATH: Final = "/peer/cluster"
OPERATORS_PATH: Final = "/peer/operators"
_STALE_TRIES = 3
"""A command decided on an old catalog is refused; it is decided anew so often."""

_SETTINGS = {"standbys": "standby_count"}
"""A setting's name here -> in the catalog, where that differs."""

JobState: TypeAlias = Literal["running", "done", "failed"]


class NodeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of drain, undrain and leave."""

    node: Name


class JoinBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    node: Name
    raft_address: Name


class PartitionBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of snapshot and verify."""

    partition: int


class SettingsBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is None stays as it is. Names are those of the config and of status."""

    standbys: Annotated[int, Meta(ge=0, le=STANDBY_COUNT_MAX)] | None = None
    snapshot_holders_min: Annotated[int, Meta(ge=1, le=NODES_MAX)] | None = None
    moves_max: Annotated[int, Meta(ge=1, le=MOVES_MAX)] | None = None
    builds_max: Annotated[int, Meta(ge=1, le=MOVES_MAX)] | None = None

    def applied_to(self, settings: Settings) -> Settings:
        changes = {_SETTINGS.get(name, name): value for name, value in msgspec.structs.asdict(self).items()}
        return msgspec.structs.replace(
            settings, **{name: value for name, value in changes.items() if value is not None}
        )


class Job(msgspec.Struct, frozen=True):
    job: int
    what: str
    state: JobState
    detail: dict[str, Any] = {}
    """What came of it, once done."""
    reason: str = ""
    """Why it failed."""


class Cluster(Protocol):
    """What is needed of `replication.cluster.Cluster`."""

    async def agreed(self) -> Catalog: ...

    async def propose(self, command: Command) -> None: ...

    async def join(self, name: str, raft_address: str) -> None: ...

    async def leave(self, name: str) -> None: ...


PartitionWork: TypeAlias = Callable[[int], Awaitable[Mapping[str, Any]]]
"""Does something with a partition that this node holds and tells what came of it, as plain JSON values."""

_Body = TypeVar("_Body")


class Operators:
    """`status` gives what this node knows of the cluster, `snapshot` and `verify` do their work here."""

    def __init__(
        self, cluster: Cluster, status: Callable[[], bytes], snapshot: PartitionWork, verify: PartitionWork
    ) -> None:
        self._cluster = cluster
        self._status = status
        self._snapshot = snapshot
        self._verify = verify
        self._jobs: dict[int, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_job = 1

    def routes(self) -> tuple[PeerRoute, ...]:
        return (
            PeerRoute("GET", STATUS_PATH, self._tell_status),
            PeerRoute("POST", f"{OPERATORS_PATH}/drain", self._drain),
            PeerRoute("POST", f"{OPERATORS_PATH}/undrain", self._undrain),
            PeerRoute("POST", f"{OPERATORS_PATH}/settings", self._set_settings),
            PeerRoute("POST", f"{OPERATORS_PATH}/join", self._join),
            PeerRoute("POST", f"{OPERATORS_PATH}/leave", self._leave),
            PeerRoute("POST", f"{OPERATORS_PATH}/snapshot", self._start_snapshot),
            PeerRoute("POST", f"{OPERATORS_PATH}/verify", self._start_verify),
            PeerRoute("GET", f"{OPERATORS_PATH}/jobs/{{job}}", self._tell_job),
        )

    async def stop(self) -> None:
        """Give up on jobs that still run."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _tell_status(self, call: PeerCall) -> PeerReply:
        return PeerReply(self._status())

    # members

    async def _drain(self, call: PeerCall) -> PeerReply:
        return await self._set_draining(_body(call, NodeBody).node, True)

    async def _undrain(self, call: PeerCall) -> PeerReply:
        return await self._set_draining(_body(call, NodeBody).node, False)

    async def _set_draining(self, node: str, draining: bool) -> PeerReply:
        await self._insist(lambda catalog: DrainNode(revision=catalog.revision, name=node, draining=draining))
        log.info("an operator has said whether a node drains", node=node, draining=draining)
        return PeerReply(b"{}")

    async def _insist(self, decide: Callable[[Catalog], Command]) -> None:
        for tries_left in reversed(range(_STALE_TRIES)):
            try:
                await self._cluster.propose(decide(await self._cluster.agreed()))
                break
            except PeerRefused:
                if not tries_left:
                    raise

    async def _set_settings(self, call: PeerCall) -> PeerReply:
        body = _body(call, SettingsBody)
        await self._insist(
            lambda catalog: SetSettings(revision=catalog.revision, settings=body.applied_to(catalog.settings))
        )
        log.info("an operator has set the cluster's settings", **msgspec.structs.asdict(body))
        return PeerReply(b"{}")

    async def _join(self, call: PeerCall) -> PeerReply:
        body = _body(call, JoinBody)
        await self._cluster.join(body.node, body.raft_address)
        log.info("an operator lets a node join", node=body.node, raft_address=body.raft_address)
        return PeerReply(b"{}")

    async def _leave(self, call: PeerCall) -> PeerReply:
        node = _body(call, NodeBody).node
        await self._cluster.leave(node)
        log.info("an operator has removed a node", node=node)
        return PeerReply(b"{}")

    # jobs

    async def _start_snapshot(self, call: PeerCall) -> PeerReply:
        partition = _body(call, PartitionBody).partition
        return self._start(f"snapshot of partition {partition}", self._snapshot, partition)

    async def _start_verify(self, call: PeerCall) -> PeerReply:
        partition = _body(call, PartitionBody).partition
        return self._start(f"check of partition {partition}", self._verify, partition)

    async def _tell_job(self, call: PeerCall) -> PeerReply:
        number = call.variables["job"]
        job = self._jobs.get(int(number)) if re.fullmatch("[0-9]{1,9}", number) else None
        if job is None:
            raise NotFound(f"there is no job {number} on this node; if it was started again since, ask anew")
        return PeerReply(msgspec.json.encode(job))

    def _start(self, what: str, work: PartitionWork, partition: int) -> PeerReply:
        if len(self._tasks) >= OPERATOR_JOBS_MAX:
            raise PeerRefused(f"{OPERATOR_JOBS_MAX} jobs run on this node already (OPERATOR_JOBS_MAX); wait for one")
        job = Job(self._next_job, what, "running")
        self._next_job += 1
        self._jobs[job.job] = job
        task = asyncio.create_task(self._run(job, work(partition)), name=what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._forget_oldest()
        return PeerReply(msgspec.json.encode(job))

    async def _run(self, job: Job, work: Awaitable[Mapping[str, Any]]) -> None:
        try:
            done = msgspec.structs.replace(job, state="done", detail=dict(await work))
        except HeadraceError as failure:
            done = msgspec.structs.replace(job, state="failed", reason=str(failure))
        except Exception as failure:
            log.error("an operator's job failed", what=job.what, exc_info=failure)
            reason = f"the node failed on this ({type(failure).__name__}); its log has the reason"
            done = msgspec.structs.replace(job, state="failed", reason=reason)
        self._jobs[job.job] = done

    def _forget_oldest(self) -> None:
        ended = [number for number, job in self._jobs.items() if job.state != "running"]
        for number in ended[: max(0, len(self._jobs) - OPERATOR_JOBS_KEPT_MAX)]:
            del self._jobs[number]


def _body(call: PeerCall, kind: type[_Body]) -> _Body:
    """Raises PeerRefused."""
    try:
        return msgspec.json.decode(call.body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
        reason = f"what an operator asked can't be read ({failure}); use the command line of the node's own release"
        raise PeerRefused(reason) from None
