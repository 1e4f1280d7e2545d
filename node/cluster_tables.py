"""Tables between this node and the cluster's catalog: `node.tables.service.TableLedger`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from node.kernel.errors import NotFound, PeerRefused
from node.kernel.table_versions import Table, TableVersion
from replication.catalog import Catalog
from replication.commands import Command, DropTable, PutTable

_DECISIONS_MAX = 8


class Proposer(Protocol):
    """What is needed of `replication.cluster.Cluster`."""

    @property
    def catalog(self) -> Catalog: ...

    async def propose(self, command: Command) -> None: ...

    async def agreed(self) -> Catalog: ...


class CatalogTables:
    def __init__(self, cluster: Proposer) -> None:
        self._cluster = cluster

    def tables(self) -> Mapping[str, Table]:
        return self._cluster.catalog.tables

    def waits_for(self, name: str) -> list[str]:
        catalog = self._cluster.catalog
        table = catalog.tables.get(name)
        if table is None or table.passed is None:
            return []
        return sorted(catalog.nodes.keys() - catalog.holders.get(table.passed.version, {}).keys())

    async def put(self, name: str, version: TableVersion) -> None:
        await self._insist(
            lambda catalog: PutTable(
                revision=catalog.revision,
                name=name,
                version=version.version,
                schema=version.schema,
                rows=version.rows,
                bytes=version.bytes,
                who=version.who,
                at_ms=version.at_ms,
            )
        )

    async def drop(self, name: str) -> None:
        if name not in (await self._cluster.agreed()).tables:
            raise NotFound(f"there is no table {name}; `headrace table list` names those that are")
        await self._insist(lambda catalog: DropTable(revision=catalog.revision, name=name))

    async def _insist(self, decide: Callable[[Catalog], Command]) -> None:
        """A command that is refused because the catalog changed meanwhile is decided anew, a few times."""
        for left in reversed(range(_DECISIONS_MAX)):
            try:
                await self._cluster.propose(decide(await self._cluster.agreed()))
            except PeerRefused:
                if not left:
                    raise
            else:
                return
